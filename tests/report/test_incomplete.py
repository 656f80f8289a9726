"""Twenty of twenty-four rows are twenty of twenty-four wherever a run is read, whatever its manifest states; so for strangers' rows."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mnemoscope.errors import RunError
from mnemoscope.records.schema import Manifest, Row, Score
from mnemoscope.records.store import Run, Writer, sample_id
from mnemoscope.report.audited import read_audited
from mnemoscope.report.gate import Material, judge
from mnemoscope.report.html import write_json, write_markdown, write_report
from mnemoscope.report.packet import pack
from mnemoscope.report.policy import Policy
from mnemoscope.report.summary import read_summary
from mnemoscope.report.verdict import Status
from mnemoscope.web.app import create_app
from mnemoscope.web.reading import Library

SETTING = {"guidance": 7.5, "detectors": {"magnitude": {}}}


def row(prompt: int, seed: int, **changes: Any) -> Row:
    text = f"prompt {prompt}"
    score = {"magnitude": Score(value=1.0, space="eps", per_step=[1.0])}
    head = {
        "id": sample_id(text, seed, SETTING),
        "prompt_id": f"p{prompt}",
        "prompt": text,
        "seed": seed,
        "status": "ok",
    }
    return Row(**(head | {"scores": score} | changes))


ROWS = [row(p, s) for p in range(6) for s in range(4)]


def write(folder: Path, rows: list[Row], **changes: Any) -> Path:
    facts = {"status": "done", "asked": 24, "setting": SETTING, "config": {"seeds": 4}, "target": {"name": "tiny"}}
    run = Run.open(folder, Manifest(**(facts | changes)))
    with Writer(run) as out:
        out.append(rows)
    return run.folder


def verdict(folder: Path, status: str = "done") -> Any:
    """Of a policy that no find can break."""
    rule = {"name": "few copies", "metric": "detect.magnitude.count", "max": 100}
    policy = Policy(version=1, requires={"status": status}, rules=[rule])
    return judge(policy, Material(read_audited([folder])), datetime.date(2026, 1, 1))


def view(folder: Path) -> str:
    with TestClient(create_app(folder), base_url="http://127.0.0.1") as client:
        return client.get(f"/run/{folder.name}").text


def packed(folder: Path) -> str:
    made = pack([folder], folder.with_suffix(".zip"))
    return "\n".join([made.status, *made.notes, json.dumps(made.counts)])


SAYS: dict[str, Callable[[Path], str]] = {
    "summary": lambda folder: "\n".join(read_summary(folder).untested),
    "report": lambda folder: write_report(folder).read_text(encoding="utf-8"),
    "markdown": lambda folder: write_markdown(folder).read_text(encoding="utf-8"),
    "json": lambda folder: write_json(folder).read_text(encoding="utf-8"),
    "pack": packed,
    "view": view,
}

STRANGE: dict[str, tuple[list[Row], dict[str, Any], str]] = {
    "missing": (ROWS[:20], {}, "20 of 24 samples are there"),
    "fewer asked": (ROWS[:23], {"asked": 20}, "23 of 24 samples are there"),
    "another id": ([*ROWS[:-1], ROWS[-1].model_copy(update={"id": "0" * 20})], {}, "23 of 24 samples are there"),
    "another seed": ([*ROWS[:-1], row(5, 9)], {}, "23 of 24 samples are there"),
    "failed": ([*ROWS[:-1], row(5, 3, status="error", error="x")], {}, "24 of 24 samples are there"),
}


@pytest.mark.parametrize("place", SAYS)
@pytest.mark.parametrize("kind", STRANGE)
def test_every_place_says_what_is_there(tmp_path: Path, place: str, kind: str) -> None:
    rows, changes, words = STRANGE[kind]
    said = SAYS[place](write(tmp_path / "run", rows, **changes))
    assert words in said
    assert "incomplete" in said


@pytest.mark.parametrize("place", SAYS)
def test_a_whole_run_is_called_done(tmp_path: Path, place: str) -> None:
    said = SAYS[place](write(tmp_path / "run", ROWS))
    assert "incomplete" not in said
    assert "contradicts itself" not in said


@pytest.mark.parametrize("kind", STRANGE)
def test_the_gate_passes_none_of_them(tmp_path: Path, kind: str) -> None:
    rows, changes, _ = STRANGE[kind]
    found = verdict(write(tmp_path / "run", rows, **changes))
    assert (found.status, found.exit_code) == (Status.ERROR, 3)
    assert "the run is incomplete with" in found.checks[0].sentence


def test_the_gate_passes_a_whole_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", ROWS)
    Path(folder / "thresholds.json").write_text(_thresholds())
    assert verdict(folder).exit_code == 0


def test_a_run_that_contradicts_itself_passes_no_gate_even_if_it_need_not_be_done(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", STRANGE["another id"][0])
    Path(folder / "thresholds.json").write_text(_thresholds())
    found = verdict(folder, "any")
    assert found.exit_code == 3
    assert any("contradicts itself: 1 of 24 rows have an id" in check.sentence for check in found.checks)


def _thresholds() -> str:
    from mnemoscope.detect.calibrate import Calibration

    scores, setting = [1 + i / 1000 for i in range(199)], {"guidance": 7.5, "seeds": 4}
    return Calibration.fit(scores, setting, detector="magnitude").record.model_dump_json()


def test_the_list_of_runs_counts_rows(tmp_path: Path) -> None:
    write(tmp_path / "all", ROWS)
    write(tmp_path / "some", ROWS[:20])
    library = Library(tmp_path)
    entries = library.count_rows(library.runs().entries)
    assert {e.name: e.status for e in entries} == {"all": "done", "some": "incomplete"}


@pytest.mark.parametrize("value", [1.5, 9.0])
def test_a_sample_with_two_values_is_said_and_not_packed(tmp_path: Path, value: float) -> None:
    other = row(0, 0, scores={"magnitude": Score(value=value, space="eps", per_step=[value])})
    folder = write(tmp_path / "run", [*ROWS, other])
    sentence = "1 sample has several rows with a result, and their values differ"
    assert any(sentence in said for said in read_summary(folder).untested)
    assert sentence in view(folder)
    assert verdict(folder).exit_code == 3
    with pytest.raises(RunError, match="several rows with a result are there for 1 of the samples"):
        pack([folder])


def test_a_merged_run_is_counted_anew(tmp_path: Path) -> None:
    parts = [Run(write(tmp_path / str(k), ROWS[k::2])) for k in range(2)]
    assert Run.merge(tmp_path / "all", parts).manifest.status == "done"
    few = [parts[0], Run(write(tmp_path / "few", ROWS[1:20:2]))]
    assert Run.merge(tmp_path / "some", few).manifest.status == "incomplete"
