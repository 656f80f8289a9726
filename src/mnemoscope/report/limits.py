"""What a run did not test, and why: the sentences that keep a report honest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import stats
from ..errors import UsageError
from ..records.schema import Manifest, Thresholds
from ..records.tally import Tally
from .findings import Finding
from .words import percent, prompts, verb


def untested(
    manifest: Manifest,
    tally: Tally,
    findings: Sequence[Finding],
    thresholds: Thresholds | None,
    seeds: int,
    *,
    needed: int,
    rounding: float,
    foreign: Sequence[str],
    variants: Sequence[Finding] = (),
) -> Iterator[str]:
    """Sentences, the gravest first; what the run itself noted comes last, as it stands.

    Args:
        manifest: The run's manifest.
        tally: How far the run is, counted from its rows.
        findings: All prompts.
        thresholds: What they are judged by.
        seeds: Seeds per prompt.
        needed: Seeds that a prompt must have to be judged.
        rounding: Relative rounding within which a score is borderline.
        foreign: Where the threshold was made under another setting than the run's.
        variants: Prompts that controls made from others.
    """
    yield from _missing(tally, [*findings, *variants])
    if variants:
        yield f"{prompts(len(variants))} made for controls {verb(len(variants), 'is', 'are')} no part of the numbers above."
    if thresholds is not None:
        yield from _judgment(findings, needed, rounding)
        yield from _warrant(thresholds, foreign)
    elif any(f.score is not None for f in findings):
        yield (
            "Scores are not calibrated for this model: their order means something, a verdict does not. "
            "`mnemoscope calibrate` makes a threshold."
        )
    yield from _comparison(findings, manifest.config.get("reference"))
    cut = sum(f.dropped > 0 for f in findings)
    if cut:
        yield f"{prompts(cut)} {verb(cut, 'has', 'have')} more tokens than the encoder can see; what lies beyond was not tested."
    if seeds and any(f.compared for f in findings):
        tried = f"{seeds} {verb(seeds, 'is', 'are')} tried"
        yield f"Other seeds: a prompt that gives a copy in 1 of 10 seeds is missed with probability {percent(0.9**seeds)} when {tried}."
    yield from manifest.notes


def _missing(tally: Tally, findings: Sequence[Finding]) -> Iterator[str]:
    """Samples that are not there, failed, or are not the run's own."""
    rows, failed = sum(f.seeds + f.failed for f in findings), sum(f.failed for f in findings)
    if tally.status != "done":
        yield f"The run is {tally.status}: {tally.words}."
    for fault in tally.faults:
        yield f"The run contradicts itself: {fault}."
    if failed:
        lost = sum(not f.seeds for f in findings)
        with_none = f", and {prompts(lost)} {verb(lost, 'has', 'have')} no result at all" if lost else ""
        yield f"{failed:,} of {rows:,} samples failed{with_none}."


def _judgment(findings: Sequence[Finding], needed: int, rounding: float) -> Iterator[str]:
    """Which prompts the threshold says nothing about, or nothing firm."""
    few = sum(f.score is not None and f.above is None for f in findings)
    if few:
        yield (
            f"{prompts(few)} {verb(few, 'has', 'have')} other than the {prompts(needed, 'seed')} that it takes to be judged, "
            f"and {verb(few, 'was', 'were')} not judged."
        )
    close = sum(f.borderline for f in findings)
    if close:
        yield (
            f"{prompts(close)} {verb(close, 'is', 'are')} borderline, within rounding ({percent(rounding)}) of the threshold: "
            f"another machine may call {verb(close, 'it', 'them')} differently."
        )


def _warrant(thresholds: Thresholds, foreign: Sequence[str]) -> Iterator[str]:
    """How far the threshold's rate can be relied on."""
    if foreign:
        yield (
            f"The threshold was made under another setting and may mean nothing here ({'; '.join(foreign)}): "
            f"its false-positive rate and the p-values hold there."
        )
        return
    n = len(thresholds.scores)
    try:
        true = stats.realized_fpr(n, thresholds.fpr)
    except UsageError:  # a file whose scores cannot carry its own rate; its threshold is shown as it stands
        return
    yield (
        f"The threshold rests on {prompts(n, 'ordinary prompt')}: its true false-positive rate lies between "
        f"{percent(true.low)} and {percent(true.high)} (95 %), and no p-value can be below {1 / (n + 1):.2g}."
    )


def _comparison(findings: Sequence[Finding], reference: Any) -> Iterator[str]:
    """What looking for copies left out."""
    if all(f.best is None for f in findings):
        yield "No reference images were given, so whether an image is a copy was not tested."
        return
    left = sum(not f.compared for f in findings)
    if left == len(findings):
        yield "The descriptor is not calibrated, so similarities are listed and no copy is called."
    elif left:
        yield f"{prompts(left)} of {len(findings):,} {verb(left, 'has', 'have')} no image that was compared with references."
    if any(f.copies and not f.layouts for f in findings):
        yield "Verbatim copies and copies of a template were not told apart."
    size = reference.get("pictures") if isinstance(reference, dict) else None
    among = f"Copies were looked for among {prompts(size, 'reference image')}. " if isinstance(size, int) else ""
    yield f"{among}A copy of an image outside the reference set cannot be found."
