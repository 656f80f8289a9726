"""The commands: parse, call a room, print. Heavy rooms are imported inside commands, so that --help needs no torch."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import interrupts
from ..bounds import COUNT, GUIDANCE, RATE, SEED, SEEDS, STEPS
from ..errors import MnemoscopeError, UsageError
from ..programs import allow_program
from ..terminal import guard
from . import output, places, screen
from .duplicates import duplicates
from .explain import explain
from .gate import gate
from .index import index_app
from .measure import keep_known_levels, measure
from .mitigations import bench_app, redteam
from .opening import bundled_calibration, reference_set
from .packet import pack, verify
from .pairs import LoRA, model_options, number_option
from .pairs import option as _option
from .regions import regions
from .replay import replay
from .serve import serve
from .studio import studio
from .train import train
from .view import view

if TYPE_CHECKING:
    from ..audit.config import AuditConfig
    from ..models.base import Target
    from ..report.summary import Summary

log = logging.getLogger(__name__)

app = typer.Typer(
    name="mnemoscope",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would cost as much as everything else here
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Quick start: mnemoscope demo  ·  mnemoscope check demo 'a red apple'  ·  mnemoscope audit MODEL --prompts prompts.txt",
)


Model = Annotated[
    str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
]
Prompts = Annotated[Path | None, _option("TXT, JSONL, JSON, CSV, TSV or Parquet file.", parser=places.file)]
Column = Annotated[str | None, _option("Column of the prompt; default: prompt, caption or text.")]
IdColumn = Annotated[str | None, _option("Column of the prompt's id.")]
GroupColumn = Annotated[str | None, _option("Column of the prompt's group.")]
LabelColumn = Annotated[str | None, _option("Column that says which prompts are known to be memorized.")]
FamilyColumn = Annotated[str | None, _option("Column of the prompt's family: of one picture, brand or layout.")]
SwapColumn = Annotated[str | None, _option("Column of another caption of the prompt's picture, for --controls swap.")]
Controls = Annotated[
    list[str] | None,
    _option(
        "Test the score against more than ordinary prompts: case-fold, title-case, swap, within-family, matched (commas between, "
        "or repeat).",
        "--controls",
    ),
]
Seeds = Annotated[int | None, number_option(SEEDS, "Generations per prompt; default 4.")]
BaseSeed = Annotated[int | None, number_option(SEED, "Another base gives other starting noises; default 0.")]
SeedMode = Annotated[str | None, _option("shared (one bank of noises for all prompts) or per-prompt.")]
Detectors = Annotated[
    list[str] | None,
    _option("Detector; repeat for several; default magnitude.", "--detectors"),
]
Window = Annotated[int | None, number_option(STEPS, "Leading steps that each detector averages over; default 1.")]
Guidance = Annotated[float | None, number_option(GUIDANCE, "Guidance scale; default: the model's own.")]
Steps = Annotated[int | None, number_option(STEPS, "Length of the sampler's schedule; default 50.")]
BatchSize = Annotated[str | None, _option("Samples per batch, or auto.")]
Images = Annotated[bool | None, _option("Keep the pictures.", "--images/--no-images")]
Reference = Annotated[
    Path | None,
    _option(
        "Reference set of `mnemoscope index build`: what pictures are compared with; makes them.",
        "--reference",
        parser=places.folder,
    ),
]
Measured = Annotated[
    Path | None,
    _option("Picture or folder of pictures: how strongly is each stored?", "--measure", parser=places.file_or_folder),
]
Captions = Annotated[Path | None, _option("JSONL file of image and caption, for --measure.", parser=places.file)]
MeasurePreset = Annotated[str | None, _option("improved, or official (many times slower), for --measure.")]
Dtype = Annotated[str | None, _option("float32, float16 or bfloat16; default: by the device.")]
Device = Annotated[str | None, _option("cpu, cuda, cuda:1, …")]
Out = Annotated[Path | None, _option("Where to write.", parser=places.written_folder)]
Limit = Annotated[int | None, number_option(COUNT, "Only the first so many prompts.")]
Shard = Annotated[str | None, _option("k/m: do share k of m, or env.")]
MaxErrors = Annotated[
    str | None,
    _option("Stop after more failures than this (a count, or a share below 1)."),
]
Notes = Annotated[
    list[str] | None,
    _option("Something a reader of the run should know; repeatable.", "--notes"),
]
Config = Annotated[
    Path | None, _option("YAML file with the same names as the options; options win.", parser=places.file)
]
TrustConfig = Annotated[
    bool,
    typer.Option(
        "--trust-config",
        help="The --config file is your own: it may name files anywhere, and any option of the loader.",
    ),
]
ThresholdsFile = Annotated[
    Path | None,
    _option(
        "Run folder of `mnemoscope calibrate`, or its thresholds.json.", "--calibration", parser=places.file_or_folder
    ),
]
AcceptThreshold = Annotated[
    bool | None,
    _option("Use a calibration made under another setting; the result says so.", "--accept-threshold"),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option",
        help="name=value handed to the loader: revision, variant, unet, lora; repeatable.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over in a new folder instead of continuing.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved settings, forwards, time and disk; compute nothing.")
]


@app.callback()
def _common(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but results and errors.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the hub.")] = False,
    programs: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-program",
            help="FILE=SHA256 of a program (TorchScript) that an index, a run or a configuration may use; repeatable.",
            show_default=False,
        ),
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, show_default=False, help="Logs on stderr; -vv for more of them."),
    ] = 0,
) -> None:
    """See what an image diffusion model has memorized: detect, explain, measure, mitigate."""
    interrupts.end_loading()
    screen.QUIET = quiet
    screen.log_to_stderr(verbose)
    log.info("%s", screen.command())
    if offline:
        # huggingface_hub reads this when it is imported; nothing has imported it yet.
        os.environ["HF_HUB_OFFLINE"] = "1"
    for program in programs or ():
        file, _, sha256 = program.rpartition("=")
        allow_program(file, sha256)
    if traceback:
        os.environ["MNEMOSCOPE_DEBUG"] = "1"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.", parser=places.written_folder)] = Path("runs/demo"),
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Audit the bundled model and write a report: offline, on a CPU, in a minute or two.

    Example: mnemoscope demo
    """
    screen.say_loading("Loading the bundled model …")
    from ..demo.run import demo as run_demo
    from ..records.store import free_folder
    from ..report.html import write_report
    from ..report.summary import read_summary

    folder = free_folder(out) if fresh else out
    with screen.stoppable(), screen.progress("demo") as progress:
        run = run_demo(folder, progress=progress, say=screen.say, command=screen.command())
    summary = read_summary(run.folder)
    _show_run(summary, f"Run: {run.folder}   Report: {write_report(run.folder)}", as_json=as_json)


