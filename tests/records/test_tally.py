"""A run is as far as its rows are, whatever status its manifest states; rows that are not its own make it none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemoscope.errors import RunError
from mnemoscope.records.schema import Manifest, Nearest, Row, Score
from mnemoscope.records.store import Run, Writer, sample_id
from mnemoscope.records.tally import Count, Tally

SETTING = {"guidance": 7.5, "detectors": {"magnitude": {}}}
SEEDS = 4


def row(prompt: int, seed: int, **changes: Any) -> Row:
    text = f"prompt {prompt}"
    near = Nearest(reference="1", similarity=0.5, descriptor="pixels", threshold=0.9, copy_found=False)
    facts = {
        "id": sample_id(text, seed, SETTING),
        "prompt_id": f"p{prompt}",
        "prompt": text,
        "seed": seed,
        "status": "ok",
        "scores": {"magnitude": Score(value=1.0, space="eps")},
        "nearest": near,
    }
    return Row(**(facts | changes))


def rows(prompts: int = 6) -> list[Row]:
    return [row(p, s) for p in range(prompts) for s in range(SEEDS)]


def manifest(**changes: Any) -> Manifest:
    config = {"seeds": SEEDS, "prompts": {"items": 6}, "reference": {"name": "pixels", "threshold": 0.9}}
    return Manifest(**({"status": "done", "asked": 24, "setting": SETTING, "config": config} | changes))


def tallied(some: list[Row], stated: Manifest) -> Tally:
    count = Count(stated)
    for one in some:
        count.take(one)
    return count.tally()


def near(**changes: Any) -> dict[str, Any]:
    facts = {"reference": "1", "similarity": 0.5, "descriptor": "pixels", "threshold": 0.9, "copy_found": False}
    return {"nearest": Nearest(**(facts | changes))}


def test_a_run_that_is_there_is_done() -> None:
    tally = tallied(rows(), manifest())
    assert (tally.status, tally.complete, tally.faults, tally.notes) == ("done", True, (), [])
    assert tally.words == "24 of 24 samples are there"


@pytest.mark.parametrize("status", ["running", "incomplete", "interrupted"])
def test_a_status_that_claims_less_is_left(status: str) -> None:
    assert tallied(rows(), manifest(status=status)).status == status


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda some: some[:20], "20 of 24 samples are there"),
        (lambda some: [], "0 of 24 samples are there"),
        (
            lambda some: [*some[:23], row(5, 3, status="error", error="x", scores={}, nearest=None)],
            "24 of 24 samples are there",
        ),
        (lambda some: [*some[:23], row(5, 3, scores={})], "24 of 24 samples are there"),
    ],
)
def test_what_is_missing_failed_or_unscored_is_not_done(change: Callable[..., Any], words: str) -> None:
    tally = tallied(change(rows()), manifest())
    assert (tally.status, tally.complete, tally.faults, tally.words) == ("incomplete", False, (), words)


STRANGE = [
    (lambda some: [*some[:-1], some[-1].model_copy(update={"prompt": "another"})], "1 of 24 rows have an id that is not what"),
    (lambda some: [*some[:-1], some[-1].model_copy(update={"id": "0" * 20})], "1 of 24 rows have an id that is not what"),
    (lambda some: [*some[:-1], row(5, 4)], "1 of 24 rows have a seed that was not asked for (seeds are 0 to 3)"),
    (lambda some: [*some, some[0]], "1 of 25 rows are of samples that stand there before"),
    (lambda some: [*some, *(row(6, s) for s in range(4))], "run.json states 24 samples, and 7 prompts with 4 seeds each are 28"),
    (lambda some: [row(0, 0, status="error", error="x"), *some[1:]], "1 of 24 rows failed, and have a result all the same"),
    (lambda some: [row(0, 0, **near(similarity=0.95)), *some[1:]], "1 of 24 rows call a copy, or none, against their own"),
    (lambda some: [row(0, 0, **near(copy_found=True)), *some[1:]], "1 of 24 rows call a copy, or none, against their own"),
    (lambda some: [row(0, 0, **near(copy_found=None)), *some[1:]], "1 of 24 rows call a copy, or none, against their own"),
    (lambda some: [row(0, 0, **near(threshold=1e9)), *some[1:]], "judged by another threshold of copies than the run's (0.9)"),
    (lambda some: [row(0, 0, **near(template_found=True)), *some[1:]], "1 of 24 rows call a copy, or none, against their own"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), STRANGE)
def test_rows_that_are_not_the_runs_own_are_counted_and_said(change: Callable[..., Any], sentence: str) -> None:
    tally = tallied(change(rows()), manifest())
    assert (tally.status, tally.complete) == ("incomplete", False)
    assert any(sentence in fault for fault in tally.faults), tally.faults


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"asked": 20}, "run.json states 20 samples, and 6 prompts with 4 seeds each are 24"),
        ({"asked": 0}, "run.json states 0 samples, and 6 prompts with 4 seeds each are 24"),
        ({"asked": 23}, "run.json states 23 samples, which is no multiple of its 4 seeds"),
        ({"asked": 100}, "run.json states 100 samples, and 6 prompts with 4 seeds each are at most 24"),
        ({"asked": 4, "config": {}}, "24 samples are there, and run.json states 4"),
    ],
)
def test_what_is_asked_is_held_against_prompts_and_seeds(changes: dict[str, Any], sentence: str) -> None:
    tally = tallied(rows(), manifest(**changes))
    assert not tally.complete
    assert any(sentence in fault for fault in tally.faults), tally.faults
    assert tally.asked >= 24


def test_controls_make_further_prompts() -> None:
    config = manifest().config | {"controls": ["case-fold"]}
    assert tallied(rows(9), manifest(asked=36, config=config)).faults == ()


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({}, 0),
        ({"seconds": 3.0}, 0),
        ({"scores": {"magnitude": Score(value=1.0001, space="eps")}}, 0),
        ({"scores": {"magnitude": Score(value=1.1, space="eps")}}, 1),
        ({"scores": {}}, 1),
        (near(similarity=0.95, copy_found=True), 1),
        ({"status": "error", "error": "x", "scores": {}, "nearest": None}, 0),
    ],
)
def test_samples_that_stand_there_twice_say_the_same(tmp_path: Path, changes: dict[str, Any], differing: int) -> None:
    run = Run.open(tmp_path / "run", manifest())
    with Writer(run) as out:
        out.append([*rows(), row(0, 0, **changes)])
    tally = run.tally()
    assert (len(tally.faults), tally.complete) == (differing, not differing)
    assert not differing or tally.faults[0].startswith(
        "1 sample has several rows with a result, and their values differ"
    )


# What a manifest and a row may hold

WHOLES = [-1, 1.5, "24", True, None, 2**63, 10**400, [], {}]


@pytest.mark.parametrize("value", WHOLES)
@pytest.mark.parametrize("key", ["asked", "forwards"])
def test_counts_of_a_manifest_are_counts(tmp_path: Path, key: str, value: Any) -> None:
    run = Run.open(tmp_path / "run", manifest())
    file = run.folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(RunError, match="restore it, or start over") as caught:
        Run(run.folder)
    assert len(str(caught.value)) < 400
    assert value == 10**400 or value == 2**63 or key in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": {"seeds": 0}}, "config.seeds is 0, and must be a whole number of 1 or more"),
        ({"config": {"seeds": True}}, "config.seeds is True"),
        ({"config": {"seeds": "4"}}, "config.seeds is '4'"),
        ({"config": {"prompts": []}}, "config.prompts is [], and must be a mapping"),
        ({"config": {"prompts": {"items": -1}}}, "config.prompts.items is -1"),
        ({"config": {"reference": "x"}}, "config.reference is 'x', and must be a mapping"),
        ({"config": {"reference": {"threshold": "high"}}}, "config.reference.threshold is 'high'"),
        ({"config": {"controls": 3}}, "config.controls is 3, and must be a list"),
        ({"setting": {"detectors": 5}}, "setting.detectors is 5, and must be a mapping"),
        ({"setting": {"detectors": None}}, "setting.detectors is None, and must be a mapping"),
        ({"setting": {"detectors": {"m": {"options": None}}}}, "setting.detectors.'m'.options is None"),
        ({"setting": {"detectors": {"magnitude": 5}}}, "setting.detectors.'magnitude' is 5, and must be a mapping"),
        ({"setting": {"target": 5}}, "setting.target is 5, and must be a mapping"),
        ({"doses": {"a": -1}}, "doses.a"),
        ({"config": {"seeds": "4" * 10_000}}, "…, and must be"),
    ],
)
def test_plain_values_of_a_manifest_are_of_their_kind(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    run = Run.open(tmp_path / "run", manifest())
    file = run.folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(RunError) as caught:
        Run(run.folder)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("seed", "forwards", "tokens_dropped") for value in WHOLES]
    + [("seconds", value) for value in (-1, "1", True, [])]
    + [("label", value) for value in (0, "no", [])]
    + [
        ("nearest", {"reference": "1", "similarity": 0.5, "descriptor": "d", "copy_found": value})
        for value in (0, "no")
    ]
    + [("nearest", {"reference": "1", "similarity": value, "descriptor": "d"}) for value in ("0.5", True, None)]
    + [("scores", {"magnitude": {"space": "eps", "value": value}}) for value in ("1", True, None)]
    + [("scores", {"magnitude": {"space": "eps", "value": 1, "per_step": [value]}}) for value in ("1", True, None)],
)
def test_a_row_holds_what_it_should_or_is_named(tmp_path: Path, key: str, value: Any) -> None:
    run = Run.open(tmp_path / "run", manifest())
    line = row(0, 0).model_dump(mode="json", exclude_none=True) | {key: value}
    (run.folder / "samples.jsonl").write_text(json.dumps(line) + "\n" + rows()[1].model_dump_json() + "\n")
    with pytest.raises(RunError, match=r"line 1 of .* is damaged"):
        list(run.rows())
