"""``mnemoscope regions``: where the worst prompts of a run pull their pictures, for its report."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from ..bounds import COUNT
from ..errors import UsageError
from . import places, screen
from .pairs import model_options, number_option


def regions(
    run: Annotated[Path, typer.Argument(help="Run folder of an audit.", parser=places.folder)],
    top: Annotated[int, number_option(COUNT, "How many of the worst prompts.")] = 8,
    kind: Annotated[str, typer.Option(help="curvature, score or attention.")] = "curvature",
    model: Annotated[
        str | None, typer.Option(help="The model, unless the run was made with a bundled one.", show_default=False)
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
    setting = manifest.setting
    if setting.get("seed_mode") != "shared":
        raise UsageError(
            f"{run} gave each prompt noises of its own, and maps are made from the shared ones; audit with seed_mode shared."
        )
    places.written_folder(run / "regions")
    screen.say_loading(f"Loading {model or 'the model of the run'} …")  # before torch is imported, which takes its time
    from ..audit.replay import config_of, require_model
    from ..audit.request import identity_of, load
    from ..explain.overlay import overlay
    from ..explain.regions import regions as look
    from ..records.store import differences, write_whole

    config = config_of(manifest, model=model, device=device, model_options=model_options(model_option) or None)
    require_model(config, manifest, run)
    target = load(config)
    if found := differences(setting["target"], identity_of(target)):
        raise UsageError(f"{config.model} is not the model of {run} ({found[0]}); name the right one with --model.")
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
        screen.show(shown.alt)
    write_regions(run, kept)
    screen.say(f"{len(kept)} maps in {run / 'regions'}; next: mnemoscope report {run}")
