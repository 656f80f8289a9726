"""Which words do it: significance of each token of a prompt (Wen et al., ICLR 2024), and methods that hold up better.

With L(e) = ‖ε_θ(x_t, e) − ε_θ(x_t, e_∅)‖₂, the magnitude of one image, and e the text encoder's output for the prompt:

    wen                    SS_i = mean over seeds and steps of ‖∂L/∂e_i‖₂ (section on explanations of Wen et al. 2024)
    gradient-input         Σ_i (e_i − e_∅,i)·∂L/∂e_i
    integrated-gradients   the same with the gradient averaged over the path from e_∅ to e (Sundararajan et al., ICML 2017),
                           whose terms add up to L
    leave-one-out          L(prompt) − L(prompt without the word): what explanations are held against, one pass per word
    edit                   its first-order estimate: ⟨∂L/∂e at the middle of the path, e − e′⟩, where e′ encodes the prompt
                           without the word

A gradient at token i sees only what passes through position i. The encoder has mixed the prompt long before: end and padding
know every word. ``edit`` asks for the gradient once, like ``wen``, and for the encodings of the prompt without each word,
which cost no denoiser forward; so it sees what deleting the word does to all positions. How well each holds is measured in
docs/explanations.md.

Where the official code differs from the definition (one norm over all images of a batch, a shared embedding, division by
2n), ``wen-official`` follows the code, at the first step. The code's trajectory is guided away from the prompt after the
first step; here it is the ordinary one for all methods.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..bounds import COUNT, GUIDANCE, SEED, STEP, STEPS, seed_numbers, within
from ..detect.calibrate import Calibration, setting_of
from ..detect.magnitude import TokenGradients, gradient, magnitude
from ..errors import CannotAudit, ModelFault, UnknownName, UsageError
from ..models.base import Condition, Piece, Target
from ..models.sampling import denoise, null_output, same_where
from ..types import Latents, PerSample, precise
from .words import Word, rest_of, without, words_of

DEFAULT = "edit"
MIDDLE = 0.5
"""Where on the path from the empty prompt to the prompt ``edit`` takes its gradient: the midpoint rule, exact to second order."""
PATH_POINTS = 8
"""Points of the path for integrated gradients."""

PerWord: TypeAlias = Float[Tensor, "prompt word"]


def significance(slope: TokenGradients) -> Float[Tensor, "batch token"]:
    """‖∂L/∂e_i‖₂ of each token (Wen et al. 2024)."""
    return slope.norm(dim=2)


def official_significance(size: PerSample, slope: TokenGradients) -> Float[Tensor, " token"]:
    """What the official code computes from the n samples of one prompt: ‖∂‖(L_1 … L_n)‖₂/∂e_i‖₂ / 2n for a shared e."""
    joint = size.norm().clamp(min=torch.finfo(size.dtype).tiny)
    return significance(((size / joint)[:, None, None] * slope).sum(0, keepdim=True))[0] / (2 * len(size))


@dataclass(frozen=True, eq=False)
class Explanation:
    """What each word of a prompt contributes to its score. Shows itself in a notebook.

    Attributes:
        prompt: The prompt.
        method: How values were computed; see :mod:`mnemoscope.explain.tokens`.
        words: The words the encoder sees, in order. Values of ``wen`` are score per unit of embedding, all others are in units of
            the score; only those of ``leave-one-out`` are amounts, the others are made to be compared with each other.
        extra: End of text and padding as one; what passes through them includes much of what the words do.
        score: Mean magnitude over seeds and steps.
        scores: One per seed.
        space: Space of the predictions that were compared.
        at: Indices of the sampler's steps.
        dropped: Tokens beyond the encoder's limit, which the model never saw.
        forwards: Denoiser forwards of one latent (F), without the null prediction, which all prompts share.
        backwards: Backward passes to the embedding (B).
        p: Conformal p-value against ordinary prompts; None: not calibrated.
        threshold: Score at the calibration's false-positive rate; None: not calibrated.
        fpr: That rate.
        accepted: In what the calibration's setting differs from this one, where that was accepted.
    """

    prompt: str
    method: str
    words: tuple[Word, ...]
    extra: Word
    score: float
    scores: tuple[float, ...]
    space: str
    at: tuple[int, ...]
    dropped: int
    forwards: int
    backwards: int
    p: float | None = None
    threshold: float | None = None
    fpr: float | None = None
    accepted: tuple[str, ...] = ()

    @property
    def ranked(self) -> list[Word]:
        """Words with the largest value first; of equals, the earlier one."""
        return sorted(self.words, key=lambda w: -w.value)

    @property
    def above(self) -> bool | None:
        """Whether the score is above the threshold; None: not calibrated."""
        return None if self.threshold is None else self.score > self.threshold

    @property
    def sentence(self) -> str:
        """The score in one sentence; never a verdict."""
        n = len(self.scores)
        what = f"score {self.score:.3f} over {n} seed{'s' if n > 1 else ''}"
        if self.p is None or self.fpr is None or self.threshold is None:
            what += ", not calibrated: only a ranking means something (mnemoscope calibrate)"
        else:
            where = "above" if self.above else "not above"
            what += f", {where} the threshold of {self.threshold:.3f} at {100 * self.fpr:g} % FPR (p = {self.p:.3g})"
        if self.accepted:
            what += f", of a calibration made under another setting ({'; '.join(self.accepted)})"
        return what + (f"; {self.dropped} tokens at the end were cut off" if self.dropped else "")

    def shares(self, *, special: bool = False) -> list[tuple[Word, float]]:
        """Each word with its value as a part of the largest absolute value, in [−1, 1]; with ``special`` the extra one last."""
        shown = [*self.words, *([self.extra] if special else [])]
        most = max((abs(w.value) for w in shown), default=0.0) or 1.0
        return [(w, w.value / most) for w in shown]

    def __repr__(self) -> str:
        top = ", ".join(f"{w.text!r} {w.value:.3g}" for w in self.ranked[:3])
        return f"Explanation({self.prompt[:40]!r}: {self.sentence}; {self.method}: {top})"

    def _repr_html_(self) -> str:
        """A fragment for notebooks: a bar for each word, by place; the figures are written out beside the bars."""
        rows = "".join(
            f'<tr><td>{html.escape(w.text)}</td><td style="text-align:right">{w.value:.4g}</td><td style="min-width:12em">'
            f'<div style="background:{"#31446b" if share > 0 else "#cbba69"};height:.8em;width:{100 * abs(share):.0f}%"></div></td></tr>'
            for w, share in self.shares()
        )
        head = f"<tr><th>word</th><th>{html.escape(self.method)}</th><th></th></tr>"
        return f"<p><b>{html.escape(self.prompt)}</b><br>{html.escape(self.sentence)}</p><table>{head}{rows}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""

        def plain(w: Word) -> dict[str, Any]:
            return {"text": w.text, "start": w.start, "end": w.end, "positions": list(w.positions), "value": w.value}

        return {
            "prompt": self.prompt, "method": self.method, "words": [plain(w) for w in self.words], "extra": plain(self.extra),
            "score": self.score, "scores": list(self.scores), "space": self.space, "at": list(self.at),
            "tokens_dropped": self.dropped, "forwards": self.forwards, "backwards": self.backwards,
            "p": self.p, "threshold": self.threshold, "fpr": self.fpr, "above": self.above, "accepted": list(self.accepted),
        }  # fmt: skip


@dataclass(frozen=True)
class Look:
    """One step of a batch's trajectory, where it is looked at: prompts × seeds, prompt by prompt.

    Attributes:
        x: What the denoiser is shown, ``[sample, channel, height, width]``.
        t: Its time.
        uncond: The null prediction, in the target's space.
        cond: The prompts' own prediction, where the trajectory has made it already.
    """

    x: Latents
    t: Tensor
    uncond: Latents
    cond: Latents | None = None


class Block:
    """A few prompts, encoded, each with all its seeds; what methods reduce gradients with."""

    def __init__(self, target: Target, prompts: Sequence[str], seeds: int):
        self.target, self.prompts, self.seeds = target, list(prompts), seeds
        self.cond, self.null = target.encode(self.prompts), target.encode([""])
        self.rows = repeat(self.cond, seeds)
        self.pieces = [target.pieces(p) for p in self.prompts]
        self.words = [words_of(p, pieces) for p, pieces in zip(self.prompts, self.pieces, strict=True)]
        self.extra = [rest_of(p, pieces) for p, pieces in zip(self.prompts, self.pieces, strict=True)]
        self.most = max(map(len, self.words), default=0)

    @cached_property
    def member(self) -> Float[Tensor, "prompt word token"]:
        """1 where a position belongs to a word; the extra word is the last row, prompts of fewer words have empty ones."""
        rows, columns = self.most + 1, self.cond.tokens.shape[1]
        out = torch.zeros(len(self.prompts), rows, columns)
        for i, (words, extra) in enumerate(zip(self.words, self.extra, strict=True)):
            for j, word in [*enumerate(words), (self.most, extra)]:
                out[i, j, list(word.positions)] = 1
        return out.to(self.away)

    @cached_property
    def away(self) -> Float[Tensor, "prompt token dim"]:
        """e − e_∅."""
        return precise(self.cond.tokens) - precise(self.null.tokens)

    @cached_property
    def dropped(self) -> list[list[str]]:
        """Each prompt without each of its words."""
        return [[without(p, [w]) for w in words] for p, words in zip(self.prompts, self.words, strict=True)]

    @cached_property
    def edits(self) -> Float[Tensor, "prompt word token dim"]:
        """e − e′ for each word, position by position; for the extra word e − e_∅ at its positions."""
        out = self.away[:, None] * self.member[..., None]
        texts = [text for dropped in self.dropped for text in dropped]
        if not texts:
            return out
        encoded, places = precise(self.target.encode(texts).tokens), torch.tensor(self._aligned, device=out.device)
        moved = encoded.gather(1, places[..., None].expand_as(encoded))
        for i, rows in enumerate(moved.split([len(dropped) for dropped in self.dropped])):
            out[i, : len(rows)] = precise(self.cond.tokens[i]) - rows
        return out

    @property
    def _aligned(self) -> list[list[int]]:
        """For each edited prompt, which of its positions stands for each position of the original.

        Without a word all later tokens move up and padding fills the end. A denoiser does not mind where a token stands, so
        the word's own places are compared with what filled the end.
        """
        places = []
        for pieces, words in zip(self.pieces, self.words, strict=True):
            for word in words:
                place = list(range(len(pieces)))
                for first, last in _stretches(pieces, word):
                    stay = [i for i in range(first, last) if i not in word.positions]
                    own = [i for i in word.positions if first <= i < last]
                    for new, old in zip(range(first, last), [*stay, *own], strict=True):
                        place[old] = new
                places.append(place)
        return places

    def per_seed(self, samples: Float[Tensor, " *sample"]) -> Float[Tensor, " *split"]:
        """``[sample, …]`` as ``[prompt, seed, …]``."""
        return samples.unflatten(0, (len(self.prompts), self.seeds))

    def on_path(self, share: float) -> Condition:
        """The prompts with their embeddings at this share of the way from the empty prompt's."""
        return replace(self.rows, tokens=torch.lerp(self.null.tokens, self.rows.tokens, share))


