"""A secret that is handed to a command or to Python is in nothing that stays: records, reports, packets, logs."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

import pytest

from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.replay import config_of
from mnemoscope.audit.run import audit
from mnemoscope.cli.pairs import read_pairs
from mnemoscope.errors import UsageError
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.records.store import Run
from mnemoscope.report.html import write_report
from mnemoscope.report.packet import pack
from mnemoscope.train.config import TrainConfig

SECRET = "hf_THISISSECRET"
OPTIONS = {"token": SECRET, "proxies": {"https": f"http://me:{SECRET}@proxy:3128"}, "headers": {"X-Mine": SECRET}}


def holders(folder: Path) -> list[str]:
    """Files below a folder that hold the secret; archives are unpacked."""
    for file in list(folder.rglob("*.zip")):
        zipfile.ZipFile(file).extractall(file.with_suffix(""))
    return [
        str(p) for p in folder.rglob("*") if p.is_file() and (b"SISSECRET" in p.read_bytes() or "SISSECRET" in p.name)
    ]


def test_a_token_of_a_command_is_kept_nowhere(run, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red apple\n")
    options = ["--prompts", "p.txt", "--seeds", 1, "--steps", 2, "--out", "run"]
    with_token = ["--model-option", f"token={SECRET}", *options]
    for words in (with_token, ["--lora", f"https://me:{SECRET}@host/file.safetensors", *options], options):
        code, out, err = run("-vv", "audit", "demo", *words)
        assert code == (2 if "--lora" in words else 0)
        assert SECRET not in out + err + caplog.text
    record = json.loads(Path("run/run.json").read_text())
    assert record["config"]["model_options"] == {}  # the same run went on without a token
    for words in (["report", "run"], ["pack", "run", "--out", "run.zip"], ["audit", "demo", *with_token, "--dry-run"]):
        code, out, err = run("-v", *words)
        assert code == 0
        assert SECRET not in out + err
    assert "token: (not kept)" in out
    assert holders(tmp_path) == []
    code, out, err = run("-q", "audit", "demo", *with_token)
    assert json.loads(Path("run/run.json").read_text())["config"]["model_options"] == {"token": "(not kept)"}
    assert "token=(not kept)" in json.loads(Path("run/run.json").read_text())["command"]
    assert run("-q", "replay", "run", "--all")[0] == 0  # which hands no "(not kept)" to the loader
    assert holders(tmp_path) == []


@pytest.fixture
def unfiltered():
    """Logs as in Python, where no command filters all output."""
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    yield
    logging.setLogRecordFactory(factory)


class Failing(Gaussian):
    """A model whose errors quote what it was opened with."""

    def encode(self, prompts):
        if "fail" in prompts:
            raise ValueError(f"GET https://me:{SECRET}@host/?token={SECRET} failed with {SECRET}")
        return super().encode(prompts)


def test_secrets_that_python_hands_in_are_kept_nowhere(tmp_path, caplog, unfiltered):
    caplog.set_level(logging.DEBUG, "mnemoscope")
    world = Failing.world(["a cat", "fail"], [], latent_shape=(3, 4, 4))
    config = AuditConfig(
        model="small", model_options=OPTIONS, prompts=["a cat", "fail"], seeds=1, steps=2, out=str(tmp_path / "run"),
        detectors=[{"name": "magnitude", "as": "m"}], notes=[f"from https://me:{SECRET}@host"], max_errors=5,
    )  # fmt: skip
    made = audit(config, target=world, command=f"mnemoscope audit --model-option token={SECRET}")
    write_report(made.folder)
    pack([made.folder], tmp_path / "packet.zip")
    assert {row.status for row in made.rows()} == {"ok", "error"}
    assert holders(tmp_path) == []
    assert made.manifest.config["model_options"] == {
        "token": "(not kept)",
        "proxies": {"https": "http://(not kept)@proxy:3128"},
        "headers": {"X-Mine": "(not kept)"},
    }
    again = config_of(Run(made.folder).manifest)
    assert again.model_options == {}
    bare = config.model_copy(update={"model_options": {}})
    assert audit(bare, target=world).tally().ok == 1  # the same run goes on without
    assert SECRET not in caplog.text
    assert "me:" not in caplog.text


def test_a_training_is_the_same_with_another_token():
    known = {"model": "m", "data": "d", "out": "o"}
    config = TrainConfig(**known, model_options=OPTIONS | {"revision": "main"})
    assert config.identity() == TrainConfig(**known, model_options={"revision": "main"}).identity()


def test_what_a_record_has_in_the_place_of_a_secret_is_no_value():
    with pytest.raises(UsageError, match="--model-option token comes from a record, which keeps no secret"):
        read_pairs("--model-option", ["token=(not kept)"], "revision=main")
    with pytest.raises(UsageError, match="model_options come from a record"):
        AuditConfig(model_options={"proxies": {"https": "http://(not kept)@proxy"}})
