"""Maps against formulas, attention that leaves the picture alone, and overlays that can be read without seeing them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mnemoscope.detect.magnitude import magnitude
from mnemoscope.errors import CannotAudit, ModelFault, UnknownName, UsageError
from mnemoscope.explain.overlay import CIVIDIS, colors, describe, overlay
from mnemoscope.explain.regions import (
    Regions,
    curvature_difference,
    jacobian_diagonal,
    regions,
    score_difference,
)
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.sampling import denoise

SHAPE = (3, 8, 8)
DOUBLE = {"dtype": torch.float64}


def template(**options):
    """Its left half comes out alike every time; the right half is as free as it is without the prompt."""
    spread = torch.full(SHAPE, 0.5)
    spread[:, :, :4] = 0
    mean = torch.zeros(SHAPE)
    mean[:, :, :4] = 0.5
    return Gaussian({"a card": (mean, spread)}, null=(0.0, 0.5), latent_shape=SHAPE, **DOUBLE, **options)


def test_the_map_sums_to_the_squared_magnitude():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, *SHAPE, generator=generator)
    torch.testing.assert_close(score_difference(a, b).sum((1, 2)), magnitude(a, b).square())


@pytest.mark.parametrize("kind", ["score", "curvature"])
@pytest.mark.parametrize("space", ["eps", "velocity"])
def test_the_fixed_part_of_a_template_lights_up(kind, space):
    found = regions(template(space=space), "a card", kind, seeds=2, at=10, steps=20, guidance=2.0)
    fixed, free = found.maps[:, :, :4], found.maps[:, :, 4:]
    assert float(fixed.mean()) > 0
    assert float(free.abs().max()) < 1e-6 * float(fixed.mean())


def test_the_last_step_is_the_default_and_several_are_averaged():
    world = template()
    steps = list(denoise(world, world.noise([0]), world.encode(["a card"]), world.encode([""]), steps=8))
    maps = [score_difference(s.cond, s.uncond).float() for s in steps]
    torch.testing.assert_close(regions(world, "a card", "score", steps=8).maps, maps[-1])
    torch.testing.assert_close(regions(world, "a card", "score", steps=8, at=range(8)).maps, torch.stack(maps).mean(0))
    torch.testing.assert_close(regions(world, "a card", "score", steps=8).images, world.decode(steps[-1].x_next))


@pytest.mark.parametrize("space", ["eps", "velocity"])
def test_curvature_is_the_hessians_diagonal(space):
    """The Hessian of a Gaussian is diagonal, where one probe is exact."""
    world = Gaussian.tiny(space=space, **DOUBLE)
    t = world.schedule(10).timesteps[6]
    x, cond, null = world.noise([0, 1]), world.encode(["a cat", "the mona lisa"]), world.encode([""])
    probes = torch.randn(1, *x.shape, generator=torch.Generator().manual_seed(1), **DOUBLE).sign()
    found = curvature_difference(world, x, t, cond, null, probes)
    exact = world.hessian_diagonal(x, t, null.expand(2)) - world.hessian_diagonal(x, t, cond)
    torch.testing.assert_close(found, exact.sum(1), rtol=1e-9, atol=1e-9)


def test_hutchinson_is_unbiased_where_the_jacobian_is_full():
    """A mixture's Hessian is not diagonal; the mean over many probes comes close, and closer than few do."""
    world = Mixture.tiny(rare=0.2, **DOUBLE)
    t = torch.tensor(300)
    x, cond = 0.5 * world.noise([0]), world.encode(["a cat"])
    sigma = world.alpha_sigma(t)[1]
    exact = -sigma * world.hessian_diagonal(x, t, cond)
    generator = torch.Generator().manual_seed(0)

    def error(probes):
        v = torch.randn(probes, *x.shape, generator=generator, **DOUBLE).sign()
        return float((jacobian_diagonal(world, x, t, cond, v) - exact).norm() / exact.norm())

    many = error(512)
    assert many < 0.1
    assert many < error(4) or error(4) < 1e-9


def test_work_is_counted(target_of):
    target = target_of("sd")
    for kind, more, backwards in (("score", 0, 0), ("curvature", 2 * 2, 2 * 2 * 3), ("attention", 2, 0)):
        found = regions(target, "a cat", kind, seeds=2, steps=4, probes=3)
        assert (found.forwards, found.backwards) == (2 * 2 * 4 + more, backwards)


