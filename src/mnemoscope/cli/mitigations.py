"""The commands about mitigations: compare them, and attack them."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bounds import AMOUNT, COUNT, SEEDS, SIMILARITY, STEPS
from ..errors import UsageError
from . import places, screen
from .pairs import model_options, number_option, read_pairs

if TYPE_CHECKING:
    from ..audit.redteam import RedTeam
    from ..models.base import Target
    from ..records.trials import Attack, Trial

bench_app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure methods against each other on the bundled world.",
    rich_markup_mode=None,
)


@bench_app.callback()
def _bench() -> None:
    """Measure methods against each other on the bundled world."""


@bench_app.command()
def mitigations(
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Mitigation; repeat for several; default: all.", show_default=False),
    ] = None,
    seeds: Annotated[int, number_option(SEEDS, "Generations of each caption.")] = 4,
    steps: Annotated[int, number_option(STEPS, "Length of the sampler's schedule.")] = 50,
    per_group: Annotated[
        int, number_option(COUNT, "Captions of the most repeated pictures; half as many of each other group.")
    ] = 24,
    attack_seeds: Annotated[int, number_option(AMOUNT, "Generations of each attacked picture; 0: no attack.")] = 2,
    batch_size: Annotated[int, number_option(COUNT, "Samples per batch.")] = 32,
    out: Annotated[
        Path, typer.Option(help="Where results are kept; the same command continues.", parser=places.written_folder)
    ] = Path("mnemoscope-runs/mitigations"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole trial on stdout.")] = False,
) -> None:
    """Every mitigation at every strength on the same prompts, seeds and noises of the bundled model, and under attack.

    Example: mnemoscope bench mitigations --method prompt --method delayed-guidance --seeds 2
    """
    screen.say_loading("Loading demo …")
    from .. import plugins
    from ..demo.mitigations import compare
    from ..models.load import load

    for name in methods or ():
        plugins.find("mitigation", name)
    target = load("demo", device=device)
    screen.say_target(target)
    with screen.stoppable(), screen.progress("mitigations") as show:
        trial = compare(
            target, out, methods, seeds=seeds, steps=steps, per_group=per_group, batch_size=batch_size, attack_seeds=attack_seeds,
            progress=lambda what, done, asked: show(_Done(done, asked, what)), skip=screen.say,
        )  # fmt: skip
    trial = replace(trial, command="mnemoscope bench mitigations")
    file = trial.save(out / "trial.json")
    if as_json:
        from ..report.summary import finite

        screen.show_json(finite(asdict(trial)))
        return
    _show(trial)
    screen.say(f"{file}")


def redteam(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--mitigation", help="What is attacked; repeat for several; default: no mitigation.", show_default=False
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="name=value of the mitigation, where one is named.", show_default=False),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file, a line for each picture: image, caption, and control (true: never trained on). Not for 'demo'.",
            show_default=False,
            parser=places.file,
        ),
    ] = None,
    copy_threshold: Annotated[
        float | None,
        number_option(SIMILARITY, "Similarity of the fingerprint above which a picture is a copy. Not for 'demo'."),
    ] = None,
    seeds: Annotated[int, number_option(SEEDS, "Generations of each picture.")] = 2,
    steps: Annotated[int, number_option(STEPS, "Length of the sampler's schedule.")] = 50,
    per_group: Annotated[int, number_option(COUNT, "Pictures of the bundled world, as many controls.")] = 24,
    batch_size: Annotated[int, number_option(COUNT, "Samples per batch.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: by the device.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="name=value handed to the loader; repeatable.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Does a mitigation hold against someone who looks for another embedding of the same picture?

    Example: mnemoscope redteam demo --mitigation prompt --mitigation delayed-guidance
    """
    names = methods or ["none"]
    options = read_pairs("--option", option, "target=1.0")
    if options and len(names) > 1:
        raise UsageError(f"--option belongs to one mitigation, and {len(names)} are named; run the command for each.")
    if pairs is None and model != "demo":
        raise UsageError("Name the pictures with --pairs FILE: JSONL, a line for each with image, caption and control.")
    given = read_pictures(pairs, copy_threshold) if pairs is not None else None
    screen.say_loading(f"Loading {model} …")
    from ..mitigate.base import build
    from ..models.load import load

    for name in names:
        if name != "none":
            build(name, options)
    target = load(model, dtype=dtype, device=device, **model_options(model_option))
    screen.say_target(target)
    team = _team(target, given, copy_threshold, seeds=seeds, steps=steps, per_group=per_group, batch_size=batch_size)
    n = (2 * len(team.cases) + len(team.controls)) * seeds
    found = []
    for name in names:
        with screen.stoppable(), screen.progress(f"attack on {name}") as show:
            found.append(team.against(name, options, lambda done, name=name: show(_Done(done, n, name))))  # type: ignore[misc]
    if as_json:
        screen.show_json([_plain(a) for a in found])
        return
    screen.table(
        ["mitigation", "copies before", "copies that come back", "controls"],
        [[a.method, _of(a.before), _of(a.after), _of(a.controls)] for a in found],
    )


