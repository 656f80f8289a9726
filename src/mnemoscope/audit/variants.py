"""Prompts that controls are made of: labeled prompts in other letters, and memorized pictures under another caption.

A variant is a prompt like any other, with rows of its own, but no part of what was asked: it has no label, so that it enters
no AUC by itself, and ``control`` and ``origin`` say what it is for and which prompt it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import UsageError
from .prompts import Prompt, PromptSet

__all__ = ["RESTYLED", "with_controls"]

RESTYLED: dict[str, Callable[[str], str]] = {"case-fold": str.lower, "title-case": str.title}
"""Controls that change a prompt's letters and none of its words."""


def with_controls(prompts: PromptSet, controls: Sequence[str]) -> PromptSet:
    """The prompts, and those that the controls need besides.

    * ``case-fold``, ``title-case``: every labeled prompt in lower case, or With Every Word Capitalized.
    * ``swap``: for every prompt labeled memorized, the caption under ``swap`` in its source. A caption is not made up here: which
      other words describe the picture, and were not shown with it, only the source can know.
    * Other controls need no further prompt.

    Raises:
        UsageError: the labels do not name prompts of both kinds, or no memorized prompt has another caption.
    """
    if not controls:
        return prompts
    labels = {p.label for p in prompts}
    if not {True, False} <= labels:
        known = "memorized" if True in labels else "ordinary" if False in labels else "either"
        raise UsageError(
            f"controls compare prompts known to be memorized with ordinary ones, and {prompts.source} "
            f"{'labels none as' if known == 'either' else 'labels prompts only as'} {known}; add a column of labels, or leave "
            f"controls out."
        )
    made: dict[str, Prompt] = {p.text: p for p in prompts}
    notes: list[str] = []
    for control in controls:
        asked = _variants(prompts, control)
        new = [v for v in asked if made.setdefault(v.text, v) is v]
        if len(new) < len(asked):
            notes.append(
                f"control {control}: {len(asked) - len(new)} of {len(asked)} prompts add no row, because their text is there already"
            )
    return PromptSet(tuple(made.values()), prompts.source, (*prompts.notes, *notes), prompts.taken)


def _variants(prompts: PromptSet, control: str) -> list[Prompt]:
    if control == "swap":
        found = [_variant(p, control, p.swap) for p in prompts if p.label and p.swap]
        if not found:
            raise UsageError(
                f"the control swap needs another caption of each memorized prompt's picture, and {prompts.source} has none; "
                f"add them as a column named swap, or leave swap out."
            )
        return found
    restyle = RESTYLED.get(control)
    return [] if restyle is None else [_variant(p, control, restyle(p.text)) for p in prompts if p.label is not None]


def _variant(prompt: Prompt, control: str, text: str) -> Prompt:
    return Prompt(
        id=f"{prompt.id}/{control}",
        text=text,
        group=f"control: {control}",
        family=prompt.family,
        control=control,
        origin=prompt.id,
    )