def test_one_seed_is_the_first_of_two(target_of):
    for kind in ("score", "curvature", "attention"):
        one, two = (regions(target_of("sd"), "a cat", kind, seeds=n, steps=4) for n in (1, 2))
        torch.testing.assert_close(one.maps[0], two.maps[0], rtol=1e-3, atol=1e-5)


def test_grad_mode_is_left_as_found(target_of):
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            regions(target_of("sd"), "a cat", "curvature", steps=2)
            assert torch.is_grad_enabled() is mode


def test_one_sentence_for_each_mistake(target_of, build_pipe, adapt):
    with pytest.raises(CannotAudit, match="no cross-attention"):
        regions(template(), "a card", "attention")
    with pytest.raises(CannotAudit, match="no prompt pulls"):
        regions(target_of("pixel"), "a card")
    with pytest.raises(UnknownName, match="Did you mean 'score'"):
        regions(template(), "a card", "scores")
    with pytest.raises(UsageError, match="the last is 3"):
        regions(template(), "a card", at=4, steps=4)
    with pytest.raises(UsageError, match="seeds is 0, and must be a whole number from 1"):
        regions(template(), "a card", seeds=0)
    broken = adapt(build_pipe("sd"))
    broken.unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(ModelFault, match="NaN"):
        regions(broken, "a cat", steps=2)


# Overlays.


def drawn(**changes):
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 3], maps[1, 2, 1] = 2.0, 1.0
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Regions(**{
        "prompt": 'a "card" <b>', "kind": "score", "maps": maps, "images": images, "seeds": (0, 5), "at": (49,), "forwards": 0,
        "backwards": 0, **changes,
    })  # fmt: skip


def test_lightness_grows_along_the_bar():
    """What makes it readable in gray and with any color vision."""
    shown = colors(np.linspace(0, 1, 50)) / 255
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()
    assert np.array_equal(colors(np.array([-1.0, 2.0])), CIVIDIS[[0, -1]])


def test_the_overlay_is_a_webp_with_words():
    made = overlay(drawn())
    picture = Image.open(io.BytesIO(made.webp))
    assert (picture.format, picture.size) == ("WEBP", (made.width, made.height))
    assert "seed 0: strongest at the top right" in made.alt
    assert "seed 5: strongest at the middle left" in made.alt or "seed 5: strongest at the bottom left" in made.alt
    assert "step 50" in made.alt
    element = made.html()
    assert element.startswith('<img src="data:image/webp;base64,')
    assert "a &quot;card&quot; &lt;b&gt;" in element or "&lt;b&gt;" in element
    assert "<b>" not in element


def test_the_bar_runs_from_dark_to_light():
    made = overlay(drawn())
    pixels = np.asarray(Image.open(io.BytesIO(made.webp)).convert("RGB")).astype(int)
    column = 2 * (192 + 8) + 7  # two pictures with their gaps, half a bar
    assert np.abs(pixels[2, column] - CIVIDIS[-1]).max() < 24
    assert np.abs(pixels[-3, column] - CIVIDIS[0]).max() < 24


def test_the_brightest_place_is_where_the_map_is_largest():
    made = overlay(drawn(images=torch.full((2, 3, 16, 16), 0.5)))
    pixels = np.asarray(Image.open(io.BytesIO(made.webp)).convert("RGB")).astype(int)
    below = pixels[192 + 8 :, :192]
    yellow = below[..., 0] - below[..., 2]
    row, column = np.unravel_index(int(yellow.argmax()), yellow.shape)
    assert row < 64
    assert column > 128


def test_several_steps_and_an_empty_map_have_words():
    said = describe(drawn(at=(0, 1, 2), maps=torch.zeros(2, 4, 4)))
    assert "at 3 steps" in said
    assert "0 to 0" in said
    overlay(drawn(maps=torch.zeros(2, 4, 4)))


def test_regions_show_themselves():
    assert drawn()._repr_html_().startswith("<img")
    assert "2 seeds" in repr(drawn())
    assert json.dumps(drawn().at)
    assert drawn().upsampled().shape == (2, 16, 16)
