"""``mnemoscope pack``, ``verify`` and ``replay``: what they print, and their exit codes."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.run import audit
from mnemoscope.models import load as loading
from mnemoscope.records.store import Run
from mnemoscope.report.archive import sha256_of, write_sums

ASSETS = Path(__file__).parents[2] / "src" / "mnemoscope" / "demo" / "assets" / "text-to-image"


@pytest.fixture(scope="module", autouse=True)
def opened_once() -> Iterator[None]:
    """Opening the bundled model takes longer than asking it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", functools.cache(loading.load))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first-step audit of the bundled model."""
    folder = tmp_path_factory.mktemp("runs") / "v2"
    config = AuditConfig(model="demo", prompts=["a red apple", "oncoming police car"], seeds=2, out=str(folder))
    return audit(config, target=loading.load("demo"), command="mnemoscope audit demo").folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, "runs/v2"))


def edit_score(folder: Path, factor: float) -> str:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["scores"]["magnitude"]["value"] *= factor
    (folder / "samples.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    return row["id"]


def test_pack_prints_the_file_and_the_digest_that_verify_prints(run, folder: Path) -> None:
    code, out, err = run("pack", folder)
    assert code == 0, err
    path, digest = out.split("\n")[:2]
    assert path == "runs/v2.packet.zip"
    assert re.fullmatch(r"digest [0-9a-f]{64}", digest)
    code, out, err = run("verify", path)
    assert (code, out.splitlines()[-1]) == (0, digest)
    assert "v2.packet.zip is sound" in out
    assert "Checked: 4 rows" in err
    assert "Not compared: scores, similarities and pictures with the model" in err
    assert run("verify", path, "--digest", digest.split()[1])[0] == 0
    code, out, _ = run("verify", path, "--digest", "0" * 64)
    assert code == 1
    assert out.startswith("fault: its digest is")


def test_json_on_stdout(run, folder: Path) -> None:
    packed = json.loads(run("pack", folder, "--out", "p.zip", "--no-images", "--json")[1])
    assert packed["counts"]["ok"] == 4
    code, out, _ = run("verify", "p.zip", "--json")
    found = json.loads(out)
    assert (code, found["sound"], found["digest"]) == (0, True, packed["digest"])


def test_a_changed_packet_is_exit_1_with_a_line_for_each_fault(run, folder: Path) -> None:
    run("pack", folder, "--out", "p.zip")
    with zipfile.ZipFile("p.zip") as old, zipfile.ZipFile("q.zip", "w") as new:
        for name in old.namelist():
            new.writestr(
                name, old.read(name).replace(b"a red apple", b"a red\\u0007plum") + b"\n" * (name == "README.txt")
            )
    code, out, _ = run("verify", "q.zip")
    assert code == 1
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    assert "fault: samples.jsonl was changed: its SHA-256 is not the one listed" in faults
    assert any("README.txt" in fault for fault in faults)
    assert any("rows are not what their prompts" in fault for fault in faults)
    assert "\x07" not in out
    assert run("replay", "q.zip")[0] == 2


def test_a_packet_of_another_version_that_says_other_numbers_is_exit_3(run, folder: Path) -> None:
    run("pack", folder, "--out", "p.zip")
    with zipfile.ZipFile("p.zip") as old:
        contents = {name: old.read(name) for name in old.namelist()}
    statement = json.loads(contents["packet.json"])
    statement["made_with"]["mnemoscope"] = "0.0.9"
    statement["headline"] = "0 of 4 samples are above any threshold."
    contents["packet.json"] = json.dumps(statement).encode()
    contents["SHA256SUMS"] = write_sums(
        {name: sha256_of([data]) for name, data in contents.items() if name != "SHA256SUMS"}
    )
    with zipfile.ZipFile("q.zip", "w") as new:
        for name, data in contents.items():
            new.writestr(name, data)
    code, out, err = run("verify", "q.zip")
    assert code == 3
    assert out.startswith("q.zip cannot be judged, which is no pass: the sentences of packet.json")
    assert "Cannot be judged: the sentences of packet.json" in err
    assert "Not compared: " in err
    code, out, _ = run("verify", "q.zip", "--json")
    assert (code, json.loads(out)["sound"], json.loads(out)["exit_code"]) == (3, False, 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pack", "nowhere"], "nowhere holds no run"),
        (["pack"], "Missing argument"),
        (["verify", "nowhere.zip"], "nowhere.zip does not exist"),
        (["verify", "runs/v2"], "runs/v2 is a folder; name a file"),
        (["replay", "nowhere"], "nowhere holds no run"),
        (["replay", "runs/v2/run.json"], "is no whole zip archive"),
        (["replay", "runs/v2", "p9"], "'p9' is no sample and no prompt"),
        (["replay", "runs/v2", "--sample", "0"], "--sample"),
        (["replay", "runs/v2", "--model", "nowhere/model"], "nowhere/model"),
        (["replay", "runs/v2", "--tolerance", "7"], "must be a relative difference"),
        (["replay", "runs/v2", "--dtype", "float64"], 'dtype: was "float32", now "float64"'),
    ],
)
def test_a_wrong_command_is_exit_2(run, folder: Path, words: list[str], sentence: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


def test_a_run_that_is_not_done_is_packed_with_a_note(run, folder: Path) -> None:
    Run(folder).update(status="interrupted")
    code, _, err = run("pack", folder)
    assert code == 0
    assert "Note: the run is interrupted (4 of 4 samples are there), and the packet says so." in err
    code, _, err = run("verify", "runs/v2.packet.zip")
    assert code == 0
    assert "the run is interrupted" in err


def test_replay_of_a_folder_and_of_its_packet(run, folder: Path) -> None:
    run("pack", folder)
    for what in (folder, "runs/v2.packet.zip"):
        code, out, err = run("replay", what, "--sample", 3, "--batch-size", 1, "--out", "found.json")
        assert code == 0, err
        lines = out.splitlines()
        assert lines[0] == "result\tcall\tsample\tseed\tprompt\tlargest difference"
        assert lines[-1].startswith(f"3 samples of {Path(what).name} replayed: ")
        assert "rounding of a score in float32" in err
        assert "replay: 3/3 samples" in err
        assert json.loads(Path("found.json").read_text(encoding="utf-8"))["exit_code"] == 0
    assert not (folder / "found.json").exists()


def test_replay_of_an_edited_score(run, folder: Path) -> None:
    edited = edit_score(folder, 1.01)
    code, out, _ = run("replay", folder, "--all", "--json")
    found = json.loads(out)
    assert (code, found["exit_code"]) == (1, 1)
    assert [row["id"] for row in found["rows"] if row["outcome"] == "differs"] == [edited]
    code, out, _ = run("replay", folder, edited)
    assert code == 1
    assert f"differs\t–\t{edited}\t0\ta red apple\tmagnitude: 0.0099" in out
    assert run("replay", folder, edited, "--tolerance", 0.02)[0] == 0


def test_replay_with_a_model_that_lies_elsewhere(run, folder: Path) -> None:
    assert run("replay", folder, "--model", ASSETS, "--sample", 1)[0] == 0
    Run(folder).update(config=Run(folder).manifest.config | {"model": None})
    code, _, err = run("replay", folder)
    assert code == 2
    assert (
        "was made with a model in memory. A record does not choose what is opened here: name the model yourself" in err
    )


def test_another_model_can_be_accepted(run, folder: Path) -> None:
    code, out, err = run("replay", folder, "--dtype", "float64", "--accept-model", "--sample", 2)
    assert code == 0
    assert out.rstrip().endswith("with another model than the recorded one.")
    assert "another model was accepted: target.dtype" in err


@pytest.mark.parametrize("command", ["pack", "verify", "replay"])
def test_help_starts_with_a_command_that_runs(run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: mnemoscope {command} runs/demo" in out


def test_help_needs_no_torch() -> None:
    code = """
import sys
sys.argv = ["mnemoscope", "replay", "--help"]
from mnemoscope.cli.main import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
