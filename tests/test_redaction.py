"""Secrets in plain values, commands and running text: taken out by name, by place and by value, and nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest

from mnemoscope import redaction
from mnemoscope.errors import MnemoscopeError, UnknownName, UsageError
from mnemoscope.redaction import NOT_KEPT, cleaned, command_line, is_complete, remember, text, without_secrets


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"token": "abc"}, {"token": NOT_KEPT}),
        ({"a": [{"HF_TOKEN": 123}]}, {"a": [{"HF_TOKEN": NOT_KEPT}]}),
        ({"apiKey": "x", "db-password": "x", "Authorization": ["x"]}, dict.fromkeys(["apiKey", "db-password", "Authorization"], NOT_KEPT)),
        ({"headers": {"X-Anything": "x"}}, {"headers": {"X-Anything": NOT_KEPT}}),
        ({"proxies": {"https": "me:pass@proxy:3128"}}, {"proxies": {"https": f"{NOT_KEPT}@proxy:3128"}}),
        ({"proxies": {"https": "http://me:p@ss@proxy"}}, {"proxies": {"https": f"http://{NOT_KEPT}@proxy"}}),
        ({"lora": {"https://me@host/file": 0.8}}, {"lora": {f"https://{NOT_KEPT}@host/file": 0.8}}),
        (("https://host/?sig=a&b=1&access_token=c",), (f"https://host/?sig={NOT_KEPT}&b=1&access_token={NOT_KEPT}",)),
    ],
)  # fmt: skip
def test_plain_values_lose_their_secrets(given, kept):
    assert cleaned(given) == kept
    assert cleaned(kept) == kept


@pytest.mark.parametrize(
    "value",
    [
        {
            "token": True,
            "use_auth_token": None,
            "tokenizer": "a",
            "tokens": [1],
            "token_column": "a",
            "api_key_file": "a",
        },
        {"revision": "main", "guidance": 7.5, "model": "me/model@v1", "proxies": {"https": "http://proxy:3128"}},
        ["a prompt with token=, a key and an @ sign", "https://host/path@v1?page=2"],
    ],
)
def test_everything_else_stays(value):
    assert cleaned(value) == value


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--token", "abc", "--out", "run"], "--token '(not kept)' --out run"),
        (["--api-key=abc", "--api-key-file", "key"], "'--api-key=(not kept)' --api-key-file key"),
        (["--model-option", "token=abc=d"], "--model-option 'token=(not kept)'"),
        (["--model-option=token=abc"], "'--model-option=token=(not kept)'"),
        (["--model-option", "use_auth_token=true"], "--model-option use_auth_token=true"),
        (["--model-option", "proxies={https: 'http://a:b@h'}"], """--model-option 'proxies={"https": "http://(not kept)@h"}'"""),
        (["--model-option", "proxies=a:b@h"], "--model-option 'proxies=(not kept)@h'"),
        (["--model-option", "headers={X: b}"], """--model-option 'headers={"X": "(not kept)"}'"""),
        (["--lora", "https://a:b@h/file=0.8"], "--lora 'https://(not kept)@h/file=0.8'"),
        (["check", "demo", "x = y: {", "a=[b"], "check demo 'x = y: {' 'a=[b'"),
    ],
)  # fmt: skip
def test_a_command_line_loses_its_secrets(words, kept):
    assert command_line(words) == kept


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("token=hf_abc: a pipeline", "token=(not kept) a pipeline"),
        ("does not take {'token': 'a b', 'k': 1}", "does not take {'token': (not kept), 'k': 1}"),
        ("Authorization: Bearer abc.def", "Authorization: (not kept)"),
        ("Max retries: http://me:you@proxy:80/x", "Max retries: http://(not kept)@proxy:80/x"),
        ("GET /run?token=abc&page=2", "GET /run?token=(not kept)&page=2"),
        ("open it with ?token=…, or token: none", "open it with ?token=…, or token: none"),
        ("{'token': None}", "{'token': None}"),
    ],
)
def test_running_text_loses_its_secrets(said, kept):
    assert text(said) == kept
    assert text(kept) == kept


def test_secrets_that_are_known_are_found_by_their_value(monkeypatch):
    remember({"token": "pass/word-1", "password": "short", "proxies": {"http": "http://me:proxy-word@h"}})
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    monkeypatch.setenv("HTTPS_PROXY", "me:another-word@h")
    said = "pass/word-1 pass%2Fword-1 proxy-word of-the-environment another-word short"
    assert text(said) == " ".join([NOT_KEPT] * 5) + " short"


def test_a_secret_may_have_bytes_that_are_no_text():
    remember({"token": "\udcffsecret-of-odd-bytes"})
    assert text("it is \udcffsecret-of-odd-bytes here") == f"it is {NOT_KEPT} here"


def test_the_errors_that_users_read_quote_no_secret():
    error = UsageError("detector x does not take {'api_key': 'abc'} (https://a:b@h)")
    assert str(error) == "detector x does not take {'api_key': (not kept)} (https://(not kept)@h)"
    assert str(MnemoscopeError()) == ""
    assert UnknownName("option", "tokne", ["token"]).name == "tokne"


def test_a_record_says_that_something_was_taken_out():
    record = cleaned(
        {"token": "a", "revision": "main", "proxies": {"https": "http://a:b@h"}, "d": [{"api_key": "a", "k": 1}]}
    )
    assert not is_complete(record)
    assert is_complete({"token": True, "revision": "main"})
    assert without_secrets({"token": True, "revision": "main", "endpoint": "https://a:b@h"}) == {"revision": "main"}


@pytest.mark.parametrize("part", ["a-", "token", "?a", "http://", 'token="', "&a", "token=basic ", "://b@"])
def test_long_text_takes_no_long_time(part):
    began = time.perf_counter()
    text(part * (200_000 // len(part)))
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("name", ["tokens", "api_keys", "GITHUB_PAT", "OPENAI_API_KEY", "DB_PWD", "jwt", "HF_TOKEN"])
def test_names_of_secrets_come_in_many_spellings(name):
    assert cleaned({name: "abc", "compat": "abc"}) == {name: NOT_KEPT, "compat": "abc"}
    assert cleaned({"tokens": 77}) == {"tokens": 77}


def test_a_token_is_known_by_its_look_wherever_it_stands():
    token = "hf_" + "aB3" * 10
    assert cleaned({"endpoint": f"https://host/{token}/x"}) == {"endpoint": f"https://host/{NOT_KEPT}/x"}
    assert text(f"GET /{token} failed") == f"GET /{NOT_KEPT} failed"
    assert text("hf_hub_download and sk-learn stay") == "hf_hub_download and sk-learn stay"


def test_the_shell_s_own_variables_are_no_secrets(monkeypatch):
    """The working directory stands in many sentences; taking it out would spoil them."""
    for name in (
        "PWD",
        "OLDPWD",
        "HOME",
        "PATH",
        "USER",
        "SHELL",
        "LANG",
        "TERM",
        "TMPDIR",
        "PYTHONPATH",
        "VIRTUAL_ENV",
    ):
        monkeypatch.setenv(name, f"/somewhere/{name}")
        assert text(f"/somewhere/{name}/file cannot be read") == f"/somewhere/{name}/file cannot be read"


@pytest.mark.skipif(os.name != "posix", reason="a command line of bytes")
def test_a_command_line_that_is_no_utf_8_is_kept_as_a_shell_reads_it():
    words = ["mnemoscope", os.fsdecode(b"it's b\xfc\\cher\n"), "plain"]
    kept = command_line(words)
    kept.encode()
    assert kept == r"mnemoscope $'it\'s b\xfc\\cher\n' plain"
    shell = shutil.which("bash")
    if shell is not None:
        shown = subprocess.run(
            [shell, "-c", f"printf '%s' {kept.split(' ', 1)[1].rsplit(' ', 1)[0]}"], capture_output=True, check=True
        )
        assert shown.stdout == os.fsencode(words[1])
