"""The bundled world keeps its promises: what later results are judged against must not drift."""

import hashlib
from collections import Counter

import pytest
import torch

from mnemoscope import load
from mnemoscope.audit.controls import text_baseline
from mnemoscope.demo.run import group_name, mix
from mnemoscope.demo.world import COPY_FMR, World
from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.models.noising import denoising_loss


@pytest.fixture(scope="module")
def world():
    return World()


def test_planted_levels(world):
    assert len(world.levels) >= 4
    for level in world.levels:
        rows = world.of("planted", copies=level)
        assert len({r.caption for r in rows}) == len({r.picture for r in rows}) == len(rows) >= 24


def test_repeated_pictures_are_at_most_a_tenth_of_all_draws(world):
    assert all(r.draws == r.copies for r in world.of("planted", "recaptioned", "template"))
    repeated = sum(r.draws for r in world.rows if r.copies)
    assert 0 < repeated <= 0.1 * sum(r.draws for r in world.rows)


def test_groups_do_not_leak_into_each_other(world):
    concepts = {g: {r.concept for r in world.of(g)} for g in ("planted", "recaptioned", "heldout", "ordinary")}
    names = list(concepts)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not concepts[a] & concepts[b], (a, b)
    shown = {r.picture for r in world.trained}
    assert not shown & {r.picture for r in world.of("heldout", "twin")}
    # Captions tell nothing either: each belongs to one concept.
    assert all(
        len({r.concept for r in world.rows if r.caption == c}) == 1
        for c in {r.caption for r in world.of("planted", "heldout")}
    )


def test_ordinary_captions_have_two_pictures(world):
    assert set(Counter(r.caption for r in world.of("ordinary")).values()) == {2}


def test_template_families(world):
    families = Counter(r.family for r in world.of("template"))
    assert len(families) >= 16
    assert min(families.values()) >= 6
    composed = [f for f in families if "card with" in f]
    assert all(sum(not r.copies for r in world.of("template") if r.family == f) == 1 for f in composed)


def test_composed_families_share_their_layout(world):
    family = next(r.family for r in world.of("template") if "card with" in r.family)
    pictures = world.pictures(r.picture for r in world.of("template") if r.family == family)
    fixed = (pictures == pictures[0]).all(0).all(0)
    assert 0.5 < fixed.float().mean() < 0.9


def test_recaptioned_pictures_have_several_captions(world):
    captions = Counter(r.picture for r in world.of("recaptioned"))
    assert len(captions) >= 20
    assert set(captions.values()) == {4}
    assert len({r.caption for r in world.of("recaptioned")}) == len(world.of("recaptioned"))


@pytest.mark.parametrize("other", ["ordinary", "heldout"])
def test_wording_alone_cannot_tell_planted_captions_apart(world, other):
    planted, rest = world.captions("planted"), world.captions(other)
    prompts = [r.caption for r in planted + rest]
    found = text_baseline(prompts, [True] * len(planted) + [False] * len(rest), resamples=1)
    assert abs(found.ngrams.auc.value - 0.5) <= 0.1
    assert abs(found.capitals.auc.value - 0.5) <= 0.1


def test_pictures_are_those_of_the_manifest(world):
    rows = list({r.picture: r for r in world.rows}.values())
    pictures = (world.pictures(r.picture for r in rows) * 255).round().byte().permute(0, 2, 3, 1)
    for row, picture in zip(rows, pictures, strict=True):
        assert hashlib.sha256(picture.contiguous().numpy().tobytes()).hexdigest() == row.sha256, row.id


def test_every_row_names_its_source_and_license(world):
    allowed = {"emoji-datasource-google@16.0.0": "Apache-2.0", "@lobehub/fluent-emoji-3d@1.1.0": "MIT"}
    assert all(allowed[r.source] == r.license for r in world.rows)


def test_the_copy_threshold_is_a_five_percent_search_error(world):
    others = world.pictures(dict.fromkeys(r.picture for r in world.of("heldout", "twin")))
    wrong = sum(m.copy_found for m in world.reference.nearest(others))
    assert 0 < wrong <= COPY_FMR * len(others)
    planted = [r.picture for r in world.of("planted")]
    blurred = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(world.pictures(planted), 2), scale_factor=2.0
    )
    matches = world.reference.nearest(blurred)
    assert [m.reference for m in matches] == planted
    assert all(m.copy_found for m in matches)


