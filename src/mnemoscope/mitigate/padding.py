"""Replace the padding's embeddings: Kim & No, CVPR 2026 (arXiv 2605.02908).

Positions after the end of a prompt carry no word, yet the text encoder writes a summary of the whole prompt into each of them, and
memorized pictures are called up by these copies of it. So give them another content, and the end position with them:

    !       what the encoder writes there when it pads with the token "!"; the end becomes 0
    zero    0
    null    what stands at the same positions of the empty prompt

and only at a share of the padding positions, drawn from the sample's key: a larger share contains the smaller. The end counts as
soon as the share is positive. No forward is spent. Worlds of :mod:`~mnemoscope.models.closed_form` pad with what carries nothing,
so that their generations stay as they are.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..bounds import SHARE, within
from ..errors import CannotAudit, UnknownName
from ..models.base import Pads, Target
from .base import Generation, generator, require

CONTENTS = ("!", "zero", "null")


def chosen(
    padding: Bool[Tensor, "batch token"], share: float, keys: tuple[int, ...], purpose: str
) -> Bool[Tensor, "batch token"]:
    """A share of each row's padding positions, rounded to whole ones, in an order drawn from its key."""
    picked = torch.zeros_like(padding)
    for row, (places, key) in enumerate(zip(padding, keys, strict=True)):
        at = places.nonzero()[:, 0]
        order = torch.randperm(len(at), generator=generator(key, purpose))
        picked[row, at[order[: round(share * len(at))]]] = True
    return picked


def replaced(
    tokens: Float[Tensor, "batch token dim"],
    content: Float[Tensor, "rows token dim"],
    where: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token dim"]:
    """``content`` at the positions ``where``, the embeddings themselves elsewhere."""
    return torch.where(where[..., None].to(tokens.device), content.to(tokens), tokens)


class Padding:
    """Other embeddings after the prompt's last word.

    Args:
        share: Share of the padding positions that are replaced, 0 to 1.
        content: What with: ``"!"``, ``"zero"`` or ``"null"``.
        end: Replace the end position, too. It is a summary of the prompt, too.
    """

    name = "padding"
    changes = frozenset({"embedding"})
    needs = frozenset({"prompts"})
    costs = "nothing"
    strength, strengths = "share", (0.1, 0.3, 0.5, 0.7, 1.0)

    @within(share=SHARE)
    def __init__(self, share: float = 1.0, content: str = "!", end: bool = True):
        if content not in CONTENTS:
            raise UnknownName("padding content", content, CONTENTS)
        self.share, self.content, self.end = float(share), content, end

    def prepare(self, target: Target, generation: Generation) -> Generation:
        """The same generation with other embeddings after each prompt's last word."""
        require(self, generation)
        g = generation
        prompts = list(g.prompts or ())
        kinds = [[piece.kind for piece in target.pieces(prompt)] for prompt in prompts]
        text = ~g.cond.same_as(g.null).cpu()  # an empty prompt has nothing to hide
        padding, ends = (
            torch.tensor([[k == kind for k in row] for row in kinds]) & text[:, None] for kind in ("padding", "end")
        )
        at_end = ends & (self.end and self.share > 0)
        tokens = replaced(
            g.cond.tokens, self._content(target, g, prompts), chosen(padding, self.share, g.keys, self.name) | at_end
        )
        if self.content == "!":
            tokens = replaced(tokens, torch.zeros_like(tokens), at_end)
        return g.with_tokens(tokens)

    def _content(self, target: Target, g: Generation, prompts: list[str]) -> Tensor:
        if self.content == "null":
            return g.null.tokens
        if self.content == "zero":
            return torch.zeros_like(g.null.tokens)
        if not isinstance(target, Pads):
            raise CannotAudit(f"{target.name} cannot pad with another token; use content='null' or content='zero'.")
        return target.encode_padded(prompts, "!").tokens
