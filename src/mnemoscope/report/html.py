"""The report: one self-contained page, and the same numbers as Markdown and JSON.

The page has no script and asks nothing of any server: styles and figures are inline, pictures are data URIs, and a content
security policy holds it to that. Prompts are hostile input; they enter through jinja2's escaping and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..errors import UsageError
from ..records.store import write_whole
from ..stats import Interval, Roc
from . import plots
from .archive import sha256_file
from .findings import Finding
from .measured import Beside, beside, beside_run, plain
from .pictures import Picture, Pictures
from .regions import read_regions
from .summary import Group, Summary, read_summary
from .words import NO_GROUP, percent, printable

__all__ = ["write_json", "write_markdown", "write_report"]

Folder = str | Path
SHOWN = 12
"""How many of the worst prompts are shown with their pictures."""
SEEDS_SHOWN = 3
"""How many further seeds of a prompt are shown beside the nearest one."""
ROWS = 7
"""How many groups the distribution figure has room for; the smallest of more are drawn together."""
GROUPS = 60
"""How many groups the group table lists."""


def write_report(
    run_folder: Folder | Sequence[Folder],
    out: Folder | None = None,
    reference_pictures: Folder | Mapping[str, Path] | None = None,
    *,
    blur: bool = True,
    shown: int = SHOWN,
    detector: str | None = None,
) -> Path:
    """Write ``report.html``.

    Args:
        run_folder: A run folder, or several: the page then begins with a table that compares them.
        out: The file to write; default is ``report.html`` in the run folder (``comparison.html`` in the first of several).
        reference_pictures: Where reference pictures are when the run did not keep them: a folder whose file names, with or
            without extension, are the reference ids, or a mapping from ids to files.
        blur: Blur found copies until they are pointed at, focused or clicked. The blur is a style: whoever has the file has the
            pictures.
        shown: How many of the worst prompts are shown with pictures. Memory and page size grow with this, not with the run.
        detector: Which score; None: the calibrated one.

    Returns:
        The file that was written.

    Raises:
        RunError: a folder holds no run or is damaged, or ``out`` cannot be written.
        UsageError: no run folder was given, or ``shown`` is negative.
    """
    folders = _folders(run_folder)
    if shown < 0:
        raise UsageError(f"shown = {shown}: give the number of prompts to show with pictures, 0 for none.")
    references = Path(reference_pictures) if isinstance(reference_pictures, (str, Path)) else reference_pictures
    views = [_view(folder, references, shown, detector, i) for i, folder in enumerate(folders)]
    page = (
        shared_environment()
        .get_template("report.html.jinja")
        .render(views=views, plot_css=Markup(plots.CSS), blur=blur, most=GROUPS)
    )
    return _write(_target(folders, out, "html"), page)


def write_markdown(
    run_folder: Folder | Sequence[Folder], out: Folder | None = None, *, detector: str | None = None
) -> Path:
    """Write the numbers of the report, without pictures, as ``report.md``; arguments and errors as :func:`write_report`."""
    folders = _folders(run_folder)
    views = [_facts(folder, detector) for folder in folders]
    for folder, facts in zip(folders, views, strict=True):
        facts["measured"] = beside(folder, facts["summary"].findings, facts["axis"], pictures=False)
    page = environment(escape=False).get_template("report.md.jinja").render(views=views)
    return _write(_target(folders, out, "md"), page)


def write_json(
    run_folder: Folder | Sequence[Folder], out: Folder | None = None, *, detector: str | None = None
) -> Path:
    """Write :meth:`Summary.to_dict` as ``report.json`` (a list of them for several runs); otherwise as :func:`write_report`.

    Pictures that were measured with the run stand under ``measured``, as in the JSON of a measured folder.
    """
    folders = _folders(run_folder)
    found = [read_summary(folder, detector=detector).to_dict() for folder in folders]
    for folder, facts in zip(folders, found, strict=True):
        if (measures := beside_run(folder)) is not None:
            facts["measured"] = plain(measures)
    content = found[0] if len(found) == 1 else found
    return _write(
        _target(folders, out, "json"), json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _folders(run_folder: Folder | Sequence[Folder]) -> list[Path]:
    folders = [Path(run_folder)] if isinstance(run_folder, (str, Path)) else [Path(f) for f in run_folder]
    if not folders:
        raise UsageError("there is no run to report; name at least one run folder.")
    return folders


def _target(folders: Sequence[Path], out: Folder | None, extension: str) -> Path:
    return (
        Path(out) if out is not None else folders[0] / f"{'report' if len(folders) == 1 else 'comparison'}.{extension}"
    )


def _write(path: Path, page: str) -> Path:
    return write_whole(path, page.encode("utf-8", errors="replace"))


# What the templates are given ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One of the worst prompts with its pictures: the nearest pair first, then further seeds."""

    rank: int
    finding: Finding
    generated: Picture | None
    reference: Picture | None
    more: list[tuple[int, Picture]]
    spark: Markup
    where: Picture | None = None
    where_words: str = ""


