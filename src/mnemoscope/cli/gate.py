"""``mnemoscope gate``: a policy held against runs. Needs no torch, unless the self-test has to audit the bundled model first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..records.files import open_to_append
from . import places, screen

if TYPE_CHECKING:
    from ..report.audited import Audited
    from ..report.gate import Material
    from ..report.policy import Policy
    from ..report.trial import Trial
    from ..report.verdict import Verdict

DEMO = Path("runs/demo")
"""Where ``mnemoscope demo`` leaves its run."""


def gate(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A run folder, or the folders of one audit's shards.", show_default=False, parser=places.folder
        ),
    ] = None,
    policy: Annotated[
        Path, typer.Option(help="YAML file; what it names is looked for beside it.", parser=places.file)
    ] = Path("memorization.policy.yaml"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file; default gate.json in the run folder.", show_default=False, parser=places.written_file
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(help="JUnit XML file to write.", show_default=False, parser=places.written_file),
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            help='Markdown file to append to, such as "$GITHUB_STEP_SUMMARY".',
            show_default=False,
            parser=places.appended_file,
        ),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Try the policy on the bundled model, where it must fail.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many prompts each rule needs; judge nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Hold runs against a policy. Exit 0: passes; 1: fails; 2: wrong command or policy; 3: cannot be judged.

    Example: mnemoscope gate runs/v2 --policy memorization.policy.yaml
    """
    from ..report.policy import Policy

    rules = Policy.read(policy)
    if dry_run:
        _show_needs(rules, as_json=as_json)
        return
    if self_test:
        if any((out, junit, summary)):
            raise UsageError(
                "--self-test judges the policy, not a run, and writes no file; leave --out, --junit and --summary out."
            )
        raise typer.Exit(_self_test(rules, runs or [], as_json=as_json))
    if not runs:
        raise UsageError("there is no run to judge; name a run folder.")
    from ..report.gate import judge

    verdict = judge(rules, _material(rules, runs, policy), date.today())
    written = _write(verdict, out or runs[0] / "gate.json", junit, summary)
    _show(verdict, as_json=as_json)
    for remark in verdict.remarks:
        screen.say(f"Note: {remark}")
    screen.say(f"Written: {', '.join(map(str, written))}")
    raise typer.Exit(verdict.exit_code)


# What the policy names ----------------------------------------------------------------------------------------------------


def _material(policy: Policy, runs: Sequence[Path], file: Path) -> Material:
    from ..records.documents import require_reachable
    from ..report.audited import read_audited
    from ..report.gate import Material

    names = policy.detectors
    listed = dict.fromkeys(rule.leaks for rule in policy.rules if rule.leaks is not None)
    earlier = dict.fromkeys(rule.baseline for rule in policy.rules if rule.baseline is not None)
    beside = {name: file.parent / name for name in [*listed, *earlier]}
    for path in beside.values():
        require_reachable(file, "what a rule is judged by", path, "copy it into that folder")
    leaks = {name: _leaks(beside[name]) for name in listed}
    baselines = {name: read_audited([beside[name]], names) for name in earlier}  # whose clusters no rule asks for
    return Material(_judged(policy, runs, names), baselines, leaks)


def _judged(policy: Policy, runs: Sequence[Path], detectors: Collection[str]) -> Audited:
    from ..report.audited import read_audited

    near = policy.clusters == "near-duplicates" and any(rule.bounded for rule in policy.rules)
    return read_audited(runs, detectors, _clusters if near else None)


def _clusters(prompts: Sequence[str]) -> list[int]:
    from ..audit.controls import near_duplicate_clusters  # brings scikit-learn, and no torch

    return [int(cluster) for cluster in near_duplicate_clusters(prompts)]


def _leaks(path: Path) -> list[str]:
    from ..audit.prompts import read_prompts

    return [prompt.text for prompt in read_prompts(path)]


# What is shown and written ------------------------------------------------------------------------------------------------


def _show(result: Verdict | Trial, *, as_json: bool) -> None:
    if as_json:
        screen.show_json(result.to_dict())
        return
    rows = [[check.status.word, check.name, check.sentence] for check in result.checks]
    screen.table(["status", "check", "result"], rows, wrap=True)
    screen.show()
    screen.show(result.headline)


def _write(verdict: Verdict, out: Path, junit: Path | None, summary: Path | None) -> list[Path]:
    from ..records.store import write_whole
    from ..report.export import to_json, to_junit, to_markdown

    written = [write_whole(out, to_json(verdict).encode("utf-8", errors="replace"))]
    if junit is not None:
        written.append(write_whole(junit, to_junit(verdict).encode("utf-8", errors="replace")))
    if summary is not None:
        written.append(_append(summary, to_markdown(verdict)))
    return written


def _append(path: Path, text: str) -> Path:
    """The page of a CI job is shared by its steps, so nothing of it may be lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(path) as file:
            file.write(text.encode("utf-8", "replace").decode("utf-8"))
    except OSError as e:
        raise UsageError(f"--summary {path} cannot be written ({e.strerror or e}); name another file.") from None
    return path


def _show_needs(policy: Policy, *, as_json: bool) -> None:
    """What each rule needs, before anybody pays for an audit."""
    columns = ["rule", "level", "metric", "limit", "prompts"]
    rows = [
        [
            rule.name,
            rule.level,
            rule.metric,
            f"{rule.limit:g}{' (95 % upper bound)' if rule.bounded else ''}",
            str(rule.least),
        ]
        for rule in policy.rules
    ]
    if as_json:
        needs: list[dict[str, Any]] = [{"rule": rule.name, "least_prompts": rule.least} for rule in policy.rules]
        screen.show_json({"needs": needs, "remarks": policy.remarks})
        return
    screen.table(columns, rows, right=(4,), wrap=True)
    for remark in policy.remarks:
        screen.say(f"Note: {remark}")


# The self-test ------------------------------------------------------------------------------------------------------------


def _self_test(policy: Policy, runs: Sequence[Path], *, as_json: bool) -> int:
    """Try the policy on a run of the bundled model, or on a run that the user knows to be bad."""
    from ..report.trial import try_out

    trial = try_out(policy, _judged(policy, runs or [_bundled()], ()), date.today())
    _show(trial, as_json=as_json)
    for check in trial.silent:
        screen.say(f"Note: rule {check.name!r} does not fail there: {check.sentence}")
    return trial.exit_code


def _bundled() -> Path:
    """The demonstration's run; made first where it is not there yet."""
    from ..records.store import Run

    if Run.exists(DEMO):
        made = Run(DEMO).manifest
        if (made.kind, made.status) == ("demo", "done"):
            return DEMO
    screen.say(f"Auditing the bundled model into {DEMO}; this takes a minute or two …")
    from ..demo.run import demo

    with screen.stoppable(), screen.progress("demo") as progress:
        demo(DEMO, progress=progress, say=screen.say)
    return DEMO
