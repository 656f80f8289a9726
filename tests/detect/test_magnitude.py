"""The magnitude: definition, identities, windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemoscope.detect.magnitude import Magnitude, magnitude, per_dimension
from mnemoscope.errors import UsageError
from mnemoscope.types import Step

SEEDS = st.integers(0, 2**31)


def pair(seed, n=3):
    return torch.randn(2, n, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def steps(values):
    """Steps whose magnitudes are ``values`` [step][sample]."""
    for i, row in enumerate(values):
        cond = torch.zeros(len(row), 1, 2, 2)
        cond[:, 0, 0, 0] = torch.tensor(row)
        zero = torch.zeros_like(cond)
        yield Step(i, 0.0, zero, cond, zero, zero)


def shown(values, **options):
    detector = Magnitude(**options)
    for step in steps(values):
        detector.update(step)
    return detector


def test_is_the_euclidean_norm_of_each_sample():
    cond = torch.zeros(2, 1, 2, 2)
    cond[0] = 3.0  # four elements
    cond[1, 0, 0] = torch.tensor([3.0, 4.0])
    assert magnitude(cond, torch.zeros_like(cond)).tolist() == [6.0, 5.0]


@given(SEEDS, st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_is_a_norm_of_the_difference(seed, scale):
    a, b = pair(seed)
    d = magnitude(a, b)
    assert (magnitude(a, a) == 0).all()
    torch.testing.assert_close(magnitude(b, a), d)
    torch.testing.assert_close(magnitude(scale * a, scale * b), scale * d, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(magnitude(a + b, b + b), d, rtol=1e-4, atol=1e-5)
    assert (magnitude(a, -b) <= magnitude(a, b) + 2 * magnitude(b, torch.zeros_like(b)) + 1e-4).all()


@given(SEEDS, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_joint_norm_is_root_n_times_the_rms(seed, n):
    a, b = pair(seed, n)
    torch.testing.assert_close((a - b).norm(), n**0.5 * magnitude(a, b).square().mean().sqrt())


def test_half_precision_is_subtracted_in_float32():
    """1.001 − 1 does not exist in bfloat16; of what does, no further digit may be lost."""
    a, b = (t.to(torch.bfloat16) for t in pair(0))
    d = magnitude(a, b)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, (a.double() - b.double()).flatten(1).norm(dim=1).float())


def test_latent_sizes_compare():
    assert per_dimension(torch.tensor(2.0), (4, 64, 64)) == 2.0
    assert per_dimension(torch.tensor(2.0), (8, 8, 8)) == pytest.approx(2 * (16384 / 512) ** 0.5)
    # Elements that differ by the same amount score alike at any size.
    small, large = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 64, 64)
    scores = [per_dimension(magnitude(x, 0 * x), x.shape[1:]) for x in (small, large)]
    torch.testing.assert_close(scores[0], scores[1])


VALUES = [[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [1, 10]),
        (2, [1.5, 15]),
        (3, [3, 30]),
        ((0, 2), [1.5, 15]),
        ((1, 3), [4, 40]),
        ([2, 3], [6, 60]),
        (50, [3, 30]),
    ],
)
def test_mean_over_a_window(window, expected):
    detector = shown(VALUES, steps=tuple(window) if isinstance(window, list) else window)
    assert detector.compute().tolist() == expected
    # Every step that was run is kept, whatever the window: curves need them, and other windows are slices.
    assert detector.per_step().tolist() == [list(column) for column in zip(*VALUES, strict=True)]


def test_any_later_window_is_a_slice_of_a_longer_run():
    per_step = shown(VALUES, steps=3).per_step()
    assert torch.equal(shown(VALUES, steps=(1, 3)).compute(), per_step[:, 1:3].mean(1))


def test_steps_beyond_the_window_are_let_pass():
    detector = shown(VALUES, steps=1)
    assert detector.compute().tolist() == [1, 10]
    with pytest.raises(UsageError, match="was shown step 0 after 3 steps"):
        detector.update(next(steps(VALUES)))


@pytest.mark.parametrize("window", [0, -1, (2, 2), (3, 1), (-1, 4)])
def test_empty_windows(window):
    with pytest.raises(UsageError, match=r"is an empty window; use 1 for the first step|must be a whole number from"):
        Magnitude(steps=window)


def test_window_that_was_not_reached():
    with pytest.raises(UsageError, match=r"window \(5, 9\) starts after the 3 steps that were run"):
        shown(VALUES, steps=(5, 9)).compute()
