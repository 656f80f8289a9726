"""Files and folders that the reader names: what cannot be read or written is said in one sentence, before a model is opened."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from PIL import Image

from mnemoscope.cli import main as cli
from mnemoscope.cli.pairs import model_options
from mnemoscope.errors import UsageError

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="places of POSIX systems")

BEGINNINGS = {
    "demo": [], "check": ["demo", "a red apple"], "audit": ["demo", "--prompts", "prompts.txt"],
    "calibrate": ["demo", "--prompts", "prompts.txt"], "report": ["folder"], "duplicates": ["pictures"], "explain": ["demo", "a red apple"],
    "gate": ["folder", "--policy", "file.yaml"], "regions": ["folder"], "measure": ["demo", "pictures"], "pack": ["folder"],
    "redteam": ["demo"], "replay": ["folder"], "serve": ["demo", "--port", "0"], "studio": ["demo", "--port", "0"],
    "train": ["demo", "pictures"], "verify": ["file.txt"], "view": ["folder", "--port", "0"], "index build": ["pictures"],
    "index query": ["folder", "pictures"], "index info": ["folder"], "index locate": ["folder", "pictures"], "bench mitigations": [],
}  # fmt: skip
"""Words of every command that has a place, before those of the place in question."""

NOWHERE = {
    "long": "x" * 300,
    "deep": "a/" * 3000,
    "loop": "loop",
    "inside a loop": "loop/x",
    "pipe": "pipe",
    "closed": "closed/inside",
    "below a file": "file.txt/x",
    "empty": "",
}
"""Places that nothing can be read from or written to."""

LONGEST = 300
"""Seconds after which a command waits for something."""

LINES = {("gate", "summary"), ("serve", "log")}
"""Options of files that lines are added to, which may be pipes that somebody reads."""


def commands(app: typer.Typer, before: str = "") -> Iterator[tuple[str, typing.Any]]:
    for command in app.registered_commands:
        yield f"{before}{command.name or command.callback.__name__}", command.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{before}{group.name or group.typer_instance.info.name} ")


def has_path(kind: typing.Any) -> bool:
    return kind is Path or any(map(has_path, typing.get_args(kind)))


def places() -> Iterator[tuple[str, str, list[str], typing.Any]]:
    """Command, parameter, how the command is called with ``PLACE`` there, and what typer knows of it."""
    for name, function in commands(cli.app):
        hints = typing.get_type_hints(function, include_extras=True)
        arguments = 0
        for parameter in inspect.signature(function).parameters:
            kind, *facts = typing.get_args(hints[parameter])
            is_argument = bool(facts) and isinstance(facts[0], typer.models.ArgumentInfo)
            if has_path(kind) and facts:
                words = list(BEGINNINGS[name])
                if is_argument:
                    words[arguments : arguments + 1] = ["PLACE"]
                else:
                    given = (
                        facts[0].default,
                        *(facts[0].param_decls or ()),
                    )  # typer takes the first one for the default
                    named = [d for d in given if isinstance(d, str) and d.startswith("--")]
                    words += [named[0] if named else f"--{parameter.replace('_', '-')}", "PLACE"]
                yield name, parameter, words, facts[0]
            arguments += is_argument


PLACES = list(places())


@pytest.fixture(scope="module")
def tree():
    """All commands as typer builds them, once for all calls."""
    return typer.main.get_command(cli.app)


@pytest.fixture
def folder(tmp_path, monkeypatch, tree):
    """A working directory with what the commands need."""
    monkeypatch.setattr(cli, "app", tree)
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "pictures", "closed/inside"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures/a.png")
    for name in ("prompts.txt", "file.txt", "file.yaml"):
        (tmp_path / name).write_text("a red apple\n")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for above in (tmp_path, *tmp_path.parents):  # another user has to get there
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(0o755)
    return tmp_path


@pytest.fixture
def closed(folder) -> Iterator[None]:
    """A folder that one may not enter, for a user who may not: root is nobody meanwhile."""
    (folder / "closed").chmod(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)
    (folder / "closed").chmod(0o755)


@pytest.fixture
def alarm() -> Iterator[None]:
    """A command that waits for a pipe ends the test, not the run of all tests."""

    def ring(*_: object) -> None:
        raise AssertionError("the command waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def sentence(run: typing.Any, name: str, words: list[str], place: str) -> str:
    signal.alarm(LONGEST)
    code, out, err = run(*name.split(), *(place if word == "PLACE" else word for word in words))
    said = [line for line in err.splitlines() if line.startswith("mnemoscope: ")]
    assert (code, out, len(said)) == (2, "", 1), (out, err)
    assert "Traceback" not in err
    assert "Loading" not in err  # said before torch is imported and a model is opened
    return said[0]


@pytest.mark.parametrize("kind", NOWHERE)
def test_a_place_that_is_none_is_refused_in_one_sentence(run, folder, alarm, request, kind):
    if kind == "closed":
        request.getfixturevalue("closed")
    for name, parameter, words, _ in PLACES:
        if kind != "pipe" or (name, parameter) not in LINES:
            assert NOWHERE[kind][:20] in sentence(run, name, words, NOWHERE[kind])


@pytest.mark.parametrize(("name", "parameter", "words", "facts"), PLACES, ids=[f"{p[0]} {p[1]}" for p in PLACES])
def test_every_place_says_what_it_is_to_be(run, folder, alarm, name, parameter, words, facts):
    kind = facts.parser.__name__
    if kind in ("file", "written_file", "appended_file"):
        assert "is a folder" in sentence(run, name, words, "folder")
    elif kind in ("folder", "written_folder", "later_folder"):
        assert "folder" in sentence(run, name, words, "file.txt")
    else:
        assert kind == "file_or_folder"


@pytest.mark.parametrize("kind", [kind for kind in NOWHERE if kind != "empty"])
def test_a_lora(folder, alarm, request, kind):
    if kind == "closed":
        request.getfixturevalue("closed")
    for scale in ("", "=0.5"):
        with pytest.raises(UsageError) as error:
            model_options(None, [NOWHERE[kind] + scale])
        assert NOWHERE[kind][:20] in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "demo", "--port", "0", "--thresholds", "pipe"],
        ["train", "demo", "pictures", "--filter", "pipe"],
        ["serve", "demo", "--port", "0", "--log", "pipe"],
        ["check", "demo", "x", "--images", "--out", "file.txt"],
        ["check", "pipe", "x"],
    ],
)
def test_places_that_are_named_otherwise(run, folder, alarm, words, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the server takes SIGTERM over
    code, _, err = run(*words)
    assert code == 2, err
    assert "Traceback" not in err


def test_a_configuration_names_places_too(run, folder, alarm):
    for line in (
        "out: file.txt/x",
        f"out: {'x' * 300}",
        'out: "a\\0b"',
        'reference: ""',
        "calibration: loop",
        "measure: loop/x",
    ):
        (folder / "audit.yaml").write_text(f"model: demo\nprompts: prompts.txt\nimages: true\n{line}\n")
        for more in ([], ["--trust-config"]):
            code, _, err = run("audit", "--config", "audit.yaml", *more)
            assert (code, err.count("mnemoscope: ")) == (2, 1), (line, err)


def test_a_pipe_that_the_shell_hands_over_is_read(run, folder, alarm):
    read, write = os.pipe()
    with os.fdopen(write, "w") as end:
        end.write("model: demo\nwindow: 3\n")
    code, _, err = run("audit", "--config", f"/dev/fd/{read}")
    os.close(read)
    assert code == 2
    assert "no setting named 'window'" in err


@pytest.mark.parametrize(
    "words",
    [
        ["audit", "demo", "--prompts", "prompts.txt", "--out", "PLACE"],
        ["audit", "demo", "--prompts", "PLACE.txt"],
        ["audit", "demo", "--prompts", "prompts.txt", "--notes", "PLACE"],
        ["calibrate", "demo", "--prompts", "prompts.txt", "--model-option", "revision=PLACE"],
        ["check", "demo", "x", "--lora", "PLACE"],
        ["train", "demo", "pictures", "--out", "PLACE"],
        ["train", "PLACE", "pictures"],
        ["index", "build", "PLACE"],
        ["duplicates", "PLACE"],
    ],
)
def test_what_is_no_utf_8_is_refused_where_a_record_would_keep_it(run, folder, words):
    name = os.fsdecode(b"b\xfccher")
    os.mkdir(os.fsencode(name))
    (folder / f"{name}.txt").write_text("a red apple\n")
    (folder / name / "a.png").write_bytes((folder / "pictures/a.png").read_bytes())
    code, out, err = run(*(word.replace("PLACE", name) for word in words))
    assert (code, out) == (2, "")
    assert "b\\xfccher" in err.splitlines()[-1]
    assert "UTF-8" in err.splitlines()[-1]


def test_an_error_of_the_system_that_nobody_foresaw_is_a_sentence(run, folder, monkeypatch):
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "some/place")

    monkeypatch.setattr("mnemoscope.cli.doctor.examine", fail)
    assert run("doctor")[::2] == (2, "mnemoscope: some/place cannot be used (Permission denied); name another place.\n")
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "--traceback", "doctor"])
    monkeypatch.setenv("MNEMOSCOPE_DEBUG", "1")
    with pytest.raises(PermissionError):
        cli.main()


@pytest.mark.parametrize("content", ["{", '{"scores": 3}'])
@pytest.mark.parametrize(
    "words",
    [
        ["check", "demo", "a red apple", "--calibration", "broken.json"],
        ["explain", "demo", "a red apple", "--calibration", "broken.json"],
        ["studio", "demo", "--port", "0", "--calibration", "broken.json"],
        ["serve", "demo", "--port", "0", "--thresholds", "broken.json"],
        ["audit", "demo", "--prompts", "prompts.txt", "--out", "run", "--calibration", "broken.json"],
        ["audit", "demo", "--prompts", "prompts.txt", "--calibration", "broken.json", "--dry-run"],
        ["audit", "demo", "--prompts", "prompts.txt", "--out", "run", "--reference", "index"],
        ["audit", "demo", "--prompts", "prompts.txt", "--reference", "index", "--dry-run"],
        ["train", "demo", "pictures", "--out", "run", "--filter", "broken.json"],
    ],
    ids=lambda words: f"{words[0]} {' '.join(words[-3:])}",
)
def test_a_broken_document_is_refused_before_a_model_is_opened(run, tmp_path, monkeypatch, words, content):
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a model was opened")

    for place, name in (("train.prepare", "open_trainee"), ("models.load", "load"), ("models.load", "open_pipeline")):
        monkeypatch.setattr(f"mnemoscope.{place}.{name}", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "index").mkdir()
    for document in ("broken.json", "index/manifest.json"):
        (tmp_path / document).write_text(content)
    code, out, err = run(*words)
    said = [line for line in err.splitlines() if line.startswith("mnemoscope: ")]
    assert (code, out, len(said)) == (2, "", 1), (out, err)
    assert ("index" if "--reference" in words else "broken.json") in said[0]
    assert not (tmp_path / "run" / "run.json").exists()