@app.command()
def check(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    seeds: Annotated[int, number_option(SEEDS, "Generations.")] = 4,
    window: Annotated[int, number_option(STEPS, "Leading steps that the score averages over.")] = 1,
    steps: Annotated[int, number_option(STEPS, "Length of the sampler's schedule.")] = 50,
    guidance: Guidance = None,
    images: Annotated[
        bool, typer.Option("--images", help="Finish the trajectories and write pictures to --out.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for pictures.", parser=places.later_folder)] = Path("runs/check"),
    calibration: ThresholdsFile = None,
    accept_threshold: AcceptThreshold = None,
    dtype: Dtype = None,
    device: Device = None,
    lora: LoRA = None,
    model_option: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Score one prompt.

    Example: mnemoscope check demo "a red apple" --images
    """
    if window > steps:
        raise UsageError(
            f"--window {window} is more than the --steps {steps} that there are; make one of them fit the other."
        )
    screen.say_loading(f"Loading {model} …")  # before torch is imported, which takes its time
    from ..audit.check import check as check_prompt
    from ..detect.calibrate import Calibration
    from ..models.load import load

    found = Calibration.load(calibration) if calibration else None
    if images:
        places.written_folder(str(out))
    target = load(model, dtype=dtype, device=device, **model_options(model_option, lora))
    screen.say_target(target)
    accept = bool(accept_threshold)
    if found is None and model == "demo":
        found = bundled_calibration(target, guidance, steps, seeds, window, accept)
    reference = reference_set(None, model) if images else None
    result = check_prompt(
        target,
        prompt,
        seeds=seeds,
        window=window,
        steps=steps,
        guidance=guidance,
        images=images,
        calibration=found,
        accept_threshold=accept,
        reference=reference,
    )
    files = _write_pictures(result.images, out) if result.images is not None else []
    if as_json:
        screen.show_json({**result.to_dict(), "images": files})
        return
    screen.show(result.words)
    screen.table(["seed", "score"], [[str(j), f"{s:.4f}"] for j, s in enumerate(result.scores)], right=(0, 1))
    screen.show("tokens: " + " | ".join(result.tokens))
    for file in files:
        screen.show(file)


@app.command()
def audit(
    model: Annotated[
        str | None, typer.Argument(help="The model; may stand in --config instead.", show_default=False)
    ] = None,
    prompts: Prompts = None,
    column: Column = None,
    id_column: IdColumn = None,
    group_column: GroupColumn = None,
    label_column: LabelColumn = None,
    family_column: FamilyColumn = None,
    swap_column: SwapColumn = None,
    detectors: Detectors = None,
    controls: Controls = None,
    window: Window = None,
    seeds: Seeds = None,
    base_seed: BaseSeed = None,
    seed_mode: SeedMode = None,
    guidance: Guidance = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    images: Images = None,
    reference: Reference = None,
    measure: Measured = None,
    captions: Captions = None,
    measure_preset: MeasurePreset = None,
    calibration: ThresholdsFile = None,
    accept_threshold: AcceptThreshold = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
    max_errors: MaxErrors = None,
    limit: Limit = None,
    shard: Shard = None,
    notes: Notes = None,
    lora: LoRA = None,
    model_option: ModelOption = None,
    config: Config = None,
    trust_config: TrustConfig = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Score many prompts into a run folder, and measure pictures; the same command continues an interrupted run.

    Example: mnemoscope audit demo --prompts prompts.txt --out runs/mine
    """
    settings = _known_beta(_settings(config, {k: v for k, v in locals().items() if k in AUDIT_OPTIONS}, trust_config))
    from ..audit.run import audit as run_audit
    from ..records.store import MEASURES
    from ..report.html import write_report
    from ..report.summary import read_summary

    if dry_run:
        _show_plan(settings, as_json=as_json)
        return
    if fresh:
        settings = _fresh(settings)
    target, pictures = _load(settings)
    with screen.stoppable(), screen.progress("audit") as progress:
        run = run_audit(settings, target=target, reference=pictures, progress=progress, command=screen.command())
    summary = read_summary(run.folder)
    measured = settings.measure is not None and run.manifest.status == "done"
    if measured:
        keep_known_levels(settings.model, run.folder / MEASURES)
    where = f"Run: {run.folder}   Report: {write_report(run.folder)}"
    if measured:
        where += f"   Pictures: {_report_measures(run.folder / MEASURES)}"
    _show_run(summary, where, as_json=as_json)
    if run.manifest.status != "done":
        screen.fail(
            f"{run.folder} is {run.manifest.status}: not every sample has a score; repeat the command, or read the rows."
        )
        raise typer.Exit(3)


@app.command()
def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="The model; may stand in --config instead.", show_default=False)
    ] = None,
    prompts: Prompts = None,
    column: Column = None,
    fpr: Annotated[float, number_option(RATE, "Stated false-positive rate of the threshold.")] = 0.01,
    detectors: Detectors = None,
    window: Window = None,
    seeds: Seeds = None,
    base_seed: BaseSeed = None,
    seed_mode: SeedMode = None,
    guidance: Guidance = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
    limit: Limit = None,
    lora: LoRA = None,
    model_option: ModelOption = None,
    config: Config = None,
    trust_config: TrustConfig = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled",
            help="The prompts are your own traffic, memorized ones among it: --fpr is a budget of alarms.",
        ),
    ] = False,
    from_log: Annotated[
        Path | None,
        _option(
            "Log of a guard of this model: its scores instead of prompts, nothing is generated.", parser=places.file
        ),
    ] = None,
) -> None:
    """Turn scores of ordinary prompts, or of a host's traffic, into a threshold with a stated false-positive rate.

    Example: mnemoscope calibrate MODEL --prompts ordinary.txt --out runs/ordinary

    For a guard (docs/guard.md): mnemoscope calibrate MODEL --prompts ordinary.txt --seeds 1 --seed-mode per-prompt
    """
    if from_log is not None and (prompts is not None or unlabelled or seeds is not None or detectors):
        raise UsageError(
            "--from-log brings scores of its own, unlabelled: leave out --prompts, --unlabelled, --seeds and --detectors."
        )
    settings = _settings(config, {k: v for k, v in locals().items() if k in AUDIT_OPTIONS}, trust_config)
    from ..audit.run import calibrate as run_calibration
    from ..audit.run import calibrate_on_log

    if from_log is not None:
        path, made = calibrate_on_log(settings, from_log, fpr=fpr)
        where = f"Written to {path}; use it with: mnemoscope.guard(pipe, {str(path)!r})"
        _show_thresholds({"magnitude": made}, where, as_json=as_json, traffic=True)
        return
    if dry_run:
        _show_plan(settings, fpr, as_json=as_json)
        return
    if fresh:
        settings = _fresh(settings)
    target, _ = _load(settings, fpr)
    with screen.stoppable(), screen.progress("calibrate") as progress:
        run, found = run_calibration(
            settings, fpr=fpr, target=target, progress=progress, command=screen.command(), unlabelled=unlabelled
        )
    where = f"Written to {run.folder}; use it with: mnemoscope audit … --calibration {run.folder}"
    if len(found) > 1:
        where += f" (for {next(iter(found))}; for another: {run.folder / 'thresholds-NAME.json'})"
    _show_thresholds(found, where, as_json=as_json, traffic=unlabelled)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="One run folder, or several to compare; or a folder of measured pictures.", parser=places.folder
        ),
    ],
    out: Annotated[Path | None, _option("File to write.", parser=places.written_file)] = None,
    kind: Annotated[str, typer.Option("--format", help="html, markdown or json.")] = "html",
    reference: Annotated[
        Path | None, _option("Folder of reference pictures named by id.", parser=places.folder)
    ] = None,
    blur: Annotated[bool, typer.Option("--blur/--no-blur", help="Blur found copies until clicked.")] = True,
    levels: Annotated[
        Path | None,
        _option(
            "Scores of pictures of known dose, measured alike, to set measured pictures beside.", parser=places.file
        ),
    ] = None,
) -> None:
    """Write the report of a run, or of measured pictures, as one self-contained file; needs no model and no torch.

    Example: mnemoscope report runs/demo
    """
    from ..errors import UnknownName
    from ..records.measures import is_measures
    from ..report import html, measured_page

    pictures = [folder for folder in runs if is_measures(folder)]
    if pictures and len(runs) > 1:
        raise UsageError(f"{pictures[0]} holds measured pictures, which have a report of their own; name it alone.")
    if levels is not None and not pictures:
        raise UsageError("--levels are scores of measured pictures; name a folder of `mnemoscope measure`.")
    room: Any = measured_page if pictures else html
    writers = {"html": room.write_report, "markdown": room.write_markdown, "json": room.write_json}
    if kind not in writers:
        raise UnknownName("report format", kind, writers)
    more: dict[str, Any] = (
        {"levels": levels} if pictures else {"reference_pictures": reference} if kind == "html" else {}
    )
    if kind == "html":
        more["blur"] = blur
    screen.show(writers[kind](list(runs) if len(runs) > 1 else runs[0], out, **more))