@dataclass(frozen=True)
class View:
    """One run as the templates see it; ``key`` makes anchors of several runs differ."""

    key: str
    summary: Summary
    facts: dict[str, Any]
    shown: list[Shown]
    figures: dict[str, Markup]
    bars: dict[str, Markup]
    measured: Beside | None = None


def _view(
    folder: Path, references: Path | Mapping[str, Path] | None, shown: int, detector: str | None, index: int
) -> View:
    facts = _facts(folder, detector)
    summary: Summary = facts["summary"]
    pictures = Pictures(folder, references)
    maps = read_regions(folder)
    chosen = [_shown(i + 1, f, pictures, maps.get(f.prompt)) for i, f in enumerate(_worth_showing(summary, shown))]
    bars = {
        f"{g.name}/{kind}": plots.interval(share.k, share.n, share.low, share.high)
        for g in summary.groups[:GROUPS]
        for kind, share in (("above", g.above), ("copies", g.copies), ("templates", g.templates))
        if share is not None
    }
    measured = beside(folder, summary.findings, facts["axis"])
    return View(f"run{index + 1}", summary, facts, chosen, _figures(summary), bars, measured)


def _worth_showing(summary: Summary, count: int) -> list[Finding]:
    """Prompts with a copy or above threshold; where there are none, the highest scores, so that a reader sees what was there."""
    hits = [f for f in summary.findings if f.copies or f.above]
    return (hits or summary.findings[: min(count, 4)])[:count]


def _shown(rank: int, finding: Finding, pictures: Pictures, where: tuple[str, str] | None = None) -> Shown:
    first, *rest = finding.shots or [None]
    near = None if first is None else first.nearest
    return Shown(
        rank,
        finding,
        None if first is None or (first.image is None and near is None) else pictures.generated(first),
        None if near is None else pictures.reference(near),
        [(s.seed, pictures.generated(s, 128)) for s in rest[:SEEDS_SHOWN] if s is not None and s.image is not None],
        plots.sparkline([float(v) for v in finding.steps]),
        None if where is None else pictures.kept(where[0]),
        "" if where is None else printable(where[1]),
    )


def _facts(folder: Path, detector: str | None) -> dict[str, Any]:
    """What the reproduction block says, as words."""
    summary = read_summary(folder, detector=detector)
    run = summary.manifest
    return {
        "summary": summary,
        "model": run.model,
        "axis": f"score ({summary.detector}{', ' + summary.space + '-space' if summary.space else ''})",
        "hashes": {p.name: sha256_file(p) for p in _evidence_files(folder)},
        "target": flat(run.target),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False, sort_keys=True, default=str),
        "machine": flat(run.machine),
        "git": git_words(run.git),
        "took": _duration(run.started, run.ended),
    }


