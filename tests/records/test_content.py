"""Records of strangers hold counts, shares and finite numbers that fit each other, or are refused in one sentence with the key."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemoscope import stats
from mnemoscope.errors import MnemoscopeError, RunError
from mnemoscope.mitigate.canaries import CanaryPlan
from mnemoscope.mitigate.timesteps import TimestepThresholds
from mnemoscope.records.canaries import read_history
from mnemoscope.records.measures import Measures
from mnemoscope.records.trials import Attack, Case, Cell, Trial, parse_sizes
from mnemoscope.records.wording import capitals_and_digits
from mnemoscope.report.discrimination import Baseline
from mnemoscope.report.regions import read_regions
from mnemoscope.similarity.reading import open_source
from mnemoscope.train.data import Picture, TrainingSet
from mnemoscope.train.repeats import read_repeats

PROMPTS = [f"Title {i}" for i in range(4)] + [f"a plain caption {i}" for i in range(4)]
LABELS = [True] * 4 + [False] * 4
SCORES = [0.9, 0.8, 0.2, 0.7, 0.1, 0.3, 0.6, 0.4]


def cell(method: str, strength: float | None) -> Cell:
    return Cell(
        method, {}, strength, similarity=[0.9, 0.2], copied=[True, False], template=[False, False], fidelity=[0.3, 0.2],
        change=[0.0, 0.1], sizes={"1": [3.0, 1.0]}, frechet=None, seconds=0.1, forwards=16.0, backwards=0.0, peak=None,
    )  # fmt: skip


def controls() -> dict[str, Any]:
    separated = asdict(stats.separation(SCORES, LABELS, resamples=20))
    capitals = asdict(stats.separation(capitals_and_digits(PROMPTS), LABELS, resamples=20))
    row = {
        "detector": "magnitude",
        "control": "overall",
        "positives": 4,
        "negatives": 4,
        "auc": separated["auc"],
        "note": "",
    }
    return {
        "prompts": PROMPTS, "scores": SCORES, "clusters": list(range(8)), "ngrams": separated, "capitals": capitals, "reason": "",
        "table": [row],
    }  # fmt: skip


def trial() -> dict[str, Any]:
    attack = Attack("none", {}, None, before=[True], after=[True], controls=[False, False], size=[2.0])
    made = Trial(
        "tiny", [Case("a", "a", "planted", "a", "a"), Case("b", "b", "ordinary", "b")], 1, 8, 7.5, {"1": [1.0] * 99}, "pixels",
        "words", ["ordinary"], [cell("none", None), cell("prompt", 1.0)], [attack],
    )  # fmt: skip
    return asdict(made)


def request() -> dict[str, Any]:
    return {
        "target": {"name": "tiny"}, "preset": {"name": "improved", "scales": [1.0]}, "descriptor": {"descriptor": "fingerprint"},
        "beta": 0.85, "asked": ["a"], "levels": {"4": [0.1, None]}, "guidance": 3.0,
    }  # fmt: skip


def entry() -> dict[str, Any]:
    result = {
        "preset": "improved", "passed": True, "score": 0.1, "nats": 70.0, "paid": 0.1, "similarity": 0.91, "prompt": "given",
        "scale": 3.0, "update": 150, "succeeded": [31, 32], "rate": [0.97, 0.84, 1.0], "at_least": 0.012, "forwards": 40, "backwards": 24,
        "curve": [[50, 0.09, 1.0, 0.02, 0.3]],
    }  # fmt: skip
    return {"id": "a", "image": "a.png", "result": result, "companions": {"loss": 0.1}}


def pictures_of(folder: Path) -> TrainingSet:
    """A training set of three pictures, which nobody opens."""
    (folder / "a.png").touch()
    return TrainingSet(open_source(folder), tuple(Picture(name, (name,), "0" * 64) for name in "abc"))


def of_repeats(folder: Path, content: Any) -> Any:
    data = pictures_of(folder)
    if isinstance(content, dict) and content.get("data") == "these":
        content = content | {"data": data.digest()}
    (folder / "duplicates.json").write_text(json.dumps(content))
    return read_repeats(folder / "duplicates.json", data)


def of_controls(folder: Path, content: Any) -> Any:
    try:
        return Baseline.parse(json.dumps(content).encode())
    except ValueError as e:
        raise RunError(f"controls.json: {e}") from None


def of_measures(folder: Path, content: Any, name: str) -> Any:
    (folder / "pictures").mkdir(exist_ok=True)
    documents = {"measure.json": request(), "pictures/a.json": entry()} | {name: content}
    for file, value in documents.items():
        (folder / file).write_text(json.dumps(value))
    return Measures.read(folder)


def of_file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, Any], Any]:
    def write_and_read(folder: Path, content: Any) -> Any:
        (folder / name).write_text(json.dumps(content) + "\n")
        return read(folder / name)

    return write_and_read


DOCUMENTS: dict[str, tuple[Callable[[], Any], Callable[[Path, Any], Any]]] = {
    "controls.json": (controls, of_controls),
    "trial.json": (trial, of_file("trial.json", Trial.load)),
    "measure.json": (request, lambda folder, content: of_measures(folder, content, "measure.json")),
    "a.json": (entry, lambda folder, content: of_measures(folder, content, "pictures/a.json")),
    "canaries.json": (
        lambda: {"rows": 9, "seed": 0, "canaries": [{"row": 4, "copies": 0}, {"row": 7, "copies": 5}]},
        of_file("canaries.json", CanaryPlan.load),
    ),
    "canary-history.jsonl": (
        lambda: {"step": 10, "generations": 2, "levels": [{"copies": 0, "n": 3, "magnitude": 1.5, "copied": 1, "screen": 0.2}]},
        of_file("canary-history.jsonl", read_history),
    ),
    "timesteps.json": (
        lambda: {
            "horizon": 1000.0, "drop": 0.05, "thresholds": [1.0, 2.0], "means": [0.5, 0.6], "spreads": [0.1, 0.1], "counts": [40, 40],
        },
        of_file("timesteps.json", TimestepThresholds.load),
    ),
    "duplicates.json": (
        lambda: {
            "data": "these", "descriptor": "pixels", "threshold": 0.9, "clusters": [{"kept": "a", "dropped": ["b"]}],
        },
        of_repeats,
    ),
    "regions.json": (
        lambda: {"a prompt": {"file": "images/x.webp", "alt": "words"}},
        of_file("regions.json", lambda path: read_regions(path.parent)),
    ),
}  # fmt: skip

WRONG: list[tuple[str, tuple[Any, ...], Any]] = [
    *[
        ("controls.json", ("ngrams", "auc", key), value)
        for key in ("value", "low", "high")
        for value in (1.5, -1, "0.5", True)
    ],
    ("controls.json", ("ngrams", "auc", "low"), 0.99),
    ("controls.json", ("ngrams", "fpr"), 0),
    ("controls.json", ("capitals", "tpr", "confidence"), 95),
    ("controls.json", ("clusters", 0), -1),
    ("controls.json", ("clusters",), [0]),
    ("controls.json", ("scores",), [0.5]),
    ("controls.json", ("scores", 0), "0.5"),
    ("controls.json", ("prompts", 0), PROMPTS[1]),
    ("controls.json", ("prompts",), "abc"),
    ("controls.json", ("table", 0, "positives"), -4),
    ("controls.json", ("table", 0, "auc", "value"), 7.0),
    ("controls.json", ("table",), 3),
    *[("trial.json", ("cells", 1, key), [0.5]) for key in ("similarity", "fidelity", "change")],
    ("trial.json", ("cells", 1, "similarity", 0), 3.0),
    ("trial.json", ("cells", 1, "copied", 0), "no"),
    ("trial.json", ("cells", 1, "copied"), [True]),
    ("trial.json", ("cells", 1, "sizes"), {"9": [1.0, 1.0]}),
    ("trial.json", ("cells", 1, "seconds"), -1),
    ("trial.json", ("cells", 1, "extra"), 1),
    ("trial.json", ("cells",), []),
    ("trial.json", ("cells", 0, "method"), "prompt"),
    ("trial.json", ("seeds",), 0),
    ("trial.json", ("seeds",), 2),
    ("trial.json", ("ordinary", "1", 0), -1.0),
    ("trial.json", ("attacks", 0, "after"), []),
    ("trial.json", ("attacks", 0, "controls", 0), 1),
    ("measure.json", ("beta",), "0.85"),
    ("measure.json", ("levels", "-4"), [0.1]),
    ("measure.json", ("levels", "4"), ["low"]),
    ("measure.json", ("guidance",), True),
    ("measure.json", ("preset", "scales"), "all"),
    *[
        ("a.json", ("result", key), value)
        for key in ("update", "forwards", "backwards")
        for value in (-1, 1.5, "3", True)
    ],
    *[("a.json", ("result", "rate"), value) for value in ([0.5, 0.6, 0.7], [1.5, 0.5, 2.0], [0.5, 0.4])],
    *[("a.json", ("result", "succeeded"), value) for value in ([33, 32], [-1, 32], [1.5, 32])],
    ("a.json", ("result", "at_least"), 1.5),
    ("a.json", ("result", "passed"), "yes"),
    ("a.json", ("result", "score"), "low"),
    ("a.json", ("companions", "loss"), True),
    ("canaries.json", ("rows",), 0),
    ("canaries.json", ("canaries", 0, "row"), -1),
    ("canaries.json", ("canaries", 0, "copies"), 1.5),
    ("canaries.json", ("canaries",), []),
    *[("canary-history.jsonl", (key,), value) for key in ("step", "generations") for value in (-1, "10", True)],
    ("canary-history.jsonl", ("levels", 0, "copied"), 4),
    ("canary-history.jsonl", ("levels", 0, "n"), 0),
    ("canary-history.jsonl", ("levels", 0, "magnitude"), -0.5),
    ("canary-history.jsonl", ("levels",), []),
    *[("timesteps.json", ("drop",), value) for value in (0, 1, 1.5, -0.1, "0.05")],
    *[("timesteps.json", ("horizon",), value) for value in (0, -1, "1000")],
    ("timesteps.json", ("spreads", 0), 0.0),
    ("timesteps.json", ("counts", 0), 3),
    ("timesteps.json", ("counts", 0), -40),
    ("timesteps.json", ("thresholds",), []),
    ("timesteps.json", ("thresholds",), [1.0]),
    ("timesteps.json", ("thresholds", 0), "1"),
    ("duplicates.json", ("threshold",), 7),
    ("duplicates.json", ("clusters", 0, "dropped"), []),
    ("duplicates.json", ("clusters", 0, "dropped"), ["z"]),
    ("duplicates.json", ("clusters", 0, "dropped"), ["a"]),
    ("duplicates.json", ("clusters",), {}),
    ("regions.json", ("a prompt", "file"), 3),
    ("regions.json", ("a prompt",), []),
]


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(content)
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_right_is_read(tmp_path: Path, name: str) -> None:
    make, read = DOCUMENTS[name]
    assert read(tmp_path, make())


@pytest.mark.parametrize(("name", "path", "value"), WRONG)
def test_what_is_wrong_is_named_with_file_and_key(tmp_path: Path, name: str, path: tuple[Any, ...], value: Any) -> None:
    make, read = DOCUMENTS[name]
    with pytest.raises(MnemoscopeError) as caught:
        read(tmp_path, changed(make(), path, value))
    sentence = str(caught.value)
    assert name in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500


@pytest.mark.parametrize("name", ["controls.json", "trial.json", "a.json", "timesteps.json", "duplicates.json"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_stands_there_it_is_read_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    make, read = DOCUMENTS[name]
    content = make()
    place, path = content, []
    while isinstance(place, (dict, list)) and place:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        path.append(data.draw(st.sampled_from(keys)))
        place = place[path[-1]]
        if data.draw(st.booleans()):
            break
    value = data.draw(st.sampled_from([None, True, -1, 1.5, 10**18, 1e300, "", "x" * 999, [], {}, [[]], {"a": 1}]))
    sentence = ""
    try:
        read(tmp_path_factory.mktemp("d"), changed(content, tuple(path), value))
    except MnemoscopeError as e:
        sentence = str(e)
    assert "\n" not in sentence
    assert len(sentence) < 1000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no steps"),
        ({"1": [1.0]}, "steps"),
        ({"1": [1.0], "5": [1.0, 2.0]}, "values"),
        ([], "dictionary"),
        ({"1": ["a"]}, "1.0"),
    ],
)
def test_magnitudes_of_ordinary_prompts_are_as_many(content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_sizes(content, {"1", "5"}, 1)
    assert parse_sizes({"1": [1.0], "5": [2.0]}, {"1", "5"}, 1) == {"1": [1.0], "5": [2.0]}
