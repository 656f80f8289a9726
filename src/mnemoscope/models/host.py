"""What all diffusers models share: forward process, sampler, pictures, identity.

``stable_diffusion.py``, ``stable_diffusion_3.py`` and ``unconditional.py`` add what differs: the network's inputs and the autoencoder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import CannotAudit, UnknownName, UsageError
from ..types import Latents, Space, precise
from . import identity
from .base import Condition, Piece, noise_from_seeds
from .folders import computing

DETERMINISTIC = frozenset(
    {
        "DDIMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)
"""diffusers schedulers that draw no noise while sampling, with their default options."""

SAMPLERS = ("ddim", "own")
LONGEST_WINDOW = 4096
"""Tokens that a prompt may be filled up to where a text encoder states no number of places."""
LARGEST_SIDE = 8192
"""Pixels along a side that a model may be trained at."""
IMAGE_BATCH = 8
"""Pictures that pass through the autoencoder at a time: decoding takes far more memory per sample than denoising."""


@dataclass(frozen=True)
class Origin:
    """What a loader knows about a model and a pipeline object does not.

    Attributes:
        name: How to call the model in sentences and tables.
        source: Hub id or folder it was loaded from.
        revision: Branch, tag or commit that was asked for.
        files: Component → the weight files it was loaded from (see :func:`identity.files`).
        adapter_files: LoRA name → file.
        dtype_reason: Which precision, and why.
    """

    name: str = ""
    source: str = ""
    revision: str | None = None
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    adapter_files: Mapping[str, Path] = field(default_factory=dict)
    dtype_reason: str = ""


class Diffusion:
    """The forward process x_t = α_t x₀ + σ_t ε of a diffusers scheduler, and what a network trained on it predicts.

    α_t = √ᾱ_t and σ_t = √(1 − ᾱ_t) (Ho et al. 2020, *Denoising Diffusion Probabilistic Models*, eq. 4); v = α ε − σ x₀
    (Salimans & Ho 2022, *Progressive Distillation*, appendix D).
    """

    space: Space = "eps"

    def __init__(self, scheduler: Any, name: str = "the model"):
        self.prediction: str = scheduler.config.get("prediction_type", "epsilon")
        bar = getattr(scheduler, "alphas_cumprod", None)
        if bar is None or self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise CannotAudit(
                f"{name} has a {type(scheduler).__name__} with prediction type {self.prediction!r}: only discrete-time "
                f"models that predict epsilon, v_prediction or sample can be audited so far."
            )
        # ᾱ may end in exactly 0: models are trained on pure noise as well.
        _require_falling(bar, f"{name}'s {type(scheduler).__name__}", "ᾱ")
        self._alpha = bar.double().sqrt().float().cpu()
        self._sigma = (1 - bar.double()).sqrt().float().cpu()
        self.train_steps = len(bar)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t in the shape and on the device of ``t``, float32.

        Some samplers stop between two training timesteps; there σ/α is interpolated, as diffusers does.
        """
        alpha, sigma = self._alpha.to(t.device), self._sigma.to(t.device)
        if not t.is_floating_point():
            return alpha[t], sigma[t]
        low = t.floor().long().clamp(0, self.train_steps - 1)
        high = (low + 1).clamp(max=self.train_steps - 1)
        ratio = torch.lerp(sigma[low] / alpha[low], sigma[high] / alpha[high], (t - low).float())
        a = (1 + ratio**2).rsqrt()
        return a, ratio * a

    def to_eps(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The network's raw output at (x, t) as ε, float32 or better: ε = σ x + α v, or ε = (x − α x₀)/σ."""
        output, x = precise(output), precise(x)
        if self.prediction == "epsilon":
            return output
        alpha, sigma = (_column(c, x) for c in self.alpha_sigma(t))
        if self.prediction == "v_prediction":
            return sigma * x + alpha * output
        return (x - alpha * output) / sigma

    def to_space(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """As :meth:`to_eps`."""
        return self.to_eps(output, x, t)


class Flow:
    """The forward process x_t = (1 − σ) x₀ + σ ε of a rectified flow, t = T σ, and its network's prediction u = ε − x₀.

    Liu et al., ICLR 2023, *Flow Straight and Fast*; Esser et al., ICML 2024, *Scaling Rectified Flow Transformers*. Predictions stay
    velocities: noise read off them would be the same for all prompts at t = T.
    """

    space: Space = "velocity"

    def __init__(self, scheduler: Any, name: str = "the model"):
        config = scheduler.config
        flows = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas")
        if not flows or config.get("invert_sigmas"):
            raise CannotAudit(
                f"{name} has a {type(scheduler).__name__} that does not run a rectified flow from noise (σ = 1) to pictures (σ = 0); "
                f"give it a FlowMatchEulerDiscreteScheduler."
            )
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # others tabulate their levels in a way of their own
            _require_falling(scheduler.sigmas, f"{name}'s {type(scheduler).__name__}", "σ")
        self.train_steps: int = config.num_train_timesteps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 − σ and σ in the shape and on the device of ``t``, float32."""
        sigma = t.float() / self.train_steps
        return 1 - sigma, sigma

    def to_space(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The raw output, which is u, float32 or better."""
        return precise(output)


def _require_falling(levels: Tensor, whose: str, what: str) -> None:
    """Refuse a scheduler whose noise levels are no numbers, or do not fall from 1 or below to 0 or above."""
    ends = len(levels) and float(levels[-1]) >= 0 and float(levels[0]) <= 1
    if not ends or not bool(levels.isfinite().all()) or not bool((levels.diff() < 0).all()):
        raise CannotAudit(
            f"{whose} has noise levels that are no finite numbers or do not fall ({what} must fall from at most 1 to at least 0); check "
            f"the numbers in its scheduler_config.json."
        )


def _column(c: Tensor, x: Tensor) -> Tensor:
    """A scalar as it is (0-d tensors multiply across devices without a transfer), one per sample shaped to broadcast."""
    return c if c.ndim == 0 else c.to(x.device).view(-1, *[1] * (x.ndim - 1))


class DiffusersSchedule:
    """One run of a diffusers scheduler, on a copy of its own.

    Raises:
        CannotAudit: it stops at times that the model was not trained on.
    """

    def __init__(self, scheduler: Any, steps: int, device: torch.device, dtype: torch.dtype, **spacing: float):
        self._scheduler = type(scheduler).from_config(scheduler.config)
        # On the CPU: a GPU timestep would index the scheduler's CPU tables and so wait for the device at every step.
        self._scheduler.set_timesteps(steps, **spacing)
        self.timesteps: Tensor = self._scheduler.timesteps
        last = self._last_time
        if not bool(((self.timesteps >= 0) & (self.timesteps <= last)).all()):  # NaN is neither
            raise CannotAudit(
                f"{type(scheduler).__name__} stops at times outside of its training timesteps 0 to {last} when it takes {steps} steps; "
                f"take fewer, or check the numbers in its scheduler_config.json."
            )
        self._device, self._dtype = device, dtype

    @property
    def _last_time(self) -> int:
        """The time of most noise that the model was trained on."""
        return len(self._scheduler.alphas_cumprod) - 1

    def start(self, noise: Latents) -> Latents:
        """x_T from unit-variance noise, on the model's device and in its dtype."""
        return noise.to(self._device, self._dtype) * self._scheduler.init_noise_sigma

    def scale(self, x: Latents, t: Tensor) -> Latents:
        """What the denoiser is shown: x itself, or x/√(σ² + 1) for samplers that work in σ-space."""
        return self._scheduler.scale_model_input(x, t)

    def step(self, output: Latents, t: Tensor, x: Latents) -> Latents:
        """The next state."""
        return self._scheduler.step(output, t, x, return_dict=False)[0]


class FlowSchedule(DiffusersSchedule):
    """One run of a rectified flow's scheduler, whose state is x_t itself."""

    @property
    def _last_time(self) -> int:
        return int(self._scheduler.config.num_train_timesteps)

    def start(self, noise: Latents) -> Latents:
        """The noise, on the model's device and in its dtype."""
        return noise.to(self._device, self._dtype)

    def scale(self, x: Latents, t: Tensor) -> Latents:
        """The state itself."""
        return x


class DiffusersTarget(ABC):
    """Common part of the adapters; see :class:`~mnemoscope.models.base.Target` for the promises.

    Args:
        pipe: A diffusers pipeline. Its modules are shared, frozen and put in eval mode; its scheduler is copied.
        sampler: ``"ddim"`` (deterministic DDIM, η = 0, built from the model's scheduler config) or ``"own"`` (the pipeline's
            scheduler, if it draws no noise).
        resolution: Side in pixels, or (height, width); default is the size the model was trained on.
        origin: What a loader knows about the model.
    """

    kind: ClassVar[str]
    pipelines: ClassVar[frozenset[str]]
    """Pipeline classes that can be loaded."""
    denoiser: ClassVar[str] = "unet"
    """Which component of the pipeline predicts."""
    shown: ClassVar[str] = "sample"
    """What the denoiser calls x_t among its arguments."""
    told: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    """What the denoiser calls its condition."""
    process: ClassVar[type[Diffusion] | type[Flow]] = Diffusion
    """What its scheduler is read as."""
    has_text: bool
    space: Space = "eps"
    guidance: float

    def __init__(
        self,
        pipe: Any,
        *,
        sampler: str = "ddim",
        resolution: int | tuple[int, int] | None = None,
        origin: Origin | None = None,
    ):
        self.origin = origin or Origin(name=type(pipe).__name__)
        self.name = self.origin.name
        self.pipeline = type(pipe).__name__
        self.modules: dict[str, Any] = {
            k: m for k, m in pipe.components.items() if isinstance(m, nn.Module) and k != "safety_checker"
        }
        for module in self.modules.values():
            module.requires_grad_(False).eval()
        self.unet: Any = getattr(pipe, self.denoiser)
        self.vae: Any = self.modules.get("vae", self.modules.get("vqvae"))
        self._require_picture_numbers()
        self.sampler = sampler
        self._scheduler = self._sampler(pipe.scheduler)
        self._diffusion = self.process(self._scheduler, self.name)
        self.factor: int = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        """Pixels per latent, along each side."""
        self.latent_shape = (self.unet.config.in_channels, *self._latent_size(resolution))
        self.forwards = 0
        self._identity: dict[str, Any] | None = None

    @classmethod
    def accepts(cls, pipeline: str) -> bool:
        """Whether pipelines of this class name can be audited."""
        return pipeline in cls.pipelines

    @staticmethod
    @abstractmethod
    def guided(pipe: Any) -> bool:
        """Whether a running pipeline doubles its denoiser's batch right now; the first half is then unconditional."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Condition:
        """Encode prompts; the empty string gives the null condition."""

    @abstractmethod
    def tokens(self, prompt: str) -> list[str]:
        """The tokens the encoder sees, without start, end and padding."""

    @abstractmethod
    def pieces(self, prompt: str) -> list[Piece]:
        """What each position of an encoded prompt stands for."""

    @abstractmethod
    def dropped(self, prompt: str) -> int:
        """How many tokens at the prompt's end the encoder cannot see."""

    @abstractmethod
    def output(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """The network's raw output, in its own dtype; differentiable in ``x`` and ``cond.tokens``."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        return self.unet.dtype

    def _here(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors where the denoiser is, in its precision. Asked once for all: diffusers walks every module for an answer."""
        device, dtype = self.device, self.dtype
        return tuple(tensor.to(device, dtype) for tensor in tensors)

    @property
    def dtype_reason(self) -> str:
        """Which precision, and why."""
        return self.origin.dtype_reason or f"{_name(self.dtype)}: as the pipeline came"

    def identity(self) -> dict[str, Any]:
        """Hashes of weights and adapters, scheduler, dtype, resolution; ``fingerprint`` over all of it. Computed once."""
        if self._identity is None:
            self._identity = identity.with_fingerprint(self._describe())
        return dict(self._identity)

    def _describe(self) -> dict[str, Any]:
        _, height, width = self.latent_shape
        return {
            "name": self.name,
            "source": self.origin.source,
            "revision": self.origin.revision,
            "kind": self.kind,
            "pipeline": self.pipeline,
            "files": identity.files(self.origin.files, self.origin.adapter_files),
            "weights": identity.weights(self.modules),
            "adapters": identity.adapters(self.modules),
            "scheduler": identity.scheduler_fields(self._scheduler),
            "dtype": _name(self.dtype),
            "resolution": [height * self.factor, width * self.factor],
        }

    # Sampling

    def _sampler(self, scheduler: Any) -> Any:
        if self.sampler not in SAMPLERS:
            raise UnknownName("sampler", self.sampler, SAMPLERS)
        if self.sampler == "ddim":
            return self._deterministic(scheduler)
        name, algorithm = type(scheduler).__name__, scheduler.config.get("algorithm_type", "")
        if name not in DETERMINISTIC or "sde" in algorithm or scheduler.config.get("stochastic_sampling"):
            raise CannotAudit(
                f"{self.name}'s own sampler, {name}{f' ({algorithm})' if algorithm else ''}, draws noise while it samples, so a "
                f"seed would not fix the result; use sampler='ddim'."
            )
        return type(scheduler).from_config(scheduler.config)

    def _deterministic(self, scheduler: Any) -> Any:
        """DDIM, η = 0, with the noise levels of the pipeline's scheduler."""
        return DDIMScheduler.from_config(scheduler.config, **self._ddim_overrides(scheduler.config))

    def _ddim_overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def noise(self, seeds: Sequence[int], base: int = 0) -> Latents:
        """Unit-variance starting noise, float32 on the CPU; row j depends on (base, seeds[j]) alone."""
        return noise_from_seeds(seeds, base, self.latent_shape)

    def schedule(self, steps: int) -> DiffusersSchedule:
        """A fresh sampler run of that many steps."""
        self._require_steps(steps)
        return DiffusersSchedule(self._scheduler, steps, self.device, self.dtype)

    def _require_steps(self, steps: int) -> None:
        if not 1 <= steps <= self._diffusion.train_steps:
            raise UsageError(
                f"steps={steps}: {self.name} was trained on {self._diffusion.train_steps} timesteps; use 1 to "
                f"{self._diffusion.train_steps}, for instance 50."
            )

    def whole_schedule(self, steps: int) -> DiffusersSchedule:
        """A fresh sampler run of that many steps that begins at the last training timestep: T − 1, T − 1 − T/steps, …"""
        self._require_steps(steps)
        whole = type(self._scheduler).from_config(self._scheduler.config, timestep_spacing="trailing")
        return DiffusersSchedule(whole, steps, self.device, self.dtype)

    def training_times(self, u: Float[Tensor, " batch"]) -> Tensor:
        """Training timestep number ⌊u·T⌋."""
        return (u * self._diffusion.train_steps).long().clamp(0, self._diffusion.train_steps - 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t of x_t = α x₀ + σ ε, in the shape of ``t``, float32."""
        return self._diffusion.alpha_sigma(t)

    def to_space(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The raw output as ε (as u of a rectified flow), float32."""
        return self._diffusion.to_space(output, x, t)

    def predict(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """ε(x_t, condition), or u, float32."""
        return self.to_space(self.output(x, t, cond), x, t)

    # Pictures

    def _latent_size(self, resolution: int | tuple[int, int] | None) -> tuple[int, int]:
        """Latent height and width; a size the model cannot mean gets one sentence."""
        native = self._native_size()
        if resolution is None:
            return native
        asked = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if any(side not in possible for side, possible in zip(asked, self.sides(), strict=True)):
            raise UsageError(
                f"resolution {asked[0]}×{asked[1]}: {self.name} was trained at {native[0] * self.factor}×"
                f"{native[1] * self.factor}; use multiples of {self._size_unit()} between half and twice that."
            )
        return asked[0] // self.factor, asked[1] // self.factor

    def _native_size(self) -> tuple[int, int]:
        """Latent height and width that the model was trained at."""
        size = self.unet.config.sample_size
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or not all(isinstance(n, int) and 1 <= n * self.factor <= LARGEST_SIDE for n in sides):
            raise CannotAudit(
                f"{self.name}'s denoiser has the sample_size {str(size)[:80]}: it must be the side of its latents, or height and width, "
                f"of pictures of at most {LARGEST_SIDE} pixels; correct its config.json."
            )
        return sides[0], sides[1]

    def _require_picture_numbers(self) -> None:
        """Refuse an autoencoder whose latents cannot be scaled back."""
        if self.vae is None:
            return
        for setting, neutral in (("scaling_factor", 1.0), ("shift_factor", 0.0)):
            value = self.vae.config.get(setting)
            value = neutral if value is None else value
            if (
                not isinstance(value, int | float)
                or not math.isfinite(value)
                or (setting == "scaling_factor" and value == 0)
            ):
                raise CannotAudit(
                    f"{self.name}'s autoencoder has the {setting} {str(value)[:80]}, by which no latent can be scaled; correct its "
                    f"config.json."
                )

    def _require_window(self, tokenizer: Any, encoder: Any) -> None:
        """Refuse a tokenizer that fills prompts up to more tokens than the text encoder has places for, or than memory has."""
        window, places = tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", None)
        most = places if isinstance(places, int) else LONGEST_WINDOW
        if not isinstance(window, int) or not 1 <= window <= most:
            raise CannotAudit(
                f"{self.name}'s tokenizer fills prompts up to {str(window)[:20]} tokens, and its text encoder has places for {most}; "
                f"correct model_max_length in its tokenizer_config.json."
            )

    def sides(self) -> tuple[range, range]:
        """Heights and widths, in pixels, that the model can mean: half to twice what it was trained at."""
        own, unit = self._latent_size(None), self._size_unit()
        heights, widths = (range(-(-n * self.factor // (2 * unit)) * unit, 2 * n * self.factor + 1, unit) for n in own)
        return heights, widths

    def _size_unit(self) -> int:
        """Pixel sizes must be multiples of this."""
        return self.factor

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "batch 3 rows columns"]) -> Latents:
        """x₀ of pictures in [0, 1], float32 on the model's device: what the diffusion model is trained on (no draw)."""
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise UsageError(
                f"pictures of {height}×{width}: {self.name} needs sides that are multiples of {self.factor}."
            )
        parts = [
            self._encode(part.to(self.device, self._picture_dtype) * 2 - 1).float()
            for part in images.split(IMAGE_BATCH)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, x: Latents) -> Float[Tensor, "batch 3 rows columns"]:
        """Pictures in [0, 1], float32, on the CPU."""
        parts = [self._decode(part.to(self.device, self._picture_dtype)) for part in x.split(IMAGE_BATCH)]
        return torch.cat([(part * 0.5 + 0.5).clamp(0, 1).float().cpu() for part in parts])

    @property
    def _picture_dtype(self) -> torch.dtype:
        return self.dtype if self.vae is None else self.vae.dtype

    @property
    def _picture_shift(self) -> float:
        """Mean of the autoencoder's latents before scaling; newer autoencoders have one."""
        return self.vae.config.get("shift_factor") or 0.0

    def _encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels in [-1, 1]: a KL autoencoder's mean, or a VQ one's latent before quantization."""
        with computing(self.name):
            z = self.vae.encode(pixels)
        mean = z.latent_dist.mean if hasattr(z, "latent_dist") else z.latents
        return (mean - self._picture_shift) * self.vae.config.scaling_factor

    def _decode(self, z: Tensor) -> Tensor:
        """Pixels in [-1, 1], a little beyond at times."""
        with computing(self.name):
            return self.vae.decode(z / self.vae.config.scaling_factor + self._picture_shift, return_dict=False)[0]

    def __repr__(self) -> str:
        c, h, w = self.latent_shape
        return f"{type(self).__name__}({self.name!r}, {c}×{h}×{w}, {_name(self.dtype)} on {self.device})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
