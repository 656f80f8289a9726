"""Template copies: most of a picture returns, a part of it does not."""

import pytest
import torch

from mnemoscope import World
from mnemoscope.similarity.base import Match
from mnemoscope.similarity.layout import Layouts, covered, layout_similarity, quarters, with_layouts
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.similarity.reference import ReferenceSet


def busy(n, seed=0, size=64):
    """Pictures with something everywhere."""
    coarse = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=size, mode="nearest")


def with_detail(x, detail):
    """``x`` with another picture in its lower right quarter."""
    x = x.clone()
    x[..., 32:, 32:] = detail[..., 32:, 32:]
    return x


def test_what_stands_in_one_quarter_does_not_matter():
    x, other = busy(1), busy(1, seed=1)
    a, b = covered(x)[0], covered(with_detail(x, other))[0]
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[32:, 32:] = False
    assert torch.equal(a[3][:, outside], b[3][:, outside])
    assert layout_similarity(quarters(with_detail(x, other))[0], quarters(x))[0] > 0.95


def test_a_picture_has_its_own_layout():
    x = busy(3)
    for described in quarters(x):
        values = layout_similarity(described, quarters(x))
        assert values.max() == pytest.approx(1, abs=1e-5)
        assert (values > 0.99).sum() == 1


def test_a_reference_without_content_has_no_layout():
    plain = torch.full((1, 3, 64, 64), 0.5)
    assert layout_similarity(quarters(busy(1))[0], quarters(plain))[0] == 0


def test_families_of_the_bundled_world_share_theirs():
    """Members of a composed family differ in one slot; the world's ordinary pictures do not belong to it."""
    world = World()
    family = [r.picture for r in world.of("template") if r.family and r.family.startswith("teal striped card")]
    other = list(dict.fromkeys(r.picture for r in world.of("heldout")))[:40]
    described = quarters(world.pictures(family))
    inside = torch.stack(
        [layout_similarity(d, described[torch.arange(len(family)) != i]) for i, d in enumerate(described)]
    )
    outside = torch.stack([layout_similarity(d, quarters(world.pictures(other))) for d in described])
    assert inside.mean() > 0.85
    assert outside.max() < inside.median()


def match(name, copy):
    return Match(name, 0.9, "d", 0.8, copy)


def test_only_what_is_no_copy_can_be_a_template():
    some, found = [[match("a", True)], [match("a", False)], [match("a", None)]], [("b", 0.9)] * 3
    assert [m.template_found for m in with_layouts(some, found, 0.7)] == [False, True, None]
    assert [m.template_found for m in with_layouts(some, found, None)] == [None] * 3
    assert with_layouts(some[1:2], [None], 0.7) == [match("a", False)]


def test_references_are_looked_at_once():
    asked = []

    def thumbnail(name):
        asked.append(name)
        return None if name == "gone" else busy(1, seed=int(name))[0]

    layouts = Layouts(thumbnail)
    candidates = [[match("gone", None), match("1", None), match("2", None)]]
    assert layouts.best(busy(1, seed=2), candidates) == [("2", 1.0)]
    assert layouts.best(busy(1, seed=1), candidates) == [("1", 1.0)]
    assert asked == ["gone", "1", "2"]
    assert layouts.best(busy(1), [[match("gone", None)]]) == [None]


def test_a_reference_set_tells_copies_from_templates():
    x = busy(12)
    reference = ReferenceSet.of([str(i) for i in range(12)], x, Pixels())
    reference.calibrate(busy(200, seed=5), fmr=0.05)
    assert reference.layout_threshold is not None
    copy, template, other = reference.nearest(
        torch.cat([x[3:4], with_detail(x[4:5], busy(1, seed=7)), busy(1, seed=8)])
    )
    assert (copy.copy_found, copy.template_found) == (True, False)
    assert (template.layout_reference, template.template_found) == ("4", not template.copy_found)
    assert template.layout > 0.95
    assert not other.template_found
