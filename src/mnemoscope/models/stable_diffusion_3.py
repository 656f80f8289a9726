"""Stable Diffusion 3 and 3.5: rectified flow in the latents of an autoencoder, by a transformer that reads text and picture jointly.

Esser et al., ICML 2024, *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*. Everything is compared in
velocity space, u = ε − x₀ at x_t = (1 − σ) x₀ + σ ε, and the model's time is t = 1000 σ. The null prompt is the encoding of the
empty string by all encoders.

A prompt reaches the denoiser twice: as the sequence [77 positions of two CLIP encoders, channel by channel; 256 of T5], which is
``Condition.tokens``, and as one pooled vector of the CLIP encoders, ``Condition.extra["pooled"]``, that scales and shifts every layer.
Gradients with respect to the tokens do not see what passes through the pooled vector; leaving words out does.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from jaxtyping import Float
from torch import Tensor

from ..errors import CannotAudit, UsageError
from ..types import Latents, Space
from . import identity, spelling
from .base import Condition, Piece
from .folders import computing
from .host import DiffusersTarget, Flow, FlowSchedule, Origin
from .stable_diffusion import TEXT_BATCH

POOLED = "pooled"
"""Key of ``Condition.extra`` for the pooled text, ``[batch, dim]``."""

T5_LENGTH = 256
"""Positions of the T5 encoder, of which the pipeline makes zeros where there is none."""


class StableDiffusion3(DiffusersTarget):
    """A Stable Diffusion 3 pipeline as a :class:`~mnemoscope.models.base.Target`, in velocity space.

    Args:
        pipe: The pipeline (``transformer``, ``vae``, ``text_encoder`` and ``text_encoder_2`` with their tokenizers, ``scheduler``; the T5
            encoder, ``text_encoder_3``, may be None).
        guidance: Guidance scale g of û = u_∅ + g·(u_c − u_∅).
        sampler: ``"ddim"``: Euler's steps, which are DDIM's, η = 0, where α + σ = 1; or ``"own"``: the pipeline's scheduler, if it takes
            the same steps.
        resolution: Side in pixels, or (height, width).
        origin: What a loader knows about the model.

    Raises:
        CannotAudit: the model lacks a part, needs a picture beside the prompt, or is no rectified flow.
    """

    kind = "stable-diffusion-3"
    pipelines = frozenset({"StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"})
    denoiser = "transformer"
    shown = "hidden_states"
    told = ("encoder_hidden_states", "pooled_projections")
    process = Flow
    has_text = True
    space: Space = "velocity"

    def __init__(
        self,
        pipe: Any,
        *,
        guidance: float = 7.0,
        sampler: str = "ddim",
        resolution: int | tuple[int, int] | None = None,
        origin: Origin | None = None,
    ):
        super().__init__(pipe, sampler=sampler, resolution=resolution, origin=origin)
        self.guidance = float(guidance)
        self.tokenizer = pipe.tokenizer
        encoders = [(f"text_encoder{n}", f"tokenizer{n}") for n in ("", "_2", "_3")]
        self.tokenizers = {words: getattr(pipe, words) for encoder, words in encoders if encoder in self.modules}
        self._reject_what_is_missing()
        for words, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            self._require_window(self.tokenizers[words], self.modules[encoder])
        self._encode_prompt = pipe.encode_prompt
        self._null: Condition | None = None

    @staticmethod
    def guided(pipe: Any) -> bool:
        """Guidance above 1, whose batch is [unconditional; conditional]."""
        return bool(pipe.do_classifier_free_guidance)

    def _reject_what_is_missing(self) -> None:
        missing = [part for part in ("vae", "text_encoder", "text_encoder_2") if part not in self.modules]
        missing += [name for name, tokenizer in self.tokenizers.items() if tokenizer is None]
        if missing:
            raise CannotAudit(
                f"{self.name} comes without its {missing[0]}; load the whole pipeline (only text_encoder_3 may be left out)."
            )
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise CannotAudit(
                f"{self.name}'s denoiser takes {self.unet.config.in_channels} channels and its latents have "
                f"{self.vae.config.latent_channels}: models that need a picture as input cannot be audited; use the text-to-image model "
                f"they come from."
            )

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "tokenizer": {k: identity.vocabulary(t) for k, t in self.tokenizers.items()}}

    # Sampling

    def _sampler(self, scheduler: Any) -> Any:
        if self.sampler == "own" and not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise CannotAudit(
                f"{self.name}'s own sampler, {type(scheduler).__name__}, is not among those that can be followed step by step; leave "
                f"sampler out for Euler's steps."
            )
        return super()._sampler(scheduler)

    def _deterministic(self, scheduler: Any) -> Any:
        """Euler's steps at the noise levels of the pipeline's scheduler."""
        self.process(scheduler, self.name)  # refuses what is no flow before its settings are read as one's
        config = scheduler.config
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift, stochastic_sampling=False)

    @property
    def _spacing(self) -> dict[str, float]:
        """μ of a scheduler that shifts its times by the number of patches, as the pipeline computes it."""
        config = self._scheduler.config
        if not config.use_dynamic_shifting:
            return {}
        _, height, width = self.latent_shape
        patch = self.unet.config.patch_size
        known = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        try:
            mu = calculate_shift((height // patch) * (width // patch), *(config[key] for key in known))
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        except (ArithmeticError, TypeError):
            shift = math.nan
        if not 0 < shift < math.inf:
            raise CannotAudit(
                f"{self.name}'s scheduler shifts its times by no finite number for {height}×{width} latents; check "
                f"{', '.join(known)} in its scheduler_config.json."
            )
        return {"mu": mu}

    def schedule(self, steps: int) -> FlowSchedule:
        """A fresh sampler run of that many steps, from t = 1000."""
        self._require_steps(steps)
        return FlowSchedule(self._scheduler, steps, self.device, self.dtype, **self._spacing)

    def whole_schedule(self, steps: int) -> FlowSchedule:
        """As :meth:`schedule`: every run begins at pure noise."""
        return self.schedule(steps)

    def training_times(self, u: Float[Tensor, " batch"]) -> Tensor:
        """One of the 1000 shifted times that the scheduler tabulates, uniformly.

        Training drew them with other weights (Esser et al. 2024, section 3.1), which a checkpoint does not tell; InvMM (Ma et al. 2025)
        draws them uniformly.
        """
        steps = self._diffusion.train_steps
        s = ((u * steps).long().clamp(0, steps - 1) + 1).to(u.dtype) / steps
        return steps * self._shift * s / (1 + (self._shift - 1) * s)

    @property
    def _shift(self) -> float:
        """a of the shift s ← a·s / (1 + (a − 1)·s)."""
        config, mu = self._scheduler.config, self._spacing.get("mu")
        if mu is None:
            return float(config.shift)
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def sides(self) -> tuple[range, range]:
        """Heights and widths, in pixels: half to twice what it was trained at, and no more patches than it has positions for."""
        heights, widths = super().sides()
        unit, most = self._size_unit(), self.unet.config.pos_embed_max_size
        if most is not None:
            heights, widths = (range(r.start, min(r.stop, most * unit + 1), unit) for r in (heights, widths))
        return heights, widths

    def _size_unit(self) -> int:
        return self.factor * self.unet.config.patch_size

    # Text

    def encode(self, prompts: list[str]) -> Condition:
        """Encode prompts, ``tokens [batch, 77 + 256, dim]`` and pooled text; the empty string gives the null condition, bit for bit.

        Prompts longer than the CLIP encoders' window are cut there; see :meth:`dropped`.
        """
        if self._null is None:
            # Encoded alone and once: in a batch the same text comes out different in the last bits, and an empty prompt's
            # score would not be exactly 0.
            self._null = self._embed([""])
        if not prompts:
            return self._null.select(torch.empty(0, dtype=torch.long))
        texts = [spelling.clean(prompt) for prompt in prompts]
        found = Condition.cat([self._embed(texts[i : i + TEXT_BATCH]) for i in range(0, len(texts), TEXT_BATCH)])
        blank = torch.tensor(self._blank(texts), device=found.tokens.device)
        pooled = torch.where(blank[:, None], self._null.extra[POOLED], found.extra[POOLED])
        return Condition(torch.where(blank[:, None, None], self._null.tokens, found.tokens), {POOLED: pooled})

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Condition:
        """By the pipeline's own method."""
        with _unremarked(self._encode_prompt), computing(self.name):
            tokens, _, pooled, _ = self._encode_prompt(
                texts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
            )
        tokens, pooled = self._here(tokens, pooled)
        return Condition(tokens, {POOLED: pooled})

    def _blank(self, texts: list[str]) -> list[bool]:
        """Which texts all encoders are told as the empty one."""
        told = [
            spelling.tokenize(tokenizer, [*texts, ""], verbose=False).input_ids
            for tokenizer in self.tokenizers.values()
        ]
        return [all(rows[i] == rows[-1] for rows in told) for i in range(len(texts))]

    def _content(self, prompt: str) -> list[int]:
        """All of a prompt's token ids for CLIP, without start and end, however long it is."""
        return spelling.tokenize(
            self.tokenizer, spelling.clean(prompt), add_special_tokens=False, verbose=False
        ).input_ids

    @property
    def _room(self) -> int:
        """How many of them fit beside start and end."""
        return self.tokenizer.model_max_length - self.tokenizer.num_special_tokens_to_add()

    def tokens(self, prompt: str) -> list[str]:
        """The tokens the CLIP encoders see, in order, without start, end and padding."""
        seen = self._content(prompt)[: self._room]
        return [token.removesuffix(spelling.WHOLE) for token in self.tokenizer.convert_ids_to_tokens(seen)]

    def pieces(self, prompt: str) -> list[Piece]:
        """One for each position of ``encode``: start, tokens, end and padding of CLIP, then tokens, end and padding of T5.

        Both spell the whole prompt, so a word stands in two places. Without T5 its places are an end and padding.
        """
        text = spelling.clean(prompt)
        clip = spelling.spell(self.tokenizer, text, self.tokenizer.model_max_length)
        if "tokenizer_3" in self.tokenizers:
            return clip + spelling.spell(self.tokenizers["tokenizer_3"], text, T5_LENGTH)
        return [*clip, Piece("", "end"), *[Piece("", "padding")] * (T5_LENGTH - 1)]

    def dropped(self, prompt: str) -> int:
        """How many tokens at the prompt's end the CLIP encoders cannot see (0: none); T5, where there is one, reads further."""
        return max(0, len(self._content(prompt)) - self._room)

    # The denoiser

    def output(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """The transformer's u, in its own dtype; differentiable in ``x`` and ``cond.tokens``."""
        if cond is None:
            raise UsageError(f"{self.name} needs a condition; use encode(['']) for the empty prompt.")
        self.forwards += len(x)
        seen, tokens, pooled = self._here(x, cond.tokens, cond.extra[POOLED])
        with computing(self.name):
            return self.unet(
                hidden_states=seen,
                timestep=t.to(seen.device).expand(len(seen)),
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]


@contextmanager
def _unremarked(method: Any) -> Iterator[None]:
    """Without a line in the log for each prompt that is cut: results count them."""
    log = logging.getLogger(inspect.unwrap(method).__module__)
    log.addFilter(_remarkable)
    try:
        yield
    finally:
        log.removeFilter(_remarkable)


def _remarkable(record: logging.LogRecord) -> bool:
    return "your input was truncated" not in record.getMessage()