def _evidence_files(folder: Path) -> list[Path]:
    named = [folder / "run.json", folder / "thresholds.json", folder / "controls.json"]
    return sorted(folder.glob("samples*.jsonl")) + [p for p in named if p.exists()]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``outer.inner`` → words."""
    out: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            )
    return out


def git_words(found: Mapping[str, Any] | None) -> str:
    """``3f2a… with uncommitted changes``, or nothing where the command ran in no checkout."""
    if not found:
        return ""
    known = {True: "with uncommitted changes", False: "without changes"}
    state = known[found["dirty"]] if found.get("dirty") is not None else "whether with changes is not known"
    return f"{found.get('commit')}, {state}"


def _duration(started: str, ended: str | None) -> str:
    """``1 h 02 min``, or nothing when the run does not say."""
    try:
        seconds = round((datetime.fromisoformat(ended or "") - datetime.fromisoformat(started)).total_seconds())
    except (ValueError, TypeError):
        return ""
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


# Figures ------------------------------------------------------------------------------------------------------------------


def _figures(summary: Summary) -> dict[str, Markup]:
    """The figures this run has data for, by name."""
    axis = f"{summary.detector} ({summary.space}-space)" if summary.space else str(summary.detector)
    out: dict[str, Markup] = {}
    if any(f.score is not None for f in summary.findings):
        out["distribution"] = plots.distribution(_series(summary), _limit(summary), f"score: {axis}")
    if any(len(f.steps) > 1 for f in summary.findings):
        out["steps"] = plots.steps(_bundles(summary), _singles(summary), axis)
    doses = [_dose(g) for g in summary.groups if g.dose is not None and g.copies is not None]
    if len(doses) > 1:
        out["doses"] = plots.dose_response(doses)
    if summary.discrimination:
        curves = [_curve(d.name, d.auc, d.roc) for d in summary.discrimination if d.roc is not None]
        out["roc"] = plots.roc(curves)
    return out


def _curve(name: str, auc: Interval, roc: Roc) -> plots.Curve:
    return plots.Curve(
        f"{name}\nAUC {auc.value:.3f} ({auc.low:.3f}–{auc.high:.3f})", roc.fpr.tolist(), roc.tpr.tolist()
    )


def _limit(summary: Summary) -> plots.Threshold | None:
    t = summary.thresholds
    return None if t is None else plots.Threshold(t.threshold, t.interval[0], t.interval[1], t.fpr)


def _series(summary: Summary) -> list[plots.Series]:
    ordinary = [plots.Series("ordinary prompts", summary.thresholds.scores, kind="plain")] if summary.thresholds else []
    return ordinary + [
        plots.Series(name, _scores(members), _scores(f for f in members if f.copies))
        for name, members in _parts(summary)
    ]


def _parts(summary: Summary) -> list[tuple[str, list[Finding]]]:
    """Audited prompts by group, in the order of the group table; the smallest groups together when there are many."""
    scored = [f for f in (*summary.findings, *summary.variants) if f.score is not None]
    if not summary.groups:
        return [("audited prompts", scored)]
    by_size = sorted(summary.groups, key=lambda g: g.prompts, reverse=True)
    kept = {g.name for g in (by_size if len(by_size) <= ROWS else by_size[: ROWS - 1])}
    parts = [(g.name, [f for f in scored if _name(f) == g.name]) for g in summary.groups if g.name in kept]
    other = [f for f in scored if _name(f) not in kept]
    return parts + ([(f"{len(by_size) - len(kept)} other groups", other)] if other else [])


def _name(finding: Finding) -> str:
    return finding.group or NO_GROUP


def _scores(findings: Any) -> list[float]:
    return [f.score for f in findings if f.score is not None]


def _bundles(summary: Summary) -> list[plots.Bundle]:
    parts = sorted(_parts(summary), key=lambda part: len(part[1]), reverse=True)[:6]
    return [plots.Bundle(name, [f.steps for f in members]) for name, members in parts]


def _singles(summary: Summary) -> list[plots.Bundle]:
    return [plots.Bundle(f.prompt[:60], [f.steps]) for f in summary.findings[:3] if f.copies or f.above]


def _dose(group: Group) -> plots.Dose:
    assert group.dose is not None
    assert group.copies is not None
    return plots.Dose(group.dose, group.copies.k, group.copies.n, group.copies.low, group.copies.high)


# Words for the templates --------------------------------------------------------------------------------------------------


@cache
def shared_environment() -> Environment:
    """That of pages, nobody's to change: each template is compiled once."""
    return environment()


def environment(*, escape: bool = True) -> Environment:
    env = Environment(
        loader=PackageLoader("mnemoscope.report"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    env.filters |= {"short": _short, "clip": _clip, "percent": percent, "md": _md, "keep": _keep}
    return env


def _short(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def _clip(words: str, length: int) -> str:
    return words if len(words) <= length else f"{words[:length]}… ({len(words):,} characters)"


def _keep(words: str) -> str:
    """A number stays with its percent sign at a line's end."""
    return words.replace(" %", "\u00a0%")


_MARKDOWN = re.compile(r"[\\`*_\[\]<>#|~&$@]|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)


def _md(words: str) -> str:
    """Text that Markdown shows as it stands, on one line, without links."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(printable(str(words)).split()))
