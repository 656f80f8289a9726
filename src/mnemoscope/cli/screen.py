"""What a terminal shows: talk and logs on stderr, data on stdout, plain when piped.

Whatever a command prints passes here, line by line, so that no value of a stranger drives the terminal or begins a line of ours.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from .. import interrupts, redaction
from ..terminal import guarded, json_safe, one_line, unguarded, visible
from . import output

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ..models.base import Target
    from ..report.summary import Summary

log = logging.getLogger(__name__)

QUIET = False
"""Set by ``--quiet``: nothing but results and errors."""

STOPPED = False
"""Set once it was said that Ctrl-C ended the command."""


def enabled(variable: str) -> bool:
    """Whether an environment variable is switched on, as huggingface_hub reads its own."""
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def log_to_stderr(verbosity: int) -> None:
    """Python's logging, ours and the libraries', on stderr: 1 is INFO, 2 DEBUG, 0 leaves it as it is."""
    if verbosity:
        handler = logging.StreamHandler()
        handler.setFormatter(output.FORMAT)
        logging.root.addHandler(handler)
        logging.root.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)


def command() -> str:
    """The command line that repeats what runs, without secrets."""
    return redaction.command_line(["mnemoscope", *sys.argv[1:]])


def show(text: object = "") -> None:
    """A line of results on stdout."""
    print(one_line(str(text)), flush=True)


def show_lines(text: str) -> None:
    """Several lines of results on stdout, of a text whose values were written so that none of them breaks a line."""
    for line in text.split("\n"):
        show(line)


def say(text: str) -> None:
    """A line of talk on stderr."""
    if not QUIET:
        print(one_line(text), file=output.own_stderr(), flush=True)


def say_loading(text: str) -> None:
    """What is opened now, said before torch is imported; until :func:`say_target` or :func:`stoppable`, Ctrl-C ends at once."""
    say(text)
    interrupts.begin_loading()


def say_target(target: Target) -> None:
    """Which model runs where, in what precision and why."""
    interrupts.end_loading()
    reason = getattr(target, "dtype_reason", "")
    say(f"{target.name} on {target.device}, {reason or str(target.dtype).removeprefix('torch.')}")


def fail(text: str) -> None:
    """An error sentence on stderr, quiet or not."""
    print(f"mnemoscope: {one_line(redaction.text(text))}", file=output.own_stderr(), flush=True)


def show_json(value: Any) -> None:
    """One JSON document on stdout, the same on every terminal: what it cannot show is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=not speaks_unicode(), allow_nan=False)
    print(json_safe(text), flush=True)