def _stretches(pieces: Sequence[Piece], word: Word) -> Iterator[tuple[int, int]]:
    """From the word's first position in each encoder to one past the encoder's last; encoders stand one after the other."""
    last = 0
    for i in word.positions:
        if i >= last:
            last = _block_end(pieces, i)
            yield i, last


def _block_end(pieces: Sequence[Piece], start: int) -> int:
    """One past the last position that the encoder of position ``start`` filled."""
    i = start + 1
    while (
        i < len(pieces)
        and pieces[i].kind != "start"
        and not (pieces[i].kind in ("text", "end") and pieces[i - 1].kind in ("end", "padding"))
    ):
        i += 1
    return i


def repeat(cond: Condition, n: int) -> Condition:
    """Each row n times in a row."""
    return cond.select(torch.arange(len(cond)).repeat_interleave(n))


Method: TypeAlias = Callable[["Explainer", Block, Look], tuple[PerWord, PerSample | None]]
"""Values of words and the extra one at one step, and the magnitude of each sample where it comes with them."""


def _wen(run: Explainer, block: Block, look: Look) -> tuple[PerWord, PerSample | None]:
    """A word of several tokens counts as one block: the norm over all of them."""
    size, slope = run.gradients(look, block.rows)
    squares = block.per_seed(slope.square().sum(2))
    return torch.einsum("pnt,pwt->pnw", squares, block.member).sqrt().mean(1), size


