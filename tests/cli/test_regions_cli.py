"""Maps of a run's worst prompts, from the command to the report."""

import json
import re

import pytest

from mnemoscope.errors import RunError
from mnemoscope.report.regions import read_regions

PROMPT = "oncoming police car"


@pytest.fixture
def audited(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    words = ("audit", "demo", "--prompts", "prompts.txt", "--images", "--seeds", 2, "--steps", 4, "--out", "r")
    code, _, err = run(*words)
    assert code == 0, err
    return tmp_path / "r"


def test_the_report_shows_where_the_worst_prompts_pull(run, audited):
    code, out, err = run("regions", "r", "--kind", "score")
    assert code == 0, err
    file, alt = read_regions(audited)[PROMPT]
    assert (audited / file).read_bytes()[8:12] == b"WEBP"
    assert alt in out
    assert PROMPT in alt
    assert run("report", "r")[0] == 0
    page = (audited / "report.html").read_text()
    assert "where the prompt pulls" in page
    assert "strongest at the" in page


def test_another_model_is_refused(run, audited):
    manifest = json.loads((audited / "run.json").read_text())
    manifest["setting"]["target"]["dtype"] = "float64"
    (audited / "run.json").write_text(json.dumps(manifest))
    code, _, err = run("regions", "r")
    assert code == 2
    assert "is not the model of r" in err or "dtype" in err


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("", ""),
        ("[]", ""),
        ('{"a": 1}', "a"),
        ("{", ""),
        ('{"a": {"file": "images/x.webp"}}', "a.alt"),
        ('{"a": {"file": 3, "alt": ""}}', "a.file"),
    ],
)
def test_a_damaged_file_is_named_with_its_key(tmp_path, content, key):
    (tmp_path / "regions.json").write_text(content)
    with pytest.raises(RunError, match=rf"regions\.json cannot be read \({re.escape(key)}.*; delete it"):
        read_regions(tmp_path)


def test_without_a_file_there_are_no_maps(tmp_path):
    assert read_regions(tmp_path) == {}


def test_a_file_outside_the_run_is_not_shown(run, audited):
    (audited / "regions.json").write_text(json.dumps({PROMPT: {"file": "../prompts.txt", "alt": "words"}}))
    assert run("report", "r")[0] == 0
    assert "image lies outside the run folder" in (audited / "report.html").read_text()


def test_a_run_that_takes_no_maps_is_refused_before_its_model_is_opened(run, audited):
    (audited / "regions").write_text("no folder")
    code, out, err = run("regions", "r")
    assert (code, out) == (2, "")
    assert "regions" in err.splitlines()[-1]
    assert "Loading" not in err