def speaks_unicode() -> bool:
    """Whether stdout takes all characters."""
    return "utf" in (sys.stdout.encoding or "").lower()


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), wrap: bool = False
) -> None:
    """A table on a terminal (a line per row, cut at its edge, unless cells may wrap), tab-separated values when piped."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            print("\t".join(one_line(c) for c in row))
        return
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        drawn.add_column(
            Text(one_line(name)), justify="right" if i in right else "left", overflow="ellipsis", no_wrap=not wrap
        )
    for row in rows:
        drawn.add_row(*(Text(one_line(c)) for c in row))
    _console(sys.stdout).print(drawn)


def _console(stream: Any) -> Console:
    """What draws on a terminal: its texts are cleaned, and mean nothing but themselves; its own escape sequences reach the stream."""
    from rich.console import Console
    from rich.segment import Segment

    class Cleaned(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            """Segments of text, each written out, and of control."""
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return Cleaned(file=unguarded(stream), markup=False, emoji=False, highlight=False)


def show_summary(summary: Summary, *, most: int = 12) -> None:
    """The headline, the worst prompts, and what was not tested."""
    show(summary.headline)
    if summary.subline:
        show(summary.subline)
    show()
    rows = [
        [
            "–" if f.score is None else f"{f.score:.3f}",
            "–" if f.p is None else f"{f.p:.3g}",
            f"{f.copies}/{f.compared}" if f.compared else "–",
            f.prompt or "(empty prompt)",
            f"{f.best.reference} {f.best.similarity:.2f}" if f.best else "–",
        ]
        for f in summary.findings[:most]
    ]
    table(["score", "p", "copies", "prompt", "nearest"], rows, right=(0, 1, 2))
    if len(summary.findings) > most:
        show(f"… and {len(summary.findings) - most} more prompts")
    show()
    for g in summary.groups:
        above = "not tested" if g.above is None else f"{g.above.k}/{g.above.n} above threshold"
        copies = "not tested" if g.copies is None else f"{g.copies.k}/{g.copies.n} with a copy found"
        show(f"  {g.name}: {above}, {copies}")
    for d in summary.discrimination:
        show(f"  {d.name}: AUC {d.auc}, TPR below 1 % FPR {d.tpr} ({d.positives} against {d.negatives} prompts)")
    for c in summary.controls:
        found = "not measured" if c.auc is None else f"AUC {c.auc} ({c.positives} against {c.negatives} prompts)"
        show(f"  {c.name}, {c.words}: {found}{f'; {c.note}' if c.note else ''}")
    for sentence in summary.untested:
        say(f"Note: {sentence}")


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C says what is saved. Caught here, because typer would turn it into a bare exit code."""
    global STOPPED
    interrupts.end_loading()
    try:
        yield
    except KeyboardInterrupt as e:
        fail(str(e) or "stopped; the same command continues")
        STOPPED = True
        raise typer.Exit(interrupts.STOPPED) from None


@contextmanager
def progress(what: str) -> Iterator[Callable[[Any], None]]:
    """A progress bar on a terminal, a line now and then elsewhere; hands out what an audit calls after each batch."""
    logs = logging.root.isEnabledFor(logging.INFO)  # their lines would tear a bar
    bar = sys.stderr.isatty() and not logs and not enabled("HF_HUB_DISABLE_PROGRESS_BARS")
    with (_silent if QUIET else _bar if bar else _lines)(what) as show:

        def update(p: Any) -> None:
            log.debug("%s: %s", what, p)
            show(p)

        yield update


@contextmanager
def _silent(what: str) -> Iterator[Callable[[Any], None]]:
    yield lambda p: None


@contextmanager
def _bar(what: str) -> Iterator[Callable[[Any], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    talk = TextColumn("{task.fields[talk]}", markup=False)
    # While the bar stands, lines that are printed are drawn above it by rich, which reads escape sequences and must be given none.
    with Progress(*columns, talk, console=_console(sys.stderr)) as bar, guarded():
        task = bar.add_task(one_line(what), total=None, talk="")

        def update(p: Any) -> None:
            bar.update(task, completed=p.done, total=p.asked, talk=one_line(_talk(p)))
            if p.note:
                bar.console.print(one_line(p.note))

        yield update


@contextmanager
def _lines(what: str, every: float = 10.0) -> Iterator[Callable[[Any], None]]:
    last = time.monotonic()

    def update(p: Any) -> None:
        nonlocal last
        if p.note:
            say(p.note)
        ended = p.asked is not None and p.done >= p.asked
        if ended or time.monotonic() - last >= every:
            last = time.monotonic()
            if p.asked is None:  # nobody knows where it will end
                say(f"{what}: {p.done} pictures")
                return
            eta = "" if p.eta is None or ended else f", {duration(p.eta)} left"
            say(f"{what}: {p.done}/{p.asked} {getattr(p, 'unit', 'samples')}{eta}{', ' + _talk(p) if _talk(p) else ''}")

    yield update


def _talk(p: Any) -> str:
    """What a training says of itself; of others hits and errors, where there are any."""
    if (own := getattr(p, "talk", None)) is not None:
        return str(own)
    return ", ".join(f"{n} {word}" for n, word in ((p.hits, "hits"), (p.errors, "failed")) if n)


def duration(seconds: float) -> str:
    """``41 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """``3.1 MB``."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
