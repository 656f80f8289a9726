"""One reader of ``thresholds.json``, wherever it stands: nothing in it is believed that can be recomputed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemoscope.cli.duplicates import _audited
from mnemoscope.cli.replay import _of_folder
from mnemoscope.detect.calibrate import Calibration
from mnemoscope.errors import MnemoscopeError
from mnemoscope.records.schema import Manifest, Row, Score
from mnemoscope.records.store import Run, Writer, sample_id
from mnemoscope.records.thresholds import parse_thresholds
from mnemoscope.report.audited import read_audited
from mnemoscope.report.html import write_report
from mnemoscope.report.packet import pack
from mnemoscope.report.summary import read_summary
from mnemoscope.web.reading import Library

SETTING = {"guidance": 7.5, "steps": 50, "target": {"dtype": "float32"}}
SOUND = json.loads(
    Calibration.fit(range(199), SETTING | {"seeds": 1}, detector="magnitude", fpr=0.05).record.model_dump_json()
)

WRONG: list[tuple[str, Any, str]] = [
    ("threshold", 1e9, "threshold is 1000000000.0, and 189.0 follows from its 199 scores"),
    ("threshold", "189", "threshold"),
    ("threshold", None, "threshold"),
    ("fpr", 1.5, "fpr"),
    ("fpr", 0, "fpr"),
    ("fpr", -0.05, "fpr"),
    ("fpr", True, "fpr"),
    ("fpr", 0.01, "threshold is 189.0, and 197.0 follows"),
    ("fpr", 1e-9, "scores: 199 ordinary scores cannot state"),
    ("confidence", 1.0, "confidence"),
    ("confidence", 0.5, "bound of interval is"),
    ("scores", [], "scores"),
    ("scores", [1.0], "scores: 1 ordinary scores cannot state"),
    ("scores", ["a"], "scores.0"),
    ("scores", [True] * 199, "scores.0"),
    ("scores", "1, 2, 3", "scores"),
    ("scores", {"0": 1.0}, "scores"),
    ("interval", [0.0, 1e9], "the lower bound of interval is 0.0"),
    ("interval", [None, None], "the lower bound of interval is None"),
    ("interval", [1.0], "interval"),
    ("interval", 3, "interval"),
    ("rounding", 0.9, "rounding is 0.9, and 0.000345"),
    ("rounding", -1.0, "rounding"),
    ("detector", "", "detector"),
    ("detector", "a" * 201, "detector"),
    ("detector", "a\x1b[2J", "detector"),
    ("detector", 3, "detector"),
    ("setting", [], "setting"),
    ("setting", {"seeds": 0}, "setting.seeds is 0"),
    ("setting", {"seeds": 1.5}, "setting.seeds is 1.5"),
    ("setting", {"steps": 10**12}, "setting.steps is 1000000000000"),
    ("setting", {"guidance": "high"}, "setting.guidance is 'high'"),
    ("setting", {"method": 4}, "setting.method is 4"),
    ("setting", {"target": {"resolution": [10**9, 64]}}, "setting.target.resolution is [1000000000, 64]"),
    ("setting", {"target": {"resolution": "64"}}, "setting.target.resolution is '64'"),
    ("format", 2, "it has format 2, not 1"),
    ("treshold", 1.0, "treshold"),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A complete run of two prompts, calibrated."""
    made = Run.open(tmp_path / "run", Manifest(status="done", asked=2, setting=SETTING, config={"seeds": 1}))
    score = {"magnitude": Score(value=1.0, space="eps")}
    with Writer(made) as out:
        out.append([
            Row(id=sample_id(p, 0, SETTING), prompt_id=p, prompt=p, seed=0, status="ok", scores=score) for p in "ab"
        ])  # fmt: skip
    (made.folder / "thresholds.json").write_text(json.dumps(SOUND))
    return made


PLACES: dict[str, Callable[[Path], Any]] = {
    "report": write_report,
    "summary": read_summary,
    "gate": lambda folder: read_audited([folder]),
    "pack": lambda folder: pack([folder]),
    "view": lambda folder: Library(folder).run(folder.name),
    "replay": _of_folder,
    "duplicates": lambda folder: _audited(folder, None),
    "calibration": Calibration.load,
    "file": lambda folder: Calibration.load(folder / "thresholds.json"),
}


@pytest.mark.parametrize("place", PLACES)
def test_sound_thresholds_are_read_everywhere(run: Run, place: str) -> None:
    PLACES[place](run.folder)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("key", "value"), [("threshold", 1e9), ("fpr", 1.5), ("interval", [0.0, 1e9])])
def test_what_does_not_follow_is_refused_everywhere(run: Run, place: str, key: str, value: Any) -> None:
    (run.folder / "thresholds.json").write_text(json.dumps(SOUND | {key: value}))
    with pytest.raises(MnemoscopeError) as caught:
        PLACES[place](run.folder)
    assert "thresholds.json" in str(caught.value)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value", "sentence"), WRONG)
def test_every_field_is_checked(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        parse_thresholds(json.dumps(SOUND | {key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["detector", "setting", "scores", "fpr", "threshold", "interval"])
def test_every_field_must_be_there(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        parse_thresholds(json.dumps({k: v for k, v in SOUND.items() if k != key}))


def test_files_of_earlier_versions_are_read() -> None:
    earlier = {k: v for k, v in SOUND.items() if k not in ("format", "rounding", "source", "confidence")}
    assert parse_thresholds(json.dumps(earlier)).threshold == SOUND["threshold"]


def test_thresholds_beside_the_first_are_checked_before_they_are_packed(run: Run) -> None:
    (run.folder / "thresholds-density.json").write_text(json.dumps(SOUND | {"threshold": 1e9}))
    with pytest.raises(MnemoscopeError, match=r"thresholds-density\.json: threshold is"):
        pack([run.folder])
    assert not run.folder.with_name("run.packet.zip").exists()


VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 0.5, 1e300, -(10**18), "", "x", [], {}, [[]], [None], {"a": 1}, "9" * 500]
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(sorted(SOUND)), VALUES, min_size=1, max_size=3))
def test_whatever_stands_there_the_threshold_follows_or_it_is_one_sentence(changes: dict[str, Any]) -> None:
    record, sentence = None, ""
    try:
        record = parse_thresholds(json.dumps(SOUND | changes))
    except ValueError as e:
        sentence = str(e)
    if record is None:
        assert sentence
        assert "\n" not in sentence
        assert len(sentence) < 400
    else:
        assert record.threshold == SOUND["threshold"]
        assert 0 < record.fpr < 1
