"""``mnemoscope bench mitigations``, ``redteam`` and ``ls mitigations``: what a person types and reads."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mnemoscope.demo import mitigations
from mnemoscope.plugins import installed
from mnemoscope.records.trials import Trial


@pytest.fixture
def small(monkeypatch):
    """As few ordinary prompts as a gate at 1 % can do with."""
    monkeypatch.setattr(mitigations, "ORDINARY_SCORES", 100)
    monkeypatch.setattr(mitigations, "REAL", 20)


def test_bench_and_continue(run, small, tmp_path):
    words = ["bench", "mitigations", "--method", "delayed-guidance", "--seeds", 1, "--steps", 5, "--per-group", 1, "--attack-seeds", 0,
             "--out", tmp_path]  # fmt: skip
    code, out, err = run(*words)
    assert code == 0
    assert "planted × 48" in out
    assert "delayed-guidance 0.35" in out
    assert str(tmp_path / "trial.json") in err
    trial = Trial.load(tmp_path / "trial.json")
    assert [c.label for c in trial.cells][:2] == ["none", "delayed-guidance 0.05"]
    assert len(trial.cells[0].copied) == len(trial.cases) == 6
    code, again, _ = run(*words, "--json")
    assert code == 0
    assert json.loads(again)["cells"] == json.loads((tmp_path / "trial.json").read_text())["cells"]


def test_bench_says_what_is_wrong(run, tmp_path):
    code, _, err = run("bench", "mitigations", "--method", "delayed-guidence", "--out", tmp_path, "--seeds", 0)
    assert code == 2
    assert "'--seeds': it is '0', and must be a whole number from 1" in err


def test_a_misspelt_method(run, small, tmp_path):
    code, _, err = run(
        "bench",
        "mitigations",
        "--method",
        "delayed-guidence",
        "--seeds",
        1,
        "--steps",
        2,
        "--per-group",
        1,
        "--out",
        tmp_path,
    )
    assert code == 2
    assert "Did you mean 'delayed-guidance'?" in err


def test_redteam_on_the_bundled_world(run):
    code, out, _ = run(
        "redteam", "demo", "--mitigation", "none", "--seeds", 1, "--steps", 8, "--per-group", 2, "--json"
    )
    assert code == 0
    (found,) = json.loads(out)
    assert found["attacked"] == found["controls_attacked"] == 2
    assert 0 <= found["after"] <= 2


def test_redteam_on_pictures_of_ones_own(run, tmp_path):
    for i, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (90, 70), color).save(tmp_path / f"{i}.png")
    lines = [{"image": f"{i}.png", "caption": "a plain card", "control": i == 2} for i in range(3)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = ["redteam", "demo", "--pairs", pairs, "--seeds", 1, "--steps", 2]
    code, _, err = run(*words)
    assert code == 2
    assert "--copy-threshold" in err
    code, out, _ = run(*words, "--copy-threshold", 0.99)
    assert code == 0
    assert out.splitlines()[1].split("\t")[0] == "none"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "line 1: write"),
        ('{"image": "gone.png", "caption": "a"}', "gone.png does not exist"),
        ("", "no picture that was trained on"),
    ],
)
def test_bad_pairs(run, tmp_path, text, says):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(text, encoding="utf-8")
    code, _, err = run("redteam", "demo", "--pairs", pairs, "--copy-threshold", 0.9)
    assert code == 2
    assert says in err


def test_redteam_wants_pictures_of_other_models(run):
    code, _, err = run("redteam", "some/model")
    assert code == 2
    assert "--pairs" in err


def test_ls_names_what_each_changes(run):
    code, out, _ = run("ls", "mitigations")
    assert code == 0
    assert {line.split("\t")[0] for line in out.splitlines()[1:]} == set(installed("mitigation"))
