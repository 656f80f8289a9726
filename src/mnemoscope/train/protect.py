"""The parts of :mod:`mnemoscope.mitigate` that protect a training, put together as its settings say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import stats
from ..errors import UsageError
from ..mitigate.base import generator, key_of
from ..mitigate.canaries import CanaryPlan
from ..mitigate.captions import STYLES, CaptionAugmentation, TokenizerWords
from ..mitigate.timesteps import TimestepThresholds
from ..mitigate.training import MemorizationFilter, Rule
from ..mitigate.visits import RunningScores
from .cache import Captions, LatentCache
from .config import TrainConfig
from .draws import Draws
from .trainee import Objective, Trainee

__all__ = ["Split", "augmentation", "clean_thresholds", "memorization_filter", "split"]

KEEP_ALL = 1e30
"""τ of a filter that is only asked for magnitudes."""


@dataclass(frozen=True)
class Split:
    """What each picture of a training set is for.

    Attributes:
        listing: Rows of one epoch; a canary is in it as often as planned.
        heldout: Rows that are not trained on, for magnitudes of clean pictures.
        plan: The canaries; None: there are none.
    """

    listing: tuple[int, ...]
    heldout: tuple[int, ...] = ()
    plan: CanaryPlan | None = None


def split(config: TrainConfig, texts: Sequence[tuple[str, ...]]) -> Split:
    """Draw canaries and held-out pictures.

    Args:
        config: The training.
        texts: Captions of each picture.

    Raises:
        UsageError: too few pictures are left.
    """
    counts: dict[str, int] = {}
    for several in texts:
        for text in several:
            counts[text] = counts.get(text, 0) + 1
    # A caption of two pictures would be two reasons for one generation.
    alone = [i for i, several in enumerate(texts) if all(counts[text] == 1 for text in several)]
    plan = CanaryPlan.draw(len(texts), config.canaries, candidates=alone, seed=config.seed) if config.canaries else None
    planted = {c.row for c in plan.canaries} if plan else set()
    heldout: set[int] = set()
    if config.needs_clean and config.clean is None:
        free = [i for i in range(len(texts)) if i not in planted]
        order = torch.randperm(len(free), generator=generator(key_of("held out", 0, config.seed), "order")).tolist()
        heldout = {free[place] for place in order[: round(config.heldout * len(texts))]}
    rows = range(len(texts)) if plan is None else plan.indices()
    listing = tuple(row for row in rows if row not in heldout)
    if not listing:
        raise UsageError("no picture is left to train on after canaries and held-out pictures; give more pictures.")
    return Split(listing, tuple(sorted(heldout)), plan)


def augmentation(config: TrainConfig, trainee: Trainee) -> CaptionAugmentation:
    """What happens to captions; without ``augment``, one of a picture's captions is drawn."""
    style = config.augment if config.augment in STYLES else None
    vocabulary = TokenizerWords(trainee.pipe.tokenizer)
    return CaptionAugmentation(style, config.augment_count, vocabulary=vocabulary, seed=config.seed)


def memorization_filter(
    config: TrainConfig, trainee: Trainee, null: Tensor, clean: TimestepThresholds | None, pictures: int
) -> MemorizationFilter | None:
    """The filter of a training, with running scores if asked for; None: neither is."""
    if config.filter is None and config.running_scores is None:
        return None
    scores = None
    if config.running_scores is not None:
        assert clean is not None  # the configuration asked for them
        scores = RunningScores(pictures, clean, action=config.running_scores)
    rule: float | Rule = KEEP_ALL
    if isinstance(config.filter, float):
        rule = config.filter
    elif config.filter is not None:
        assert clean is not None
        rule = clean
    return MemorizationFilter.of_unet(trainee.unet, trainee.scheduler, null, rule, scores=scores)


@torch.no_grad()
def clean_thresholds(
    config: TrainConfig,
    trainee: Trainee,
    objective: Objective,
    latents: LatentCache,
    captions: Captions,
    rows: Sequence[int],
    source: str,
) -> TimestepThresholds:
    """τ(t) from magnitudes of clean pictures, noised as in training, by the model as it is now.

    Args:
        config: The training.
        trainee: The model.
        objective: Its forward process.
        latents: Of the set that the clean pictures are in.
        captions: Of that set.
        rows: The clean pictures.
        source: What they are, in words.

    Costs 2 F for each of ``filter_ranges`` × 64 magnitudes, or more where ``filter_drop`` is small.

    Raises:
        UsageError: there are too few pictures for the rate.
    """
    least = stats.least_ordinary(config.filter_drop)
    if len(rows) < least:
        raise UsageError(
            f"{len(rows)} clean pictures, and dropping at most {100 * config.filter_drop:g} % of clean samples needs {least} or more: "
            f"give more with clean or heldout, or a larger filter-drop."
        )
    look = MemorizationFilter.of_unet(trainee.unet, trainee.scheduler, captions.null, KEEP_ALL)
    horizon, ranges = objective.scheduler.config["num_train_timesteps"], config.filter_ranges
    draws = Draws(
        rows,
        trainee.target.latent_shape,
        horizon=horizon,
        seed=key_of("clean", 0, config.seed),
        flip=False,
        dropout=0.0,
    )
    per_range = max(64, 4 * least)
    sizes, times = [], []
    for start in range(0, ranges * per_range, config.batch_size):
        visits = draws.visits(start, min(config.batch_size, ranges * per_range - start))
        # Every range has equally many: within its own, a time is where it was drawn among all.
        place = torch.arange(start, start + len(visits.t)) % ranges
        t = ((place + visits.t / horizon) * horizon / ranges).long().clamp(max=horizon - 1)
        device = trainee.target.device
        x0 = latents.draw(visits.rows, visits.mirrored, visits.posterior).to(device)
        x = objective.noised(x0, visits.noise.to(device), t.to(device))
        tokens = captions.tokens(visits.rows, visits.blank, visits.places)
        output = trainee.unet(x, t.to(device), tokens, return_dict=False)[0]
        sizes.append(look(x, t.to(device), output, cond=tokens).sizes)
        times.append(t)
    return TimestepThresholds.fit(
        torch.cat(sizes), torch.cat(times), drop=config.filter_drop, ranges=ranges, horizon=horizon, source=source
    )