def _wen_official(run: Explainer, block: Block, look: Look) -> tuple[PerWord, PerSample | None]:
    size, slope = run.gradients(look, block.rows)
    pairs = zip(block.per_seed(size), block.per_seed(slope), strict=True)
    joint = torch.stack([official_significance(d, g) for d, g in pairs])
    return torch.einsum("pt,pwt->pw", joint.square(), block.member).sqrt(), size


def _gradient_input(run: Explainer, block: Block, look: Look) -> tuple[PerWord, PerSample | None]:
    size, slope = run.gradients(look, block.rows)
    return _along(block, slope), size


def _integrated(run: Explainer, block: Block, look: Look) -> tuple[PerWord, PerSample | None]:
    shares = [(i + 0.5) / PATH_POINTS for i in range(PATH_POINTS)]
    terms = [_along(block, run.gradients(look, block.on_path(share))[1]) for share in shares]
    return torch.stack(terms).mean(0), None


def _along(block: Block, slope: TokenGradients) -> PerWord:
    """What moving each word's positions from e_∅ to e adds, to first order."""
    per_token = (block.per_seed(slope).mean(1) * block.away).sum(2)
    return torch.einsum("pt,pwt->pw", per_token, block.member)


def _edit(run: Explainer, block: Block, look: Look) -> tuple[PerWord, PerSample | None]:
    slope = block.per_seed(run.gradients(look, block.on_path(MIDDLE))[1]).mean(1)
    return torch.einsum("ptd,pwtd->pw", slope, block.edits), None


