"""The attack on embeddings against every mitigation: what comes back, and what of it is the attack's own doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bounds import AMOUNT, COUNT, POSITIVE, SEEDS, within
from ..bounds import STEPS as SCHEDULE
from ..mitigate.base import Generation, Mitigation, build, first_sizes, key_of, sample
from ..mitigate.redteam import LEARNING_RATE, STEPS, attack
from ..models.base import Condition, Target
from ..models.sampling import final
from ..records.trials import NONE, Attack, Case
from ..similarity.base import Pictures
from ..similarity.reference import ReferenceSet

__all__ = ["RedTeam"]


class RedTeam:
    """Attacks pictures once, and samples from what it found under one mitigation after the other.

    An attacker who knows the embedding hands it over as it is, so that whatever edits the prompt's words has nothing to edit: such a
    method is reported with what comes back of it, which is everything.

    Args:
        target: The model.
        cases: Prompts with the name of their training picture.
        pictures: Those pictures, in [0, 1], one for each case.
        controls: Prompts whose pictures were never trained on.
        control_pictures: Those.
        reference: What copies are looked for in; calibrated, and with the trained pictures under the cases' names.
        seeds: Generations of each.
        steps: Length of the sampler's schedule.
        updates: Updates of the attack.
        lr: Its learning rate.
        batch_size: Samples at a time.
    """

    @within(seeds=SEEDS, steps=SCHEDULE, updates=AMOUNT, lr=POSITIVE, batch_size=COUNT)
    def __init__(
        self, target: Target, cases: Sequence[Case], pictures: Pictures, controls: Sequence[Case],
        control_pictures: Float[Tensor, "control 3 height width"],
        reference: ReferenceSet, *, seeds: int = 2, steps: int = 50, updates: int = STEPS, lr: float = LEARNING_RATE,
        batch_size: int = 32,
    ):  # fmt: skip
        self.target, self.reference, self.seeds, self.steps = target, reference, seeds, steps
        self.cases, self.controls, self.batch_size = list(cases), list(controls), batch_size
        self._own = torch.cat([pictures, control_pictures])
        self._limit = reference.threshold
        self.found, self.losses = self._attacked(updates, lr)

    def _attacked(self, updates: int, lr: float) -> tuple[Condition, Float[Tensor, "step picture"]]:
        """Embeddings for all pictures, controls last."""
        every, parts, losses = [*self.cases, *self.controls], [], []
        for rows in torch.arange(len(every)).split(self.batch_size):
            some = [every[i] for i in rows.tolist()]
            start, x0 = self.target.encode([c.prompt for c in some]), self.target.encode_images(self._own[rows])
            keys = tuple(key_of(c.id, 0) for c in some)
            found, loss = attack(self.target, x0, start, keys, steps=updates, lr=lr)
            parts.append(found)
            losses.append(loss)
        return Condition.cat(parts), torch.cat(losses, 1)

    def against(
        self,
        method: str = NONE,
        options: Mapping[str, Any] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Attack:
        """What comes back under one mitigation; it is applied to every sample, not gated.

        Args:
            method: Name of an installed mitigation, or ``none``.
            options: Of it.
            progress: Told how many samples are done.
        """
        made = None if method == NONE else build(method, options)
        value = None if made is None else getattr(made, made.strength, None)
        before: list[bool] = []
        after: list[bool] = []
        controls: list[bool] = []
        sizes: list[float] = []
        done = 0
        for rows, part in self._generations(attacked=False):
            before += self._copies(self._sampled(made, part), rows)
            done += len(rows)
            if progress is not None:
                progress(done)
        for rows, part in self._generations(attacked=True):
            if part.prompts is None and made is not None and "prompts" in made.needs:
                shown = self._sampled(None, part)  # there are no words to edit
            else:
                shown = self._sampled(made, part)
            hits, size = self._copies(shown, rows), first_sizes(self.target, part)[0].tolist()
            for i, hit, d in zip(rows, hits, size, strict=True):
                (after if i < len(self.cases) else controls).append(hit)
                if i < len(self.cases):
                    sizes.append(d)
            done += len(rows)
            if progress is not None:
                progress(done)
        strength = None if value is None else float(value)
        return Attack(method, dict(options or {}), strength, before, after, controls, [round(d, 5) for d in sizes])

    def _generations(self, *, attacked: bool) -> Iterator[tuple[list[int], Generation]]:
        """Batches: which picture each sample is of, and the generation; attacked ones are known by their embedding alone."""
        n = len(self.cases) + (len(self.controls) if attacked else 0)
        every = [(i, s) for i in range(n) for s in range(self.seeds)]
        for start in range(0, len(every), self.batch_size):
            some = every[start : start + self.batch_size]
            rows, seeds = [i for i, _ in some], [s for _, s in some]
            prompts = [[*self.cases, *self.controls][i].prompt for i in rows]
            g = Generation.of(self.target, prompts, seeds, steps=self.steps)
            if attacked:
                g = replace(g, cond=self.found.select(torch.tensor(rows)), prompts=None)
            yield rows, g

    def _sampled(self, method: Mitigation | None, g: Generation) -> Pictures:
        return self.target.decode(final(sample(self.target, g if method is None else method.prepare(self.target, g))))

    def _copies(self, shown: Pictures, rows: Sequence[int]) -> list[bool]:
        """Whether each picture is a copy of the very picture that was attacked, trained on or not."""
        describe = self.reference.descriptor
        own = describe(self._own[list(rows)])
        assert self._limit is not None
        return ((describe(shown) * own).sum(1) > self._limit).tolist()
