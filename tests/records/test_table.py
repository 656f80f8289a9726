"""From rows to prompts."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.records.schema import Row, Score
from mnemoscope.records.table import prompt_scores

# Machines that run tests are busy at times; what is tested is never how fast.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def row(prompt: str, seed: int, steps: list[float], **changes: object) -> Row:
    score = Score(value=sum(steps) / len(steps), space="eps", per_step=steps)
    facts = {"id": f"{prompt}/{seed}", "prompt_id": prompt, "prompt": prompt, "seed": seed, "status": "ok"}
    return Row.model_validate(facts | {"scores": {"magnitude": score}} | changes)


def test_scores_are_means_over_seeds_and_window() -> None:
    rows = [row("b", 1, [3.0, 5.0]), row("a", 0, [10.0, 20.0]), row("b", 0, [1.0, 2.0], group="g", label=True)]
    b, a = prompt_scores(rows, "magnitude")
    assert (b.prompt, b.score, b.values, b.seeds, b.space) == ("b", 2.75, (1.5, 4.0), (0, 1), "eps")
    assert (a.prompt, a.score, a.values) == ("a", 15.0, (15.0,))
    assert prompt_scores(rows, "magnitude", window=(0, 1))[0].values == (1.0, 3.0)
    assert prompt_scores(rows, "magnitude", window=(1, 2))[0].values == (2.0, 5.0)
    assert {p.prompt: p.values for p in prompt_scores(rows, "magnitude", n=1)} == {"a": (15.0,), "b": (1.5,)}


@patient
@given(st.permutations(range(6)))
def test_the_order_of_rows_does_not_matter(order: list[int]) -> None:
    rows = [row(p, s, [0.1 * s, 0.7]) for p in "ab" for s in range(3)]
    expected = {p.prompt_id: p for p in prompt_scores(rows, "magnitude")}
    assert {p.prompt_id: p for p in prompt_scores([rows[i] for i in order], "magnitude")} == expected


def test_failed_rows_are_left_out() -> None:
    rows = [
        row("a", 0, [1.0]),
        row("a", 1, [9.0], status="error", scores={}),
        row("b", 0, [9.0], status="error", scores={}),
    ]
    assert [(p.prompt, p.seeds) for p in prompt_scores(rows, "magnitude")] == [("a", (0,))]
    assert prompt_scores([], "magnitude") == []


def test_what_was_not_run_is_refused() -> None:
    rows = [row("a", 0, [1.0])]
    with pytest.raises(UnknownName, match=r"no score in this run named 'magnitud'\. Did you mean 'magnitude'\?"):
        prompt_scores(rows, "magnitud")
    with pytest.raises(UsageError, match=r"window \(0, 2\) needs 2 steps and magnitude kept 1"):
        prompt_scores(rows, "magnitude", window=(0, 2))
    with pytest.raises(UsageError, match="empty"):
        prompt_scores(rows, "magnitude", window=(1, 1))
