"""Thumbnails as a descriptor, and reference sets: identities, properties, calibration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.errors import UsageError
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.similarity.reference import ReferenceSet


def pictures(n, size=32, seed=0):
    """Smooth random pictures in [0, 1]."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


def test_a_picture_is_like_itself_and_unlike_its_negative():
    x = pictures(3)
    d = Pixels()(x)
    assert torch.allclose((d * d).sum(1), torch.ones(3))
    assert torch.allclose((d * Pixels()(1 - x)).sum(1), -torch.ones(3), atol=1e-5)


def test_a_plain_card_has_no_descriptor():
    assert Pixels()(torch.full((1, 3, 32, 32), 0.3)).norm() < 1e-3


@given(st.floats(0.2, 1), st.floats(-0.1, 0.1))
def test_brightness_and_contrast_do_not_matter(scale, shift):
    x = pictures(2)
    assert torch.allclose(Pixels()(x), Pixels()(scale * x + shift), atol=1e-4)


def test_sizes_need_not_agree():
    x = pictures(2, size=64)
    small = torch.nn.functional.avg_pool2d(x, 2)
    assert torch.allclose(Pixels()(x), Pixels()(small), atol=1e-5)


def test_too_small_pictures_get_a_sentence():
    with pytest.raises(UsageError, match=r"pixels-16 needs pictures of at least 16 px; got \(8, 8\)"):
        Pixels()(torch.rand(1, 3, 8, 8))


def test_nearest_finds_the_copy():
    x = pictures(20)
    reference = ReferenceSet.of([f"#{i}" for i in range(20)], x, Pixels())
    noise = 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    matches = reference.nearest((x + noise)[5:8])
    assert [m.reference for m in matches] == ["#5", "#6", "#7"]
    assert all(m.copy_found is None and m.threshold is None for m in matches)
    threshold = reference.calibrate(pictures(200, seed=2), fmr=0.05)
    assert all(m.copy_found and m.similarity > threshold for m in reference.nearest(x + noise))
    assert reference.name == "pixels-16"
    assert len(reference) == 20


@pytest.mark.parametrize("fmr", [0.01, 0.05, 0.2])
def test_calibration_keeps_its_search_error(fmr):
    reference = ReferenceSet.of([str(i) for i in range(50)], pictures(50), Pixels())
    reference.calibrate(pictures(300, seed=3), fmr=fmr)
    assert sum(bool(m.copy_found) for m in reference.nearest(pictures(300, seed=3))) <= fmr * 300
    # Other different pictures of the same kind: within four standard errors of the stated rate.
    wrong = sum(bool(m.copy_found) for m in reference.nearest(pictures(600, seed=4)))
    assert abs(wrong / 600 - fmr) < 4 * (fmr * (1 - fmr) * (1 / 600 + 1 / 300)) ** 0.5


def test_ids_and_pictures_must_agree():
    with pytest.raises(UsageError, match="2 ids for 3 descriptors"):
        ReferenceSet.of(["a", "b"], pictures(3), Pixels())
