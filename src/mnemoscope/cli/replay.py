"""``mnemoscope replay``: samples of a run computed once more, from its folder or from a packet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bounds import COUNT, DIFFERENCE, SEED
from . import places, screen
from .opening import reference_set
from .pairs import number_option, read_pairs

if TYPE_CHECKING:
    from ..audit.replay import Evidence, Replayed, Sampled
    from ..models.base import Target

MARGIN = 40
"""Characters of a prompt that the table shows."""


def replay(
    run: Annotated[
        Path, typer.Argument(help="A run folder, or a packet of `mnemoscope pack`.", parser=places.file_or_folder)
    ],
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids of samples, or of prompts: all of their seeds. None: a random draw.", show_default=False
        ),
    ] = None,
    sample: Annotated[int, number_option(COUNT, "How many samples are drawn when no id is given.")] = 8,
    seed: Annotated[int, number_option(SEED, "Of the draw.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="All samples.")] = False,
    model: Annotated[
        str | None, typer.Option(help="The model, unless the run was made with a bundled one.", show_default=False)
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(
            help="name=value handed to the loader instead of the recorded options; repeatable.", show_default=False
        ),
    ] = None,
    accept_model: Annotated[
        bool, typer.Option("--accept-model", help="Go on with another model than the recorded one; the result says so.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(help="Reference set that pictures were compared with.", show_default=False, parser=places.folder),
    ] = None,
    tolerance: Annotated[
        float | None,
        number_option(DIFFERENCE, "Relative tolerance; default: the rounding of scores in this precision."),
    ] = None,
    batch_size: Annotated[int | None, number_option(COUNT, "Samples per batch; default: that of the run.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: the recorded one.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file to write the result to.", show_default=False, parser=places.written_file),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compute samples again and compare. Exit 0: they agree; 1: they differ; 2: wrong command; 3: cannot be judged.

    Example: mnemoscope replay runs/demo --sample 4
    """
    with _evidence(run) as evidence:
        screen.say_loading(
            f"Loading {model or 'the model of the run'} …"
        )  # before torch is imported, which takes its time
        from ..audit.replay import choose, config_of, require_model
        from ..audit.replay import replay as compute
        from ..report.summary import finite

        rows = choose(evidence, ids or (), sample=sample, seed=seed, everything=everything)
        changes = {"model": model, "dtype": dtype, "device": device, "batch_size": batch_size}
        options = read_pairs("--model-option", model_option, "revision=main") if model_option else None
        config = config_of(evidence.manifest, model_options=options, **changes)
        require_model(config, evidence.manifest, run)
        known = _reference(evidence, reference) if any(row.nearest for row in rows) else None
        target = _load(config)
        with screen.stoppable(), screen.progress("replay") as progress:
            found = compute(
                evidence,
                rows,
                target,
                config,
                reference=known,
                rtol=tolerance,
                accept_model=accept_model,
                progress=progress,
            )
    said = finite(found.to_dict())  # JSON has no infinity
    if out is not None:
        from ..records.store import write_whole

        text = json.dumps(said, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        screen.say(f"Written: {write_whole(out, text.encode())}")
    if as_json:
        screen.show_json(said)
    else:
        _show(found)
    raise typer.Exit(found.exit_code)


# What is replayed ---------------------------------------------------------------------------------------------------------


@contextmanager
def _evidence(path: Path) -> Iterator[Evidence]:
    """A folder, or a packet whose sums hold."""
    if os.path.isdir(path) or not os.path.exists(path):
        yield _of_folder(path)
        return
    from ..records.files import kept_name
    from ..report.archive import Archive
    from ..report.packet import Records
    from ..report.verify import sound_packet

    sound_packet(path)
    with Archive(path) as archive:
        from ..audit.replay import Evidence

        records = Records(archive)
        yield Evidence(
            kept_name(path.name), records.manifest, lambda: iter(records), records.thresholds(), records.picture
        )


def _of_folder(folder: Path) -> Evidence:
    from ..records.files import folder_name, read_regular
    from ..records.store import Run
    from ..records.thresholds import parse_thresholds
    from ..report.packet import inside
    from ..report.summary import read_part
    from ..similarity.decoding import KEPT

    run = Run(folder)
    thresholds = read_part(folder / "thresholds.json", parse_thresholds)
    from ..audit.replay import Evidence

    def picture(name: str) -> bytes | None:
        file = inside(folder, name)
        try:
            return None if file is None else read_regular(file, KEPT.bytes)
        except OSError:  # as if it were not there
            return None

    return Evidence(folder_name(folder), run.manifest, run.rows, thresholds, picture)


def _load(config: Any) -> Target:
    from ..audit.request import load

    target = load(config)
    screen.say_target(target)
    return target


def _reference(evidence: Evidence, folder: Path | None) -> Any:
    """The reference set that was named, or the bundled one where the run was compared with that."""
    found = reference_set(folder, evidence.manifest.config.get("model"))
    if folder is None and found is not None:
        from ..audit.replay import other_reference

        if apart := other_reference(evidence.manifest, found):
            screen.say(f"Note: the bundled reference set is not the one of the run ({'; '.join(apart[:3])}).")
            return None
    return found


# What is shown ------------------------------------------------------------------------------------------------------------


def _show(found: Replayed) -> None:
    columns = ["result", "call", "sample", "seed", "prompt", "largest difference"]
    rows = [
        [r.outcome, r.call or "–", r.id, str(r.seed), r.prompt[:MARGIN] or "(empty prompt)", _largest(r)]
        for r in found.rows
    ]
    screen.table(columns, rows, right=(3,), wrap=True)
    for r in found.rows:
        for reason in r.reasons:
            screen.say(f"{r.id}: {reason}")
    screen.show()
    for name in found.borderline:
        screen.show(f"borderline: {name}: another machine may call it differently")
    screen.show(found.headline)
    screen.say(
        f"Tolerance: {found.rtol:.2g}, {found.why}; pictures: {found.levels:g} gray levels. "
        f"{found.forwards} denoiser forwards, {screen.duration(found.seconds)}."
    )
    for difference in found.accepted:
        screen.say(f"Note: another model was accepted: {difference}")
    for note in found.notes:
        screen.say(f"Note: {note}")


def _largest(row: Sampled) -> str:
    """The gravest of a sample's differences, in words."""
    from typing import get_args

    from ..audit.replay import Outcome

    apart = [c for c in row.changes if c.outcome != "same"]
    if not apart:
        return "none" if row.changes else "–"
    worst = max(apart, key=lambda c: (get_args(Outcome).index(c.outcome), c.difference))
    values = "" if worst.was is None or worst.now is None else f" ({worst.was:.6g} then, {worst.now:.6g} now)"
    return f"{worst.what}: {worst.difference:.2g}{values}"
