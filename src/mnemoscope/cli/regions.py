"""``mnemoscope regions``: where the worst prompts of a run pull their pictures, for its report."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from . import screen
from .pairs import model_options


def regions(
    run: Annotated[Path, typer.Argument(help="Run folder of an audit.")],
    top: Annotated[int, typer.Option(help="How many of the worst prompts.", min=1)] = 8,
    kind: Annotated[str, typer.Option(help="curvature, score or attention.")] = "curvature",
    model: Annotated[
        str | None, typer.Option(help="Where the model is now; default: where the run had it.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="name=value handed to the loader; repeatable.", show_default=False)
    ] = None,
) -> None:
    """Add to a run, for its worst prompts, where in the picture the prompt pulls; `mnemoscope report` then shows it.

    Example: mnemoscope regions runs/demo --top 4
    """
    from ..report.regions import write_regions
    from ..report.summary import read_summary

    summary = read_summary(run, separate=False)
    manifest = summary.manifest
    setting, name = manifest.setting, model or manifest.config.get("model")
    if not name:
        raise UsageError(f"{run} does not say where its model is; name it with --model.")
    if setting.get("seed_mode") != "shared":
        raise UsageError(
            f"{run} gave each prompt noises of its own, and maps are made from the shared ones; audit with seed_mode shared."
        )
    screen.say(f"Loading {name} …")  # before torch is imported, which takes its time
    from ..audit.request import identity_of
    from ..explain.overlay import overlay
    from ..explain.regions import regions as look
    from ..models.load import load
    from ..records.store import differences, write_whole

    dtype = setting["target"].get("dtype")
    target = load(
        name, dtype=dtype, device=device, **(model_options(model_option) or manifest.config.get("model_options") or {})
    )
    if found := differences(setting["target"], identity_of(target)):
        raise UsageError(f"{name} is not the model of {run} ({found[0]}); name the right one with --model.")
    kept = {}
    for finding in [f for f in summary.findings if f.prompt and f.shots][:top]:
        screen.say(finding.prompt[:80])
        shown = overlay(
            look(
                target,
                finding.prompt,
                kind,
                seeds=[finding.shots[0].seed],
                steps=setting["steps"],
                guidance=setting["guidance"],
                base_seed=setting["base_seed"],
            )
        )
        file = f"regions/{hashlib.sha256(finding.prompt.encode()).hexdigest()[:16]}.webp"
        write_whole(run / file, shown.webp)
        kept[finding.prompt] = {"file": file, "alt": shown.alt}
        print(shown.alt)
    write_regions(run, kept)
    screen.say(f"{len(kept)} maps in {run / 'regions'}; next: mnemoscope report {run}")