def test_unconditional_world_has_five_levels_of_its_own():
    world = World("unconditional")
    assert len(world.levels) == 5
    assert all(len(world.of("planted", copies=c)) >= 12 for c in world.levels)
    repeated = sum(r.draws for r in world.rows if r.copies)
    assert repeated <= 0.1 * sum(r.draws for r in world.rows)
    assert world.levels[0] == 1  # drawn no more often than an epoch is long
    assert set(world.shown) < set(World().shown)


def test_the_demonstration_mixes_all_groups(world):
    names = Counter(group_name(r) for r in mix(world))
    assert {"ordinary", "heldout", "recaptioned", "template", "template, never shown"} < set(names)
    assert sum(n for name, n in names.items() if name.startswith("planted")) == 5 * len(world.levels)


def test_bad_names_get_a_sentence(world):
    with pytest.raises(UnknownName, match="Did you mean 'planted'"):
        world.of("plantd")
    with pytest.raises(UsageError, match="has no picture"):
        world.pictures(["nothing"])
    with pytest.raises(UnknownName, match="bundled model"):
        World("video")


def test_controls_are_built_in(world):
    found = world.controls()
    captions, templates = found["captions"], found["templates"]
    assert len({c["prompt"] for c in captions}) == len({c["id"] for c in captions}) == len(captions)
    planted = [c for c in captions if c["label"]]
    assert {c["group"] for c in planted} == {"planted × 24", "planted × 48"}
    assert len(planted) == 48
    # No prompt that the bundled thresholds were made from.
    made_from = {r.caption for r in world.captions("ordinary")[::2]}
    assert not made_from & {c["prompt"] for c in captions}
    assert len(captions) - 48 == len(world.captions("ordinary")) // 2 + len(world.captions("heldout"))
    assert all(len(labels) == 2 for labels in _labels_by_family(templates).values())
    assert sum(not t["label"] for t in templates) == 12


def _labels_by_family(templates):
    found = {}
    for t in templates:
        found.setdefault(t["family"], set()).add(t["label"])
    return found


@pytest.mark.parametrize("levels", [(48,), (24, 48), (2, 4, 10, 24, 48)])
def test_swapped_captions_name_the_picture_and_are_no_captions(world, levels):
    planted = [c for c in world.controls(levels)["captions"] if c["label"]]
    words = [Counter(w for c in planted for w in c[k].replace(",", "").split()) for k in ("prompt", "swap")]
    assert words[0] == words[1]
    swaps = [c["swap"] for c in planted]
    assert len(set(swaps)) == len(swaps)
    assert not set(swaps) & {r.caption for r in world.rows}
    assert all(c["swap"].split(", ")[0] == c["prompt"].split(", ")[0] for c in planted)


def test_controls_of_no_level(world):
    with pytest.raises(UsageError, match="the levels are"):
        world.controls((3,))


def test_the_fixed_part_of_a_composed_family_is_everything_outside_the_slot(world):
    family = next(r.family for r in world.of("template") if "card with" in r.family)
    fixed = world.fixed_part(family)
    a, b = world.pictures([r.picture for r in world.of("template") if r.family == family][:2])
    assert (a - b)[:, fixed].abs().max() <= 2.5 / 255
    free = (~fixed).nonzero()
    low, high = free.amin(0), free.amax(0)
    assert ((high - low) < 32).all()  # inside one slot
    assert 0.1 < 1 - fixed.float().mean() < 0.25
    with pytest.raises(UnknownName, match="template family"):
        world.fixed_part("no such family")


def test_ordinary_words_are_words_of_ordinary_captions(world):
    said = " ".join(r.caption for r in world.of("ordinary"))
    assert len(world.ordinary_words) > 500
    assert all(w.islower() and w in said for w in world.ordinary_words)


def test_the_model_without_text_holds_what_it_was_shown_most():
    """Its error on the pictures of each level, at a noise through which a layout can just be seen."""
    world, target = World("unconditional"), load("demo-unconditional")
    errors = {}
    for level in world.levels:
        x0 = target.encode_images(world.pictures([r.picture for r in world.of("planted", copies=level)]))
        eps, t = target.noise([0]).expand_as(x0), torch.full((len(x0),), 600)
        errors[level] = float(denoising_loss(target, x0, t, eps, None).mean())
    assert errors[320] < 0.6 * errors[1]
    assert errors[320] < errors[80] < errors[1]
