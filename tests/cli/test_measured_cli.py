"""Reports of measured pictures on the command line, and audits that measure pictures, on the bundled model with the least of budgets."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from PIL import Image

from mnemoscope.demo.world import World


@pytest.fixture(scope="module")
def row():
    return World().of("planted", copies=48)[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, row):
    folder = tmp_path_factory.mktemp("pictures")
    picture = World().pictures([row.picture])[0]
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / "a.png")
    (folder / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": row.caption}), encoding="utf-8")
    return folder


@pytest.fixture
def config(tmp_path, pictures, row):
    """An audit of one prompt and one picture; the budget is a few updates, so that the picture is not reached."""
    file = tmp_path / "audit.yaml"
    preset = {"name": "improved", "updates": 3, "steps": 4, "scales": [3.0]}
    file.write_text(yaml.safe_dump({"model": "demo", "prompts": [row.caption], "seeds": 1, "measure_preset": preset}))
    return [
        "--config",
        file,
        "--measure",
        pictures / "a.png",
        "--captions",
        pictures / "captions.jsonl",
        "--out",
        tmp_path / "run",
    ]


def test_a_measurement_ends_with_its_report(run, tmp_path, pictures):
    out = tmp_path / "out"
    words = ["measure", "demo", pictures / "a.png", "--updates", 3, "--steps", 4, "--scales", "3", "--out", out]
    code, _, err = run(*words)
    assert code == 0
    assert f"Report: {out / 'report.html'}" in err
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "1 picture measured on demo" in html
    assert "mnemoscope measure demo" in html
    assert html.count("data:image/webp") == 5
    for kind in ("html", "markdown", "json"):
        code, printed, _ = run("report", out, "--format", kind, "--out", tmp_path / f"again.{kind}")
        assert code == 0
        assert printed.strip() == str(tmp_path / f"again.{kind}")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html
    assert json.loads((tmp_path / "again.json").read_text())["pictures"][0]["status"] == "censored"


def test_measured_pictures_are_reported_alone(run, tmp_path, pictures):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "measure.json").write_text("{")
    code, _, err = run("report", tmp_path / "a", tmp_path / "b")
    assert code == 2
    assert "holds measured pictures, which have a report of their own; name it alone." in err
    code, _, err = run("report", tmp_path / "a")
    assert code == 2
    assert re.fullmatch(
        r"mnemoscope: .*measure\.json cannot be read .*; restore it, or delete it, and repeat the command\.\n", err
    )
    (tmp_path / "levels.json").write_text("{}")
    code, _, err = run("report", pictures, "--levels", tmp_path / "levels.json")
    assert code == 2
    assert "--levels are scores of measured pictures" in err


def test_an_audit_with_pictures(run, tmp_path, config):
    code, out, err = run("audit", *config, "--dry-run")
    assert code == 0
    assert re.search(r"# 1 pictures to measure: at most [\d,]+ forwards \(F\) and [\d,]+ backward passes \(B\)", out)
    assert not (tmp_path / "run").exists()
    code, out, err = run("audit", *config)
    assert code == 0
    assert f"Pictures: {tmp_path / 'run' / 'measures' / 'report.html'}" in out
    assert "1/1" in err
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "1 of 1 captions were audited" in html
    code, _, again = run("audit", *config)
    assert code == 0
    assert "not reproduced" not in again  # it is kept


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["other/model", "--measure", "a.png"], "only the bundled model has a calibrated similarity"),
        (["demo", "--measure", "nowhere"], "nowhere does not exist"),
        (["demo", "--captions", "c.jsonl"], "captions are those of pictures to measure"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(run, tmp_path, words, says):
    (tmp_path / "p.txt").write_text("a cat\n")
    code, _, err = run("audit", *words, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "run")
    assert code == 2
    assert says in err
    assert not (tmp_path / "run").exists()
