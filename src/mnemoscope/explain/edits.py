"""The smallest word edit that brings a prompt under its threshold, found greedily with few forwards.

Words are tried in the order of their significance, each dropped and replaced by near words of the model's own vocabulary, one
batch per word; the first batch that holds a prompt under the threshold ends the search. If no single edit does, the best
one is kept and the words that are left are tried on top of it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..bounds import AMOUNT, COUNT, FINITE, within
from ..errors import UsageError
from ..models.base import Target, Vocabulary
from .tokens import DEFAULT, Explainer, Explanation
from .words import without, without_markup, without_signs

Near: TypeAlias = Callable[[list[str]], list[list[str]]]
"""Words near to each word."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a prompt.

    Attributes:
        kind: ``drop``, ``replace``, ``markup`` (HTML taken out) or ``signs`` (punctuation taken out).
        old: What stood there.
        new: What stands there now; empty where something was dropped.
        prompt: The whole prompt after it.
        score: Its score.
    """

    kind: str
    old: str
    new: str
    prompt: str
    score: float

    @property
    def words(self) -> str:
        """The change as one says it."""
        if self.kind == "replace":
            return f"replace {self.old!r} by {self.new!r}"
        return f"drop {self.old!r}" if self.kind == "drop" else f"take out the {self.old}"


@dataclass(frozen=True)
class Suggestion:
    """Edits, one on top of the other, and what they did to the score.

    Attributes:
        prompt: Before.
        edits: The edits that were kept; empty: none was needed, or none helped.
        before: Score before.
        threshold: What it should come under.
        alternatives: Other edits of the last step that come under it, lowest score first.
        forwards: Denoiser forwards of one latent (F) spent on candidates.
    """

    prompt: str
    edits: tuple[Edit, ...]
    before: float
    threshold: float
    alternatives: tuple[Edit, ...]
    forwards: int

    @property
    def after(self) -> float:
        """Score after all edits."""
        return self.edits[-1].score if self.edits else self.before

    @property
    def text(self) -> str:
        """The prompt after all edits."""
        return self.edits[-1].prompt if self.edits else self.prompt

    @property
    def under(self) -> bool:
        """Whether the score is under the threshold now."""
        return self.after <= self.threshold

    @property
    def words(self) -> str:
        """The result in one sentence."""
        if not self.edits:
            state = "is not above" if self.under else "stays above the threshold whatever was tried; it is above"
            return f"score {self.before:.3f} {state} {self.threshold:.3f}: nothing to edit"
        done = ", ".join(e.words for e in self.edits)
        where = "not above" if self.under else "still above"
        return f"{done}: score {self.before:.3f} → {self.after:.3f}, {where} {self.threshold:.3f} ({self.forwards} forwards)"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.words)}<br><b>{html.escape(self.text)}</b></p>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""

        def plain(e: Edit) -> dict[str, Any]:
            return {"kind": e.kind, "old": e.old, "new": e.new, "prompt": e.prompt, "score": e.score}

        return {
            "prompt": self.prompt, "text": self.text, "before": self.before, "after": self.after, "threshold": self.threshold,
            "under": self.under, "edits": [plain(e) for e in self.edits], "alternatives": [plain(e) for e in self.alternatives],
            "forwards": self.forwards, "words": self.words,
        }  # fmt: skip


@within(threshold=FINITE, most_edits=COUNT, most_words=COUNT, neighbors=AMOUNT)
def suggest(
    run: Explainer,
    explained: Explanation,
    threshold: float | None = None,
    *,
    most_edits: int = 3,
    most_words: int = 8,
    neighbors: int = 3,
    among: Collection[str] | None = None,
) -> Suggestion:
    """Edit words until the score is under the threshold.

    Args:
        run: What made the explanation; its bank of noises is used again, so that scores compare.
        explained: Where to begin: words are tried by their value, largest first.
        threshold: What to come under; default is the explanation's own.
        most_edits: How many edits on top of each other.
        most_words: How many words are tried at each of them.
        neighbors: Replacements tried for each word, where the target knows its vocabulary; 0: only drop.
        among: Words that may replace others; default: the vocabulary of the model's tokenizer.

    Returns:
        A :class:`Suggestion`; at the first step each candidate costs n forwards.

    Raises:
        UsageError: there is no threshold.
    """
    limit = explained.threshold if threshold is None else threshold
    if limit is None:
        raise UsageError("an edit needs a threshold to come under: calibrate the model, or give threshold=….")
    before, near = run.target.forwards, _near(run.target, neighbors, among)
    edits: list[Edit] = []
    alternatives: list[Edit] = []
    now, score = explained, explained.score
    # wen-official is for comparison with published numbers; any ranking of words serves here.
    method = DEFAULT if explained.method == "wen-official" else explained.method
    while score > limit and len(edits) < most_edits and now.words:
        tried: list[Edit] = []
        for candidates in _candidates(now, most_words, near, signs=not edits):
            tried += _scored(run, candidates)
            if any(e.score <= limit for e in tried):
                break
        alternatives = sorted((e for e in tried if e.score <= limit), key=lambda e: e.score)
        best = _least(alternatives) or min(tried, key=lambda e: e.score, default=None)
        if best is None or best.score >= score:
            break
        edits.append(best)
        score = best.score
        if score > limit and len(edits) < most_edits:
            now = run.explain([best.prompt], method)[0]
    others = tuple(e for e in alternatives if e not in edits)
    return Suggestion(explained.prompt, tuple(edits), explained.score, limit, others, run.target.forwards - before)


def _candidates(now: Explanation, most: int, near: Near, *, signs: bool) -> Iterator[list[Edit]]:
    """Batches of edits to try, without their scores: signs before words, then word by word."""
    if signs and (first := _signs(now.prompt)):
        yield first
    words = [w for w in now.ranked if any(c.isalnum() for c in w.text)][:most]
    for word, others in zip(words, near([w.text for w in words]), strict=True):
        dropped = Edit("drop", word.text, "", without(now.prompt, [word]), 0.0)
        replaced = [Edit("replace", word.text, o, without(now.prompt, [word], o), 0.0) for o in others]
        yield [dropped, *replaced]


def _near(target: Target, k: int, among: Collection[str] | None) -> Near:
    """What may stand in the place of each word; nothing for a target that does not know its vocabulary."""
    if k and isinstance(target, Vocabulary):
        return lambda words: target.neighbors(words, k, among)
    return lambda words: [[] for _ in words]


def _signs(prompt: str) -> list[Edit]:
    """Taking out what no reader would miss."""
    bare = without_markup(prompt)
    plain = without_signs(bare)
    found = [Edit("markup", "markup", "", bare, 0.0)] if bare != prompt else []
    return found + ([Edit("signs", "punctuation", "", plain, 0.0)] if plain not in (bare, prompt) else [])


def _scored(run: Explainer, candidates: Sequence[Edit]) -> list[Edit]:
    scores = run.scores([e.prompt for e in candidates]).mean(1).tolist()
    return [Edit(e.kind, e.old, e.new, e.prompt, score) for e, score in zip(candidates, scores, strict=True)]


def _least(found: Sequence[Edit]) -> Edit | None:
    """Of edits that do, the one that changes least: signs, then a replaced word, then a dropped one; then the lowest score."""
    order = ("markup", "signs", "replace", "drop")
    return min(found, key=lambda e: (order.index(e.kind), e.score), default=None)