LEAVE_ONE_OUT = "leave-one-out"
GRADIENT_METHODS: dict[str, Method] = {
    "edit": _edit,
    "gradient-input": _gradient_input,
    "integrated-gradients": _integrated,
    "wen": _wen,
    "wen-official": _wen_official,
}
METHODS = (*GRADIENT_METHODS, LEAVE_ONE_OUT)


class Explainer:
    """A model with a bank of starting noises and the null prediction on it, which all prompts share.

    Args:
        target: The model.
        seeds: Number of generations (seeds 0 … n − 1), or the seeds themselves.
        at: Indices of the sampler's steps that explanations average over; 0, the first step, needs no trajectory.
        steps: Length of the sampler's schedule.
        guidance: Guidance scale of the trajectory; default is the target's own.
        base_seed: Another base gives another bank.
        batch_size: Samples that are differentiated at a time; default: by the size of a latent.

    Raises:
        CannotAudit: the model takes no text.
        UsageError: no seed, or a step that the schedule does not have.
    """

    @within(steps=STEPS, guidance=GUIDANCE, base_seed=SEED, batch_size=COUNT)
    def __init__(
        self,
        target: Target,
        *,
        seeds: int | Sequence[int] = 4,
        at: int | Sequence[int] = 0,
        steps: int = 50,
        guidance: float | None = None,
        base_seed: int = 0,
        batch_size: int | None = None,
    ):
        self.target, self.steps, self.base_seed = target, steps, base_seed
        self.guidance = target.guidance if guidance is None else guidance
        self.seeds = seed_numbers(seeds)
        self.at = tuple(
            STEP.judge("a step to look at", step) for step in ((at,) if isinstance(at, int) else sorted(set(at)))
        )
        if not self.seeds:
            raise UsageError("an explanation needs at least one seed; give seeds=4, for instance.")
        if not self.at or self.at[0] < 0 or self.at[-1] >= steps:
            raise UsageError(f"at={list(self.at)}: the sampler's steps are 0 to {steps - 1}; 0 is the first.")
        if not target.has_text:
            raise CannotAudit(
                f"{target.name} takes no text, so there are no words to explain; see its regions instead."
            )
        # A graph takes far more memory than a forward; on Stable Diffusion four samples take about 8 GB.
        self.batch_size = batch_size or max(1, min(64, 65536 // math.prod(target.latent_shape)))
        self.backwards = 0

    @cached_property
    def null(self) -> Condition:
        """The encoded empty prompt, one row."""
        return self.target.encode([""])

    @cached_property
    def noise(self) -> Latents:
        """The bank of starting noises."""
        return self.target.noise(self.seeds, self.base_seed)

    @cached_property
    def first_null(self) -> Latents:
        """The raw null prediction on the bank at the first step; n forwards, once."""
        parts = self.noise.split(self.rows_at_a_time)
        return torch.cat([null_output(self.target, part, self.null, steps=self.steps) for part in parts])

    @property
    def rows_at_a_time(self) -> int:
        """Samples that pass through the denoiser at a time where nothing is differentiated."""
        return 4 * self.batch_size

    def explain(
        self,
        prompts: Sequence[str],
        method: str = DEFAULT,
        *,
        calibration: Calibration | None = None,
        accept_threshold: bool = False,
    ) -> list[Explanation]:
        """One :class:`Explanation` for each prompt.

        Costs at the first step, for each prompt and seed: F + B for ``wen`` and ``gradient-input``, 2F + B for ``edit``,
        9F + 8B for ``integrated-gradients``, 2 + words F for ``leave-one-out``. Later steps add their trajectory.

        Raises:
            UnknownName: no such method.
            UsageError: a calibration made under another setting, or one for other steps; ``wen-official`` elsewhere than at
                the first step.
            ModelFault: the model predicted NaN.
        """
        if method not in METHODS:
            raise UnknownName("method of explanation", method, METHODS)
        if method == "wen-official" and self.at != (0,):
            raise UsageError("wen-official is defined at the first step alone; use at=0, or method='wen'.")
        accepted = self._judged_by(calibration, accept_threshold)
        size = max(1, self.rows_at_a_time // len(self.seeds))
        blocks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        out = [e for block in blocks for e in self._explain(Block(self.target, block, len(self.seeds)), method)]
        if calibration is None:
            return out
        found: dict[str, Any] = {
            "threshold": calibration.threshold,
            "fpr": calibration.record.fpr,
            "accepted": tuple(accepted),
        }
        return [replace(e, p=calibration.p_value(e.score), **found) for e in out]

    def scores(self, prompts: Sequence[str]) -> Float[Tensor, "prompt seed"]:
        """The magnitude of each prompt, mean over the steps, on the CPU. At the first step n forwards for each prompt."""
        size = max(1, self.rows_at_a_time // len(self.seeds))
        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return torch.cat(
            [self._sizes(self.target.encode(list(part))) for part in parts] or [torch.zeros(0, len(self.seeds))]
        )

    def gradients(self, look: Look, rows: Condition) -> tuple[PerSample, TokenGradients]:
        """:func:`gradient` for all samples of a step, a few at a time; exactly 0 where the prompt is the empty one."""
        empty = rows.same_as(self.null)
        places = torch.arange(len(rows)).split(self.batch_size)
        parts = [gradient(self.target, look.x[i], look.t, rows.select(i), look.uncond[i])[:2] for i in places]
        self.backwards += len(rows)
        size, slope = (torch.cat(values) for values in zip(*parts, strict=True))
        return size.masked_fill(empty, 0), slope.masked_fill(empty[:, None, None], 0)

    # Inside.

    def _looks(self, rows: Condition) -> Iterator[Look]:
        """The steps that are looked at, of all samples."""
        copies = len(rows) // len(self.seeds)
        noise = self.noise.repeat(copies, 1, 1, 1)
        plan = self.target.schedule(self.steps)
        if self.at == (0,):
            t = plan.timesteps[0]
            x = plan.scale(plan.start(self.noise), t)
            null = self.target.to_space(self.first_null, x, t)
            yield Look(x.repeat(copies, 1, 1, 1), t, null.repeat(copies, 1, 1, 1))
            return
        first = self.first_null.repeat(copies, 1, 1, 1)
        options: dict[str, Any] = {"steps": self.steps, "guidance": self.guidance, "first_null": first}
        for step in denoise(self.target, noise, rows, self.null, **options):
            if step.index in self.at:
                assert step.uncond is not None
                yield Look(step.x, plan.timesteps[step.index], step.uncond, step.cond)
            if step.index == self.at[-1]:
                return

    def _size_at(self, look: Look, rows: Condition) -> PerSample:
        if look.cond is not None:
            return magnitude(look.cond, look.uncond)
        with torch.no_grad():
            cond = self.target.predict(look.x, look.t, rows)
        return magnitude(same_where(rows.same_as(self.null), look.uncond, cond), look.uncond)

    def _sizes(self, cond: Condition) -> Float[Tensor, "prompt seed"]:
        n = len(self.seeds)
        rows = repeat(cond, n)
        at_each = [self._size_at(look, rows) for look in self._looks(rows)]
        sizes = torch.stack(at_each).mean(0).view(-1, n).cpu()
        self._require_finite(sizes)
        return sizes

    def _require_finite(self, *values: Tensor) -> None:
        """Values that came off the device anyway."""
        if not all(bool(part.isfinite().all()) for part in values):
            raise ModelFault(
                f"{self.target.name} predicted NaN or infinity; load it in float32 or bfloat16, or check the checkpoint."
            )

    def _explain(self, block: Block, method: str) -> list[Explanation]:
        self.first_null  # noqa: B018 (made now, so that its forwards are nobody's)
        before, before_b = self.target.forwards, self.backwards
        if method == LEAVE_ONE_OUT:
            values, sizes = self._leave_one_out(block)
            work = [len(words) + 2 for words in block.words]
        else:
            parts, at_each = [], []
            for look in self._looks(block.rows):
                value, size = GRADIENT_METHODS[method](self, block, look)
                parts.append(value)
                at_each.append(self._size_at(look, block.rows) if size is None else size)
            values, sizes = torch.stack(parts).mean(0).cpu(), block.per_seed(torch.stack(at_each).mean(0)).cpu()
            work = [1] * len(block.prompts)
        self._require_finite(values, sizes)
        forwards, backwards = self.target.forwards - before, self.backwards - before_b
        return [
            Explanation(
                prompt=prompt,
                method=method,
                words=tuple(replace(w, value=v) for w, v in zip(words, row, strict=False)),
                extra=replace(extra, value=row[-1]),
                score=sum(seen) / len(seen),
                scores=tuple(seen),
                space=self.target.space,
                at=self.at,
                dropped=self.target.dropped(prompt),
                forwards=forwards * share // sum(work),
                backwards=backwards * share // sum(work),
            )
            for prompt, words, extra, row, seen, share in zip(
                block.prompts, block.words, block.extra, values.tolist(), sizes.tolist(), work, strict=True
            )
        ]

    def _leave_one_out(self, block: Block) -> tuple[PerWord, Float[Tensor, "prompt seed"]]:
        """The drop of the score, word by word; for the extra word, with the empty prompt's end and padding in its place."""
        rest = block.member[:, -1, :, None].bool()
        swapped = replace(block.cond, tokens=torch.where(rest, block.null.tokens, block.cond.tokens))
        texts = [text for dropped in block.dropped for text in dropped]
        parts = [block.cond, swapped, *([self.target.encode(texts)] if texts else [])]
        size = max(1, self.rows_at_a_time // len(self.seeds))
        cond = Condition.cat(parts)
        sizes = torch.cat([self._sizes(cond.select(i)) for i in torch.arange(len(cond)).split(size)])
        full, ends, *words = sizes.split([len(block.cond), len(block.cond), *map(len, block.dropped)])
        values = torch.zeros(len(block.cond), block.most + 1, dtype=sizes.dtype)
        for i, part in enumerate(words):
            values[i, : len(part)] = full[i].mean() - part.mean(1)
        values[:, -1] = full.mean(1) - ends.mean(1)
        return values, full

    def _judged_by(self, calibration: Calibration | None, accept: bool) -> list[str]:
        if calibration is None:
            return []
        if self.at != tuple(range(len(self.at))):
            raise UsageError(
                f"at={list(self.at)}: thresholds belong to leading steps; look at 0, or at 0 to k, or leave out the calibration."
            )
        setting = setting_of(
            self.target.identity(), guidance=self.guidance, steps=self.steps, window=(0, len(self.at)), seeds=self.seeds,
            seed_mode="shared", base_seed=self.base_seed,
        )  # fmt: skip
        return calibration.check(setting, accept=accept)


def explain_prompt(
    target: Target,
    prompt: str,
    *,
    method: str = DEFAULT,
    seeds: int | Sequence[int] = 4,
    at: int | Sequence[int] = 0,
    steps: int = 50,
    guidance: float | None = None,
    calibration: Calibration | None = None,
    accept_threshold: bool = False,
) -> Explanation:
    """Which words of one prompt make its score. For many prompts keep an :class:`Explainer`.

    Args:
        target: The model.
        prompt: The prompt.
        method: ``edit``, or another of :data:`METHODS`; ``wen`` is the published significance.
        seeds: Number of generations (seeds 0 … n − 1), or the seeds themselves.
        at: Indices of the sampler's steps to average over; 0 is the first.
        steps: Length of the sampler's schedule.
        guidance: Guidance scale; default is the target's own.
        calibration: Scores of ordinary prompts of this model, for a p-value.
        accept_threshold: Use the calibration although it was made under another setting; the result says so.

    Raises:
        As :class:`Explainer` and :meth:`Explainer.explain`.
    """
    run = Explainer(target, seeds=seeds, at=at, steps=steps, guidance=guidance)
    return run.explain([prompt], method, calibration=calibration, accept_threshold=accept_threshold)[0]