class _Done:
    """Progress as :func:`screen.progress` shows it."""

    hits = errors = 0
    eta = note = None

    def __init__(self, done: int, asked: int, what: str):
        self.done, self.asked, self.what = done, asked, what


def read_pictures(file: Path, copy_threshold: float | None) -> list[dict[str, Any]]:
    """The lines of a ``--pairs`` file, checked.

    Raises:
        UsageError: with line and cure.
    """
    if copy_threshold is None:
        raise UsageError(
            "--copy-threshold says from which similarity on a picture is a copy, for instance 0.9 (`mnemoscope index`)."
        )
    from ..audit.measures import picture_lines
    from ..records.documents import require_reachable

    found = []
    for k, row in enumerate(picture_lines(file, ', "control": false'), 1):
        image = file.parent / row["image"]
        require_reachable(file, "image", image, "copy the picture into the folder of the list")
        if not os.path.isfile(image):
            raise UsageError(f"{file}, line {k}: {image} does not exist.")
        found.append({"image": image, "caption": row["caption"], "control": bool(row.get("control", False))})
    if not any(not row["control"] for row in found):
        raise UsageError(f"{file} names no picture that was trained on; a line without control is one.")
    return found


def _team(target: Target, given: list[dict[str, Any]] | None, copy_threshold: float | None, **options: Any) -> RedTeam:
    per_group = options.pop("per_group")
    if given is None:
        from ..demo.mitigations import red_team

        return red_team(target, per_group=per_group, **options)
    from ..audit.measures import size_of
    from ..audit.pictures import opened
    from ..audit.redteam import RedTeam
    from ..records.trials import Case
    from ..similarity.reference import ReferenceSet

    parts = {c: [row for row in given if row["control"] == c] for c in (False, True)}
    shown = {c: opened([row["image"] for row in rows], size_of(target)) for c, rows in parts.items()}
    made = {
        c: [Case(str(row["image"]), row["caption"], "control" if c else "trained", str(row["image"])) for row in rows]
        for c, rows in parts.items()
    }
    reference = ReferenceSet.of([case.id for case in made[False]], shown[False])
    reference.threshold = copy_threshold
    return RedTeam(target, made[False], shown[False], made[True], shown[True], reference, **options)


def _show(trial: Trial) -> None:
    from ..report.mitigations import Gate, attacks_table, groups_of, ordinary_table, worst_table

    gate = Gate.of(trial)
    for group in groups_of(trial):
        if group not in trial.plain:
            screen.show()
            screen.show(group)
            screen.table(*worst_table(trial, group))
    screen.show()
    screen.show(f"{' and '.join(trial.plain)}; gated at a first-step magnitude of {gate.above:.3f}")
    screen.table(*ordinary_table(trial, gate))
    if trial.attacks:
        screen.show()
        screen.show("under attack")
        screen.table(*attacks_table(trial, gate))


def _of(hits: list[bool]) -> str:
    return f"{sum(hits)}/{len(hits)}" if hits else "none given"


def _plain(a: Attack) -> dict[str, Any]:
    return {
        "mitigation": a.method, "options": a.options, "before": sum(a.before), "after": sum(a.after), "attacked": len(a.after),
        "controls": sum(a.controls), "controls_attacked": len(a.controls),
    }  # fmt: skip
