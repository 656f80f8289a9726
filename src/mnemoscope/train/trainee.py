"""The model that is trained: what of it, with which loss, and how it is saved."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UsageError
from ..mitigate.base import key_of
from ..mitigate.training import per_sample
from ..models.host import Origin
from ..models.load import build, open_pipeline
from ..models.sources import quiet
from ..models.stable_diffusion import StableDiffusion
from ..models.steer import frozen
from ..types import Latents, PerSample
from .config import TrainConfig

__all__ = ["Average", "Objective", "Trainee", "open_trainee"]

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
"""The projections of all attention layers, as diffusers' LoRA example has them."""

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Objective:
    """The loss of a discrete-time diffusion model: mean squared error of ε, v or x₀, whichever the scheduler says.

    Args:
        scheduler: A diffusers scheduler with ``add_noise`` and ``get_velocity``.
        gamma: γ of the weights of Hang et al., ICCV 2023, *Efficient Diffusion Training via Min-SNR Weighting Strategy*; None: all
            times weigh alike.
    """

    def __init__(self, scheduler: DDPMScheduler, gamma: float | None = None):
        self.scheduler, self.gamma = scheduler, gamma
        self.prediction = scheduler.config["prediction_type"]
        bar = scheduler.alphas_cumprod
        self._snr = bar / (1 - bar)

    def noised(self, x0: Latents, noise: Latents, t: Tensor) -> Latents:
        """x_t."""
        return self.scheduler.add_noise(x0, noise, t)

    def losses(self, output: Latents, x0: Latents, noise: Latents, t: Tensor) -> PerSample:
        """The weighted loss of each sample, float32."""
        each = per_sample(output, self._wanted(x0, noise, t))
        return each if self.gamma is None else each * self._weights(t)

    def _wanted(self, x0: Latents, noise: Latents, t: Tensor) -> Latents:
        if self.prediction == "epsilon":
            return noise
        return self.scheduler.get_velocity(x0, noise, t) if self.prediction == "v_prediction" else x0

    def _weights(self, t: Tensor) -> Float[Tensor, " batch"]:
        """min(SNR, γ) in terms of x₀, which is divided by SNR for ε and by SNR + 1 for v."""
        self._snr = self._snr.to(t.device)
        snr = self._snr[t]
        capped = snr.clamp(max=self.gamma)
        if self.prediction == "epsilon":
            return capped / snr
        return capped / (snr + 1) if self.prediction == "v_prediction" else capped


class Average:
    """An exponential moving average of weights; its decay rises to ``decay`` as (1 + n)/(10 + n), as diffusers' does.

    Args:
        weights: By name.
        decay: Near 1.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self._live = list(weights.values())
        self.shadow = {name: w.detach().clone() for name, w in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), self._live, 1 - decay)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        with torch.no_grad():
            kept = [w.detach().clone() for w in self._live]
            torch._foreach_copy_(self._live, list(self.shadow.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, kept)


@dataclass
class Trainee:
    """An opened model, and what of it is trained.

    Attributes:
        pipe: The diffusers pipeline.
        origin: Where it came from.
        options: What its maker recommends for auditing it.
        target: The same for whoever asks it questions; its parts are frozen but for what is trained.
        rank: Of the LoRA; None: the whole UNet.
        scheduler: The forward process.
    """

    pipe: Any
    origin: Origin
    options: dict[str, Any]
    target: StableDiffusion
    rank: int | None
    scheduler: DDPMScheduler

    @property
    def unet(self) -> nn.Module:
        """The denoiser."""
        return self.pipe.unet

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @contextmanager
    def asked(self) -> Iterator[StableDiffusion]:
        """The model as a target while it is trained; afterwards everything trains on as it did."""
        with frozen(self.unet):
            target = build(self.pipe, self.origin, **self.options)
            assert isinstance(target, StableDiffusion)  # it was when it was opened
            yield target

    def save(self, folder: Path) -> Path:
        """Write the LoRA file, or the whole pipeline; at once or not at all. Returns what an audit opens."""
        half = folder / f".saving-{'lora' if self.rank else 'pipeline'}"
        shutil.rmtree(half, ignore_errors=True)
        if self.rank is not None:
            self.save_lora(half)
            (half / LORA_FILE).replace(folder / LORA_FILE)
            half.rmdir()
            return folder / LORA_FILE
        with quiet():
            self.pipe.save_pretrained(half, safe_serialization=True)
        if recommended := self.options.get("guidance"):
            (half / "mnemoscope.json").write_text(f'{{"guidance": {recommended}}}\n', encoding="utf-8")
        shutil.rmtree(folder / "pipeline", ignore_errors=True)
        half.replace(folder / "pipeline")
        return folder / "pipeline"

    def save_lora(self, folder: Path) -> None:
        """The adapter in diffusers' format."""
        from peft.utils import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        layers = {name: w.float() for name, w in layers.items()}
        self.pipe.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)


def open_trainee(config: TrainConfig, device: torch.device) -> Trainee:
    """Open the model in float32, freeze it, and free or add what is trained.

    Raises:
        CannotAudit: it cannot be opened.
        UsageError: it takes no text, or brings an adapter already.
    """
    if "lora" in config.model_options:
        raise UsageError(
            "lora= among the model options would be trained on top of another: merge it into the model first."
        )
    pipe, origin, options = open_pipeline(config.model, dtype=torch.float32, device=device, **config.model_options)
    if "resolution" not in options and config.resolution is not None:
        options["resolution"] = config.resolution
    target = build(pipe, origin, **options)
    if not isinstance(target, StableDiffusion):
        what = f"is opened as {type(target).__name__}" if target.has_text else "takes no text"
        raise UsageError(f"{target.name} {what}; only Stable Diffusion 1 and 2 can be trained here so far.")
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.lora is None:
        pipe.unet.requires_grad_(True)
    else:
        _add_lora(pipe.unet, config.lora, config)
    return Trainee(pipe, origin, options, target, config.lora, _forward_process(pipe.scheduler))


def _add_lora(unet: Any, rank: int, config: TrainConfig) -> None:
    from peft import LoraConfig

    if config.mixed_precision in HALVES:  # frozen weights need no float32 copy
        nn.Module.to(unet, HALVES[config.mixed_precision])  # diffusers' own `to` logs a warning about nothing
    with torch.random.fork_rng():
        torch.manual_seed(key_of("lora", 0, config.seed) >> 1)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA_LAYERS))
        )
    cast_training_params(unet, dtype=torch.float32)


def _forward_process(scheduler: Any) -> DDPMScheduler:
    """The scheduler that a model samples with, as the process that it is trained with."""
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler.from_config({k: v for k, v in scheduler.config.items() if k in known})
