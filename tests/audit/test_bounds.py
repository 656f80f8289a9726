"""Every number of a configuration, of a policy and of an installed method has a bound; plans of many seeds are counted, not listed."""

import inspect
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from mnemoscope import plugins
from mnemoscope.audit.config import AuditConfig, MeasureSpec
from mnemoscope.audit.plan import plan
from mnemoscope.bounds import SEEDS, STEPS, Bound, bounds_of, seed_numbers, within
from mnemoscope.errors import UsageError
from mnemoscope.report.policy import Requires, Rule
from mnemoscope.train.config import TrainConfig

BAD = [True, float("nan"), float("inf"), float("-inf"), 10**400, 10**18, -(10**18), "", "1e400", [], {}]
"""Values that no setting takes for a number."""

BASES: dict[type[BaseModel], dict[str, object]] = {
    AuditConfig: {},
    MeasureSpec: {},
    TrainConfig: {"model": "demo", "data": "pictures", "out": "out", "canaries": {1: 1}},
    Requires: {},
    Rule: {"name": "x", "metric": "copies.share"},
}


def bounds_in(kind: object) -> list[Bound]:
    """Bounds anywhere in an annotation."""
    own = [part for part in getattr(kind, "__metadata__", ()) if isinstance(part, Bound)]
    return own + [found for part in typing.get_args(kind) for found in bounds_in(part)]


def leaves(kind: object) -> set[object]:
    parts = typing.get_args(kind)
    return {leaf for part in parts for leaf in leaves(part)} if parts else {kind}


NUMBERS = [
    pytest.param(model, name, id=f"{model.__name__}.{name}")
    for model in BASES
    for name, kind in typing.get_type_hints(model, include_extras=True).items()
    if name in model.model_fields and leaves(kind) & {int, float}
]


@pytest.mark.parametrize(("model", "name"), NUMBERS)
def test_every_number_of_a_configuration_has_a_bound_and_keeps_to_it(model, name):
    (bound, *_) = bounds_in(typing.get_type_hints(model, include_extras=True)[name]) or [None]
    assert bound is not None, f"annotate {name} with a bound"
    beyond = [bound.low if bound.above else bound.low - 1, bound.high if bound.below else bound.high + 1]
    for value in [*BAD, *beyond, *([1.5] if bound.whole else [])]:
        if (model, name, value) in LEGAL:
            continue
        with pytest.raises((UsageError, ValueError)):
            model(**BASES[model] | {name: value})


LEGAL = [(TrainConfig, "canaries", {}), (TrainConfig, "seed", 10**18), (AuditConfig, "base_seed", 10**18)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seeds": True}, "seeds is True, and must be a whole number from 1 to 100,000,000."),
        ({"max_errors": True}, "max_errors is True, and must be a count such as 20, or a share below 1 such as 0.05."),
        ({"batch_size": 10**18}, "batch_size is 1000000000000000000, and must be 'auto' or a whole number from 1 to 1,000,000,000."),
        ({"measure_preset": {"beta": float("nan")}}, "measure_preset.beta is nan, and must be a similarity above -1 and at most 1."),
        ({"measure_preset": {"beta": 7}}, "measure_preset.beta is 7, and must be a similarity above -1 and at most 1."),
        (
            {"measure_preset": {"scales": [1, float("nan")]}},
            "measure_preset.scales is nan, and must be a list of guidance scales, each a number from 1 to 1000.",
        ),
    ],
)  # fmt: skip
def test_a_sentence_has_the_setting_the_value_and_the_range(given, says):
    with pytest.raises(UsageError) as e:
        AuditConfig(**given)
    assert str(e.value) == says


METHODS = [
    pytest.param(kind, name, option, id=f"{kind} {name} {option}")
    for kind in ("detector", "mitigation", "measure", "descriptor")
    for name, entry in plugins.installed(kind).items()
    for option, parameter in inspect.signature(entry.load()).parameters.items()
    if {"int", "float"} & set(str(parameter.annotation).replace("|", " ").split())
    and (name, option)
    != ("magnitude", "steps")  # a number or a window: judged by the method itself, as the next test says
]


@pytest.mark.parametrize(("kind", "name", "option"), METHODS)
def test_every_number_of_a_method_has_a_bound_and_keeps_to_it(kind, name, option):
    make = plugins.find(kind, name)
    assert option in bounds_of(make), f"hold {option} against a bound: @within({option}=…)"
    for value in ["1", "nan", True, float("nan"), float("inf"), 10**400, 10**18, -(10**18), [], ""]:
        with pytest.raises(UsageError, match=f"{option} of the {kind} {name} is .*, and must be "):
            plugins.build(kind, name, {option: value})
        with pytest.raises(UsageError, match=f"{option} is .*, and must be "):
            make(**{option: value})


@pytest.mark.parametrize(
    "steps", [True, 1.5, float("nan"), 10**18, "10", (0, float("nan")), (True, 3), (0, 10**18), (1, 2, 3), []]
)
def test_a_window_is_made_of_whole_numbers(steps):
    with pytest.raises(UsageError, match=r"must be a whole number|does not take"):
        plugins.build("detector", "magnitude", {"steps": steps})


def test_arguments_are_held_against_their_bounds_by_name_and_by_place():
    @within(steps=STEPS, seeds=SEEDS)
    def draw(steps: int, *, seeds: int | None = None) -> tuple[int, int | None]:
        return steps, seeds

    assert draw(50.0, seeds=None) == (50, None)
    for call in (lambda: draw(0), lambda: draw(steps=True), lambda: draw(1, seeds=0), lambda: draw(None)):
        with pytest.raises(UsageError, match="must be a whole number from 1 to"):
            call()
    assert seed_numbers(3) == (0, 1, 2)
    assert seed_numbers([7, 9]) == (7, 9)
    for seeds in (True, 0, 10**9, [-1], [True], [0, 10**19]):
        with pytest.raises(UsageError):
            seed_numbers(seeds)


@pytest.mark.parametrize("shard", [None, "1/4"])
def test_a_plan_of_many_seeds_is_counted_and_not_listed(tmp_path: Path, monkeypatch, shard):
    monkeypatch.setattr("mnemoscope.audit.request.Sample", lambda *_: pytest.fail("listed"))
    (tmp_path / "p.txt").write_text("a red apple\na cat\n")
    cost = plan(AuditConfig(model="demo", prompts=str(tmp_path / "p.txt"), seeds=10_000_000, shard=shard))
    assert (cost.prompts, cost.seeds, cost.samples) == (2, 10_000_000, 20_000_000 // (4 if shard else 1))
    assert cost.forwards > cost.samples