@app.command(name="ls")
def list_installed(
    what: Annotated[
        str,
        typer.Argument(
            help="detectors, mitigations, measures, targets, descriptors, caption_scores or prompts (the bundled ones)."
        ),
    ] = "detectors",
    group: Annotated[str | None, _option("With prompts: only this group.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what is installed, or the bundled world's prompts. Of methods: what each needs or changes, and its cost.

    Example: mnemoscope ls detectors
    """
    interrupts.begin_loading()
    from importlib.metadata import entry_points

    from ..errors import UnknownName

    if what == "prompts":
        from ..demo.world import World

        world = World()
        columns = ["id", "caption", "group", "copies"]
        rows = [
            [r.id, r.caption, r.group, str(r.copies)]
            for r in (world.captions(group) if group else world.captions(*_GROUPS))
        ]
    else:
        known = ("detectors", "mitigations", "measures", "targets", "descriptors", "caption_scores")
        if what not in known:
            raise UnknownName("list", what, [*known, "prompts"])
        columns = ["name", "package", "from"]
        found = sorted(entry_points(group=f"mnemoscope.{what}"), key=lambda e: e.name)
        rows = [[e.name, e.dist.name if e.dist else "?", e.value] for e in found]
        if what == "detectors":
            from ..detect.base import describe  # which imports torch; the other lists do without

            columns[1:1] = ["needs", "costs"]
            rows = [[name, *describe(e), *origin] for e, (name, *origin) in zip(found, rows, strict=True)]
        if what == "mitigations":
            from ..mitigate.base import describe as told

            columns[1:1] = ["changes", "costs"]
            rows = [[name, *told(e), *origin] for e, (name, *origin) in zip(found, rows, strict=True)]
        if what == "measures":
            from ..measure.base import describe as read

            columns[1:1] = ["reads", "needs", "costs"]
            rows = [[name, *read(e), *origin] for e, (name, *origin) in zip(found, rows, strict=True)]
        if what == "descriptors":
            from ..similarity.nulls import in_words

            columns[1:1] = ["0.1 % of different pairs of the bundled world are above"]
            rows = [[name, in_words(name), *origin] for name, *origin in rows]
    if as_json:
        screen.show_json([dict(zip(columns, r, strict=True)) for r in rows])
    else:
        screen.table(columns, rows, wrap=what != "prompts")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, caches and disk: what to paste into an issue.

    Example: mnemoscope doctor
    """
    interrupts.begin_loading()
    from .doctor import examine

    facts = examine()
    if as_json:
        screen.show_json(facts)
    else:
        screen.table(["what", "found"], [[k, str(v)] for k, v in facts.items()])


app.add_typer(bench_app, name="bench")
app.command()(duplicates)
app.command()(explain)
app.command()(gate)
app.add_typer(index_app, name="index")
app.command()(regions)
app.command()(measure)
app.command()(pack)
app.command()(redteam)
app.command()(replay)
app.command()(serve)
app.command()(studio)
app.command()(train)
app.command()(verify)
app.command()(view)


# What commands share ------------------------------------------------------------------------------------------------------

_GROUPS = ("planted", "recaptioned", "template", "ordinary", "heldout")
AUDIT_OPTIONS = frozenset({
    "model", "prompts", "column", "id_column", "group_column", "label_column", "family_column", "swap_column",
    "detectors", "controls", "window", "seeds", "base_seed", "seed_mode",
    "guidance", "steps", "batch_size", "images", "reference", "measure", "captions", "measure_preset", "calibration", "accept_threshold",
    "out", "dtype", "device", "max_errors", "limit", "shard", "notes",
    "model_option", "lora",
})  # fmt: skip
"""Options that fill :class:`~mnemoscope.audit.config.AuditConfig`; a test keeps the two in step."""


def _show_thresholds(found: dict[str, Any], where: str, *, as_json: bool, traffic: bool = False) -> None:
    if as_json:
        screen.show_json({name: c.record.model_dump(mode="json") for name, c in found.items()})
        screen.say(where)
        return
    rate, of = ("alarms", "scores of unlabelled traffic") if traffic else ("false positives", "ordinary prompts")
    for name, c in found.items():
        low, high = ("open" if bound is None else f"{bound:.4f}" for bound in c.record.interval)
        screen.show(
            f"{name}: threshold {c.threshold:.4f} at {100 * c.record.fpr:g} % {rate} "
            f"({100 * c.record.confidence:g} % interval {low} to {high}), from {len(c.record.scores)} {of}"
        )
    screen.show(where)


def _settings(config: Path | None, options: dict[str, Any], trust_config: bool) -> AuditConfig:
    """One frozen configuration from the YAML file and the options; options win."""
    from ..audit.config import AuditConfig

    given = {k: v for k, v in options.items() if v is not None and v != []}
    window = given.pop("window", None)
    names = ("column", "id_column", "group_column", "label_column", "family_column", "swap_column")
    columns = {k: given.pop(k) for k in names if k in given}
    if "prompts" in given or columns:
        given["prompts"] = {**({"path": str(given["prompts"])} if "prompts" in given else {}), **columns}
    if "model_option" in given or "lora" in given:
        given["model_options"] = model_options(given.pop("model_option", None), given.pop("lora", None))
    if "reference" in given:
        given.setdefault("images", True)
    for name in ("calibration", "out", "reference", "measure", "captions"):
        if name in given:
            given[name] = str(given[name])
    for name in ("batch_size", "max_errors"):
        if name in given:
            given[name] = _number(given[name])
    settings = AuditConfig.from_yaml(config, anywhere=trust_config, **given) if config else AuditConfig(**given)
    screen.say_loading(f"Loading {settings.model or 'the model'} …")  # before torch is imported, which takes its time
    settings = settings if window is None else settings.with_window(window)
    log.info("settings: %s", settings.stored())
    return settings


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _load(settings: AuditConfig, fpr: float | None = None) -> tuple[Target, Any]:
    """The model and the reference set, once everything is known that is without the model.

    With the rate of a threshold this is also that there are prompts enough for it.
    """
    from ..audit.request import require_known
    from ..audit.run import load
    from ..audit.stored import asked
    from ..stats import require_enough

    # What is cheap to refuse is refused before gigabytes are read.
    settings.require_places()
    prompts = require_known(settings)
    asked(settings)
    if prompts is not None:
        if fpr is not None:
            require_enough(len(prompts), fpr)
        for line in (*prompts.taken, *prompts.notes):
            screen.say(line)
    reference = _reference(settings)
    target = load(settings)
    screen.say_target(target)
    return target, reference


def _fresh(settings: AuditConfig) -> AuditConfig:
    from ..records.store import free_folder

    if settings.out is None:
        raise UsageError("--fresh needs --out: name the folder that the new one should be a sibling of.")
    return settings.model_copy(update={"out": str(free_folder(settings.out))})


def _show_run(summary: Summary, where: str, *, as_json: bool) -> None:
    """What was found, and where it lies; with ``--json`` the latter is talk."""
    if as_json:
        screen.show_json(summary.to_dict())
        screen.say(where)
    else:
        screen.show_summary(summary)
        screen.show()
        screen.show(where)


def _show_plan(settings: AuditConfig, fpr: float | None = None, *, as_json: bool) -> None:
    """What it would cost; time is measured on the model if it can be loaded."""
    import yaml

    from ..audit.request import require_possible
    from ..audit.run import measure_speed, plan

    target, reference = _load(settings, fpr)
    require_possible(settings, target, reference)
    cost = plan(settings, target=target, seconds_per_forward=measure_speed(settings, target))
    if as_json:
        screen.show_json({"settings": settings.stored(), "plan": asdict(cost)})
        return
    screen.show_lines(yaml.safe_dump(settings.stored(), sort_keys=False, allow_unicode=True).rstrip())
    asked = f"{cost.prompts} prompts × {cost.seeds} seeds = {cost.prompts * cost.seeds} samples"
    if cost.samples < cost.prompts * cost.seeds:
        asked += f", of which share {settings.shard} is {cost.samples}"
    screen.show(
        f"# {asked}, {cost.forwards} denoiser forwards, "
        f"{cost.pictures} pictures, about {screen.duration(cost.seconds or 0)} and {screen.size(cost.bytes)} of disk"
    )
    if cost.measured:
        screen.show(
            f"# {cost.measured} pictures to measure: at most {cost.most_forwards:,} forwards (F) and {cost.most_backwards:,} backward "
            f"passes (B), usually far fewer; their time is not counted"
        )


def _known_beta(settings: AuditConfig) -> AuditConfig:
    """The same, with the similarity that is calibrated for the bundled model where none was given."""
    spec = settings.measure_preset
    if (
        settings.measure is None
        or spec.beta is not None
        or settings.model != "demo"
        or spec.descriptor != "fingerprint"
    ):
        return settings
    from ..demo.world import World

    spec = spec.model_copy(update={"beta": World().same_picture})
    return settings.model_copy(update={"measure_preset": spec})


def _report_measures(folder: Path) -> Path:
    from ..report.measured_page import write_report

    return write_report(folder)


def _reference(settings: AuditConfig) -> Any:
    """What pictures are compared with: the reference set that was named or, for the bundled model, its training pictures."""
    if settings.reference is None and not settings.images:
        return None
    return reference_set(settings.reference, settings.model)


def _write_pictures(images: Any, folder: Path) -> list[str]:
    from ..audit.batch import webp
    from ..records.store import write_whole

    return [str(write_whole(folder / f"seed-{j}.webp", webp(image))) for j, image in enumerate(images)]


def main() -> None:
    """Entry point: one sentence and an exit code for everything a user can cause."""
    guard()
    output.filtered()
    screen.STOPPED = False
    try:
        code = app(standalone_mode=False)  # also what typer makes of Ctrl-C: no error, but its exit code
    except (KeyboardInterrupt, Exception) as e:
        code = interrupts.STOPPED if _comes_of_an_interrupt(e) else _say_why(e)
    finally:
        interrupts.begin_loading()  # there is nothing left to save while Python ends
    if code == interrupts.STOPPED and not screen.STOPPED:
        screen.fail("stopped")
    sys.exit(code if isinstance(code, int) else 0)


def _comes_of_an_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C ended a command; libraries turn it into errors of their own."""
    return isinstance(error, typer.Abort | KeyboardInterrupt) or (
        interrupts.came() and not isinstance(error, typer.Exit)
    )


def _say_why(error: BaseException) -> int:
    """Say in one sentence why a command ended, where a user can cause it; its exit code. Anything else is a bug, and is raised again."""
    debugged = screen.enabled("MNEMOSCOPE_DEBUG")
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has seen enough; Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, MnemoscopeError) and not debugged:
        log.debug("where it came from", exc_info=error)
        screen.fail(str(error))
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None and not debugged:
        log.debug("where it came from", exc_info=error)
        place = places.spelled(os.fsdecode(error.filename))
        screen.fail(f"{place} cannot be used ({error.strerror or error}); name another place.")
        return 2
    return _usage(error)


def _usage(error: BaseException) -> int:
    """Click's own complaints (an unknown option, a missing argument) in our form; anything else is a bug and is shown whole."""
    describe = getattr(error, "format_message", None)
    if describe is None:
        raise error
    screen.fail(f"{describe()} See: mnemoscope --help")
    return 2
