"""Small float64 worlds, and what the tests of the closed-form models ask of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mnemoscope.models.closed_form import ClosedForm
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.sampling import denoise

SMALL = (2, 2, 3)
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
PROMPTS = ["the mona lisa", "a cat", ""]


def small_gaussian(**options: Any) -> Gaussian:
    return Gaussian.world(["a cat"], ["the mona lisa"], latent_shape=SMALL, **DOUBLE, **options)


def template(**options: Any) -> Gaussian:
    """A third of the elements come out alike every time."""
    spread = torch.tensor([0.0, 0.3, 0.7]).expand(SMALL)
    return Gaussian({"the mona lisa": (0.4, spread)}, latent_shape=SMALL, **DOUBLE, **options)


def small_mixture(**options: Any) -> Mixture:
    return Mixture.world(["a cat"], ["the mona lisa"], components=3, rare=0.1, latent_shape=SMALL, **DOUBLE, **options)


WORLDS = {
    "gaussian": small_gaussian,
    "gaussian-flow": lambda: small_gaussian(space="velocity"),
    "gaussian-v": lambda: small_gaussian(v_prediction=True),
    "template": template,
    "mixture": small_mixture,
    "mixture-flow": lambda: small_mixture(space="velocity"),
}


def times(world: ClosedForm) -> list[Tensor]:
    """From almost pure noise to little."""
    return [torch.tensor(t) for t in ((0.98, 0.5, 0.1) if world.space == "velocity" else (981, 500, 100))]


def noised(world: ClosedForm, prompts: list[str], t: Tensor) -> Tensor:
    """x_t of exact samples x₀ of the prompts."""
    generator = torch.Generator().manual_seed(0)
    x0 = world.draw(world.encode(prompts), generator)
    alpha, sigma = world.alpha_sigma(t)
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)


def sample(world: ClosedForm, noise: Tensor, cond: Any, null: Any = None, **options: Any) -> Tensor:
    """The final state."""
    *_, last = denoise(world, noise, cond, null, **options)
    assert last.x_next is not None
    return last.x_next


def rms(a: Tensor, b: Tensor | float = 0.0) -> float:
    return float((a - b).square().mean().sqrt())
