"""What the page asks of a model: a score and its words, what an edit would do, pictures, a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import redaction
from ..audit.batch import Reference, webp
from ..audit.config import AuditConfig, PromptSource
from ..audit.run import Progress, audit
from ..detect.calibrate import Calibration
from ..errors import UsageError
from ..explain.edits import Edit, Suggestion, suggest
from ..explain.regions import score_difference
from ..explain.tokens import Explainer, Explanation
from ..explain.words import Word, without
from ..models.base import Target, Vocabulary
from ..models.sampling import denoise
from ..records.store import Run, free_folder, write_whole
from .drawing import Drawn, Shot
from .session import LONGEST, State

__all__ = ["Example", "Stopped", "Studio", "Tell"]

Tell: TypeAlias = Callable[[int, int], None]
"""Told after each piece of work how many of how many are done; may raise :class:`Stopped`."""

CHOSEN_BY_HAND = "Prompts were chosen by hand, with the scores of earlier ones in sight: shares over them mean nothing."


class Stopped(Exception):
    """The visitor wanted no more of it."""


@dataclass(frozen=True)
class Example:
    """A prompt to begin with, and what is known of it."""

    prompt: str
    known: str


def silent(done: int, asked: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True, eq=False)
class Studio:
    """A model with all that belongs to it, shared by all visitors. One piece of work at a time: the page's queue sees to it.

    Attributes:
        target: The model.
        config: Its settings, as an audit would have them; an exported session is an audit with these.
        calibration: Scores of ordinary prompts; None: the model is not calibrated.
        reference: Pictures a copy could be of; None: not tested.
        among: Words that may replace others; None: the vocabulary of the model's tokenizer.
        examples: Prompts to begin with.
        out: Where run folders are written.

    Raises:
        CannotAudit: the model takes no text.
        UsageError: the calibration was made under another setting, and ``config`` does not accept that.
    """

    target: Target
    config: AuditConfig
    calibration: Calibration | None = None
    reference: Reference | None = None
    among: Collection[str] | None = None
    examples: Sequence[Example] = ()
    out: Path = Path("runs")

    def __post_init__(self) -> None:
        self.look([""])  # what does not fit together is said before anybody visits

    @cached_property
    def explainer(self) -> Explainer:
        """The bank of starting noises, and the null prediction on it."""
        c = self.config
        return Explainer(self.target, seeds=c.seeds, steps=c.steps, guidance=c.guidance, base_seed=c.base_seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What a score depends on besides the model, as a link says it."""
        run = self.explainer
        return {"seeds": len(run.seeds), "steps": run.steps, "guidance": float(run.guidance)}

    def look(self, prompts: Sequence[str]) -> list[Explanation]:
        """Score and words of each prompt. Costs n·(2F + B) each.

        Raises:
            UsageError: a prompt is longer than anybody types.
        """
        for prompt in prompts:
            if len(prompt) > LONGEST:
                raise UsageError(f"the prompt has {len(prompt):,} characters; give one of at most {LONGEST:,}.")
        accept = self.config.accept_threshold
        return self.explainer.explain(prompts, calibration=self.calibration, accept_threshold=accept)

    def changes(self, look: Explanation, word: Word, neighbors: int = 3) -> list[Edit]:
        """What may be done with a word, with the score it would bring: drop it, or replace it by near words. n·F each."""
        near: list[str] = []
        if neighbors and isinstance(self.target, Vocabulary):
            near = self.target.neighbors([word.text], neighbors, self.among)[0]
        edits = [Edit("drop", word.text, "", without(look.prompt, [word]), 0.0)]
        edits += [Edit("replace", word.text, other, without(look.prompt, [word], other), 0.0) for other in near]
        scores = self.explainer.scores([e.prompt for e in edits]).mean(1).tolist()
        return [replace(e, score=score) for e, score in zip(edits, scores, strict=True)]

    def suggest(self, look: Explanation) -> Suggestion:
        """The smallest edit that brings a prompt under its threshold.

        Raises:
            UsageError: the model is not calibrated.
        """
        return suggest(self.explainer, look, among=self.among)

    def draw(self, prompt: str, tell: Tell = silent) -> Drawn:
        """The pictures of a prompt, one for each seed, with the nearest reference of each. Costs n·(2K − 1) forwards.

        Raises:
            Stopped: as ``tell`` says; nothing is left behind.
        """
        run = self.explainer
        cond = self.target.encode([prompt])
        parts = torch.arange(len(run.seeds)).split(run.batch_size)
        maps, pictures = [], []
        for k, part in enumerate(parts):
            rows = part.to(run.noise.device)
            for step in denoise(
                self.target, run.noise[rows], cond.expand(len(part)), run.null, steps=run.steps, guidance=run.guidance,
                first_null=run.first_null[rows], check=True,
            ):  # fmt: skip
                tell(k * run.steps + step.index + 1, len(parts) * run.steps)
            assert step.uncond is not None
            assert step.x_next is not None
            maps.append(score_difference(step.cond, step.uncond).float().cpu())
            pictures.append(self.target.decode(step.x_next))
        return self._compared(prompt, torch.cat(pictures), torch.cat(maps))

    def _compared(self, prompt: str, pictures: Tensor, maps: Tensor) -> Drawn:
        nearest = [None] * len(pictures) if self.reference is None else list(self.reference.nearest(pictures))
        rows = zip(self.explainer.seeds, pictures, nearest, strict=True)
        shots = tuple(Shot(seed, webp(picture), match) for seed, picture, match in rows)
        show = getattr(self.reference, "image", lambda name: None)
        found = {name: show(name) for name in dict.fromkeys(m.reference for m in nearest if m is not None)}
        references = {name: webp(picture) for name, picture in found.items() if picture is not None}
        return Drawn(prompt, shots, references, maps, self.explainer.steps)

    def export(self, states: Sequence[State], tell: Tell = silent) -> Run:
        """The session as a run folder: an audit of its prompts, each in a group of its own that is named after the edit.

        Args:
            states: The history. Pictures are written if any of it was drawn.
            tell: As for :meth:`draw`.

        Returns:
            The run. Its command reads ``prompts.jsonl``, which is in the folder.

        Raises:
            Stopped: as ``tell`` says; the folder is there, and its run is interrupted.
            UsageError: there is nothing to export.
        """
        if not states:
            raise UsageError("there is nothing to export yet; score a prompt first.")
        folder = free_folder(self.out / "studio")
        items: dict[str, dict[str, str]] = {}
        for s in states:  # a prompt that was come back to is one prompt
            items.setdefault(s.prompt, {"id": str(s.number), "prompt": s.prompt, "group": s.group})
        images = any(s.drawn is not None for s in states)
        config = self.config.model_copy(
            update={
                "prompts": PromptSource(items=list(items.values())), "images": images, "out": str(folder),
                "reference": self.config.reference if images else None, "notes": [*self.config.notes, CHOSEN_BY_HAND],
            }
        )  # fmt: skip
        reference = self.reference if images else None
        try:
            run = audit(
                config, target=self.target, reference=reference, progress=_relay(tell), command=_command(config)
            )
        except KeyboardInterrupt as e:
            raise Stopped(str(e)) from None
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items.values())
        write_whole(folder / "prompts.jsonl", lines.encode())
        return run


def _relay(tell: Tell) -> Callable[[Progress], None]:
    """An audit that somebody stops is interrupted, as from a keyboard: it writes down how far it came."""

    def told(p: Progress) -> None:
        try:
            tell(p.done, p.asked)
        except Stopped:
            raise KeyboardInterrupt from None

    return told


def _command(config: AuditConfig) -> str:
    """The command line that repeats an exported session."""
    words = ["mnemoscope", "audit", config.model or "MODEL", "--prompts", f"{config.out}/prompts.jsonl"]
    named = ("seeds", "base_seed", "steps", "guidance", "reference", "calibration", "dtype", "device", "out")
    for name in named:
        if (value := getattr(config, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in config.model_options.items():
        words += ["--model-option", f"{name}={value}"]
    words += [f"--{name.replace('_', '-')}" for name in ("images", "accept_threshold") if getattr(config, name)]
    return redaction.command_line(words)
