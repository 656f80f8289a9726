"""Stable Diffusion 1 and 2: text-to-image latent diffusion with classifier-free guidance.

Rombach et al., CVPR 2022, *High-Resolution Image Synthesis with Latent Diffusion Models*. The null prompt e_∅ is the encoding
of the empty string (Wen et al. 2024, section 3).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CannotAudit, UsageError
from ..types import Latents
from . import identity, spelling
from .attention import EndAttention, TokenAttention, end_token_attention, scaled_attention, token_attention
from .base import ATTENTION, Condition, Piece
from .folders import computing
from .host import DiffusersTarget, Origin

TEXT_BATCH = 64
"""Prompts encoded at a time."""


class StableDiffusion(DiffusersTarget):
    """A Stable Diffusion pipeline as a :class:`~mnemoscope.models.base.Target`, in ε-space.

    Any number of latent channels, any autoencoder factor, ε, v or x₀ prediction.

    Args:
        pipe: The pipeline (``unet``, ``vae``, ``text_encoder``, ``tokenizer``, ``scheduler``).
        guidance: Guidance scale g of ε̂ = ε_∅ + g·(ε_c − ε_∅).
        sampler: ``"ddim"`` or ``"own"``; see :class:`~mnemoscope.models.host.DiffusersTarget`.
        resolution: Side in pixels, or (height, width).
        origin: What a loader knows about the model.

    Raises:
        CannotAudit: the model has no prediction without a prompt, or needs inputs beside the prompt.
    """

    kind = "stable-diffusion"
    pipelines = frozenset({"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"})
    has_text = True

    def __init__(
        self,
        pipe: Any,
        *,
        guidance: float = 7.5,
        sampler: str = "ddim",
        resolution: int | tuple[int, int] | None = None,
        origin: Origin | None = None,
    ):
        super().__init__(pipe, sampler=sampler, resolution=resolution, origin=origin)
        self.guidance = float(guidance)
        self.tokenizer, self.text_encoder = pipe.tokenizer, pipe.text_encoder
        self._reject_other_inputs()
        self._require_window(self.tokenizer, self.text_encoder)
        # Textual inversion may write one word as several tokens (word, word_1, …); the pipeline knows which.
        self._written_out = _written_out(self.tokenizer.get_added_vocab())
        self._spelled_out = pipe.maybe_convert_prompt if self._written_out else lambda prompts, _: prompts
        self._null: Tensor | None = None

    @staticmethod
    def guided(pipe: Any) -> bool:
        """Guidance above 1, whose batch is [unconditional; conditional]."""
        return bool(pipe.do_classifier_free_guidance)

    def _reject_other_inputs(self) -> None:
        config = self.unet.config
        missing = [k for k in ("vae", "text_encoder") if k not in self.modules] + ["tokenizer"] * (
            self.tokenizer is None
        )
        if missing:
            raise CannotAudit(f"{self.name} comes without its {missing[0]}; load the whole pipeline.")
        if config.time_cond_proj_dim is not None:
            raise CannotAudit(
                f"{self.name} was distilled with guidance inside (time_cond_proj_dim={config.time_cond_proj_dim}), so it makes no "
                f"prediction without the prompt; audit the model it was distilled from."
            )
        if config.in_channels != self.vae.config.latent_channels:
            raise CannotAudit(
                f"{self.name}'s denoiser takes {config.in_channels} channels and its latents have "
                f"{self.vae.config.latent_channels}: inpainting, depth and editing models need a picture as input and cannot be "
                f"audited; use the text-to-image model they come from."
            )
        if config.class_embed_type is not None or config.addition_embed_type is not None:
            raise CannotAudit(
                f"{self.name}'s denoiser needs more than a prompt (class_embed_type={config.class_embed_type!r}, "
                f"addition_embed_type={config.addition_embed_type!r}); only Stable Diffusion 1 and 2 are supported so far."
            )

    def _ddim_overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a Stable Diffusion config that was written for another sampler leaves open."""
        # Latents go far beyond [-1, 1]; DDIM's default would clip them.
        overrides: dict[str, Any] = {"clip_sample": False}
        if config.get("rescale_betas_zero_snr"):
            # At ᾱ = 0 the score is exactly 0 for every prompt, because Δε = α·Δv: the first step must lie before the last
            # training timestep.
            overrides |= {"timestep_spacing": "leading", "steps_offset": 1}
        return overrides

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "tokenizer": identity.vocabulary(self.tokenizer)}

    # Text

    def _ids(self, prompts: list[str]) -> Tensor:
        """Token ids with start, end and padding, ``[batch, token]``."""
        spelled = self._spelled_out([spelling.clean(p) for p in prompts], self.tokenizer)
        return spelling.tokenize(
            self.tokenizer,
            spelled,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
            return_attention_mask=False,
        ).input_ids

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> Tensor:
        return self._embedded(ids)

    def _embedded(self, ids: Tensor) -> Tensor:
        """The text encoder's last hidden state, ``[batch, token, dim]``."""
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = (ids != self.tokenizer.pad_token_id).long().to(self.device)
        with computing(self.name):
            return self.text_encoder(ids.to(self.device), attention_mask=mask)[0].to(self.dtype)

    def encode(self, prompts: list[str]) -> Condition:
        """Encode prompts, ``tokens [batch, 77, dim]``; the empty string gives the null condition, bit for bit.

        Prompts longer than the encoder's window are cut; see :meth:`dropped`.
        """
        null = self._null_ids
        if self._null is None:
            # Encoded alone and once: in a batch the same text comes out different in the last bits, and an empty prompt's
            # score would not be exactly 0.
            self._null = self._embed(null)
        if not prompts:
            return Condition(self._null[:0])
        ids = self._ids(prompts)
        tokens = torch.cat([self._embed(part) for part in ids.split(TEXT_BATCH)])
        blank = (ids == null).all(1).to(tokens.device)
        return Condition(torch.where(blank[:, None, None], self._null, tokens))

    def encode_padded(self, prompts: list[str], pad: str) -> Condition:
        """Encode prompts with another token than the tokenizer's own after their end.

        Raises:
            UsageError: the vocabulary has no such token.
        """
        number = self.tokenizer.get_vocab().get(pad)
        if number is None:
            raise UsageError(
                f"{self.name} has no token {pad!r} to pad with; use one of its vocabulary, for instance '!'."
            )
        ids = self._ids(prompts)
        ends = ids == self.tokenizer.eos_token_id
        after = ends.cumsum(1) - ends.long() > 0
        ids = torch.where(after, number, ids)
        return Condition(torch.cat([self._embed(part) for part in ids.split(TEXT_BATCH)]))

    @property
    def mixture_shape(self) -> tuple[int, int]:
        """Tokens between start and end, and rows of the table of token embeddings."""
        return self._room, len(self.text_encoder.get_input_embeddings().weight)

    def encode_mixture(self, shares: Float[Tensor, "batch slot token"]) -> Condition:
        """Encode mixtures of tokens in every place between start and the last; differentiable in ``shares``."""
        table = self.text_encoder.get_input_embeddings()
        mixed, here = shares.to(table.weight) @ table.weight, threading.get_ident()

        def mix(_: Any, __: Any, embedded: Tensor) -> Tensor | None:
            if threading.get_ident() != here:  # another thread encodes with the same encoder
                return None
            return torch.cat([embedded[:, :1], mixed, embedded[:, 1 + mixed.shape[1] :]], dim=1)

        handle = table.register_forward_hook(mix)
        try:
            return Condition(self._embedded(self._null_ids.expand(len(shares), -1)))
        finally:
            handle.remove()

    @property
    def _null_ids(self) -> Tensor:
        return self._ids([""])

    def _content(self, prompt: str) -> list[int]:
        """All of a prompt's token ids, without start, end and padding, however long it is."""
        spelled = self._spelled_out([spelling.clean(prompt)], self.tokenizer)[0]
        return spelling.tokenize(self.tokenizer, spelled, add_special_tokens=False, verbose=False).input_ids

    @property
    def _room(self) -> int:
        """How many tokens fit beside start and end."""
        return self.tokenizer.model_max_length - self.tokenizer.num_special_tokens_to_add()

    def tokens(self, prompt: str) -> list[str]:
        """The tokens the encoder sees, in order, without start, end and padding."""
        seen = self._content(prompt)[: self._room]
        return [token.removesuffix("</w>") for token in self.tokenizer.convert_ids_to_tokens(seen)]

    def pieces(self, prompt: str) -> list[Piece]:
        """Start, the tokens with their characters in the prompt, end and padding: one for each position of ``encode``."""
        spelled = self._spelled_out([spelling.clean(prompt)], self.tokenizer)[0]
        found = spelling.spell(self.tokenizer, spelled, self.tokenizer.model_max_length)
        return found if spelled == prompt else spelling.unspell(found, spelled, self._written_out)

    def neighbors(self, words: list[str], k: int, among: Collection[str] | None = None) -> list[list[str]]:
        """The k words nearest to each word by their token embeddings, among those given or the vocabulary's whole words."""
        table = self.text_encoder.get_input_embeddings().weight
        return spelling.neighbors(self.tokenizer, table, [spelling.clean(word) for word in words], k, among)

    @cached_property
    def _plain_ids(self) -> list[int]:
        """Ids of all tokens but the special ones."""
        special = set(self.tokenizer.all_special_ids)
        return [i for i in sorted(self.tokenizer.get_vocab().values()) if i not in special]

    @property
    def entries(self) -> int:
        """How many tokens the vocabulary has, special ones left out."""
        return len(self._plain_ids)

    def entry(self, index: int) -> str:
        """What token number ``index`` of them spells."""
        return str(self.tokenizer.decode([self._plain_ids[index]])).strip()

    def dropped(self, prompt: str) -> int:
        """How many tokens at the prompt's end the encoder cannot see (0: none)."""
        return max(0, len(self._content(prompt)) - self._room)

    # The denoiser

    def output(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
        """The UNet's raw output (ε, v or x₀), in its own dtype; differentiable in ``x`` and ``cond.tokens``."""
        if cond is None:
            raise UsageError(f"{self.name} needs a condition; use encode(['']) for the empty prompt.")
        self.forwards += len(x)
        seen, tokens = self._here(x, cond.tokens)
        change = cond.extra.get(ATTENTION)
        with (
            nullcontext() if change is None else scaled_attention(self.unet, *self._here(change)),
            computing(self.name),
        ):
            return self.unet(seen, t, encoder_hidden_states=tokens, return_dict=False)[0]

    def token_attention(self) -> AbstractContextManager[TokenAttention]:
        """Watch the UNet's attention to each token; see :func:`mnemoscope.models.attention.token_attention`."""
        return token_attention(self.unet)

    def end_token_attention(self, ends: Sequence[int]) -> AbstractContextManager[EndAttention]:
        """Watch the UNet's attention to each row's end token; see :func:`mnemoscope.models.attention.end_token_attention`."""
        _, height, width = self.latent_shape
        return end_token_attention(self.unet, ends, (height, width))


def _written_out(added: Collection[str]) -> dict[str, str]:
    """What textual inversion makes of its words of several tokens: as the encoder is given it → as it is typed."""
    found = {}
    for token in added:
        if f"{token}_1" in added:
            more = itertools.takewhile(added.__contains__, (f"{token}_{i}" for i in itertools.count(1)))
            found[" ".join([token, *more])] = token
    return found
