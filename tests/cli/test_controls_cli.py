"""Controls and detectors that compare pictures, from the command line."""

import json

import pytest

from mnemoscope.records.store import Run


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt": "An Old Clock", "label": True, "caption2": "a timepiece"},
        {"prompt": "a river", "label": False},
        {"prompt": "seven lamps", "label": True, "caption2": "lights"},
        {"prompt": "Wet Paint", "label": False},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_controls_become_rows_and_a_table(run, prompts, official_wen, tmp_path):
    words = ["audit", official_wen / "model", "--prompts", prompts, "--seeds", 1, "--swap-column", "caption2"]
    words += ["--controls", "case-fold,swap", "--controls", "matched", "--out", "runs/a"]
    code, out, err = run(*words, "--dry-run")
    assert code == 0, err
    assert "8 prompts × 1 seeds" in out
    code, out, err = run(*words)
    assert code == 0, err
    assert "magnitude, against other captions of the same pictures: AUC " in out
    assert "magnitude, against ordinary prompts of like text score: not measured; there is no text score" in out
    made = Run(tmp_path / "runs/a")
    assert made.manifest.config["controls"] == ["case-fold", "swap", "matched"]
    assert [r.prompt for r in made.rows() if r.control] == ["an old clock", "wet paint", "a timepiece", "lights"]
    assert "under controls" in (tmp_path / "runs/a/report.html").read_text(encoding="utf-8")


def test_unknown_controls_get_help(run, prompts):
    code, _, err = run("audit", "demo", "--prompts", prompts, "--controls", "swop")
    assert code == 2
    assert "no control named 'swop'. Did you mean 'swap'?" in err


def test_density_is_a_detector_like_others(run, prompts, official_wen, tmp_path):
    code, out, _ = run("ls", "detectors", "--json")
    found = {d["name"]: d for d in json.loads(out)}
    assert code == 0
    assert found["density"]["needs"] == "pictures, 2 seeds or more"
    assert found["density"]["costs"] == "no forwards beyond those of the pictures"
    words = ["audit", official_wen / "model", "--prompts", prompts, "--detectors", "density", "--steps", 2]
    code, _, err = run(*words, "--seeds", 2, "--out", "runs/b")
    assert code == 2
    assert "none are made; set images to true (--images)" in err
    code, out, err = run(*words, "--seeds", 2, "--images", "--out", "runs/b", "--json")
    assert code == 0, err
    assert json.loads(out)["detector"] == "density"
    assert {r.scores["density"].generations for r in Run(tmp_path / "runs/b").rows()} == {2}
