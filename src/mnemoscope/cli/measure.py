"""The command that measures how strongly pictures are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bounds import AMOUNT, COUNT, LEAST_SIMILARITY, PART, SCALE, STEPS, shown
from ..errors import UsageError
from ..plugins import BUNDLED
from . import places, screen
from .pairs import LoRA, model_options, number_option

if TYPE_CHECKING:
    from ..audit.companions import Screen, Values
    from ..audit.measures import Measured, Picture
    from ..measure.base import Measure
    from ..measure.invmm import Course

SHARE = 0.3
"""What a screen keeps."""
MOST_CHECKED = 8
"""Pictures that a screen leaves out and that are measured all the same, unless told otherwise."""


def measure(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
    ],
    images: Annotated[
        list[Path], typer.Argument(help="Picture files, or folders of them.", parser=places.file_or_folder)
    ],
    caption: Annotated[
        str | None,
        typer.Option(
            help="One caption for all pictures, '' for the empty prompt; default: prompts are learned.",
            show_default=False,
        ),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="JSONL file with image and caption.", show_default=False, parser=places.file)
    ] = None,
    preset: Annotated[
        str, typer.Option(help="improved, or official (the authors' settings; many times slower).")
    ] = "improved",
    updates: Annotated[int | None, number_option(COUNT, "Budget of updates; default: the preset's.")] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help="Guidance scales that are tried, for instance 1,3,7; default: the preset's.", show_default=False
        ),
    ] = None,
    steps: Annotated[int | None, number_option(STEPS, "Steps of the sampler in tests; default: the preset's.")] = None,
    descriptor: Annotated[str, typer.Option(help="What says how similar two pictures are.")] = "fingerprint",
    beta: Annotated[
        float | None,
        number_option(
            LEAST_SIMILARITY, "Similarity from which a draw is the picture; needed for models other than 'demo'."
        ),
    ] = None,
    companions: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Cheap measures beside the score (`mnemoscope ls measures`); commas between, or repeat.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", help="These cheap measures and nothing else; commas between, or repeat.", show_default=False
        ),
    ] = None,
    screen_by: Annotated[
        str | None,
        typer.Option(
            "--screen", help="Measure only what this cheap measure finds most suspicious.", show_default=False
        ),
    ] = None,
    screen_share: Annotated[
        float | None,
        number_option(PART, f"Share of the pictures that --screen lets through; default {SHARE:g}.", "--screen-share"),
    ] = None,
    screen_check: Annotated[
        int | None,
        number_option(
            AMOUNT,
            "How many of those left out are measured by chance, to see what the screen misses; default one in ten, at most "
            f"{MOST_CHECKED}.",
            "--screen-check",
        ),
    ] = None,
    batch_size: Annotated[int, number_option(COUNT, "Pictures at a time.")] = 8,
    out: Annotated[
        Path, typer.Option(help="Where results are kept; the same command continues.", parser=places.written_folder)
    ] = Path("mnemoscope-runs/measure"),
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: by the device.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    lora: LoRA = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="name=value handed to the loader; repeatable.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """How strongly is each picture stored? InvMM: the information that noise must carry to bring it back; low is strongly stored.

    Example: mnemoscope measure demo picture.png --caption "oncoming police car"

    Many pictures: mnemoscope measure MODEL pictures --beta 0.85 --screen flipd --screen-share 0.1
    """
    if caption is not None and captions is not None:
        raise UsageError("--caption and --captions both say what the pictures show; give one of them.")
    if only and (companions or screen_by):
        raise UsageError(
            "--only runs cheap measures without InvMM, so --with and --screen have nothing to join; leave them out."
        )
    if (screen_share is not None or screen_check is not None) and screen_by is None:
        raise UsageError(
            "--screen-share and --screen-check are about what a cheap measure ranks; name it, for instance --screen flipd."
        )
    if beta is None and not only and (model not in BUNDLED or descriptor != "fingerprint"):
        raise UsageError(
            f"--beta says from which similarity by {descriptor} on a draw is the picture, for instance 0.85; only the bundled models "
            f"have a calibrated one for the fingerprint."
        )
    tried = _scales(scales)
    screen.say_loading(f"Loading {model} …")
    from ..audit.companions import Screen, compared
    from ..audit.measures import Picture, measured, pictures_in
    from ..measure.base import build as measure_of
    from ..measure.invmm import FAMILIES, InvMM, varied
    from ..measure.invmm import preset as preset_of
    from ..models.load import load
    from ..report.measured_page import write_report
    from ..similarity.base import build

    # What is cheap to refuse is refused before gigabytes are read.
    cheap = [measure_of(name) for name in _names(only or companions)]
    if only and not cheap:
        raise UsageError("--only names no measure; write for instance --only flipd (`mnemoscope ls measures`).")
    chosen_by = Screen(measure_of(screen_by), SHARE if screen_share is None else screen_share) if screen_by else None
    if not only:
        preset_of(preset, next(iter(FAMILIES)))
    alike = None if only else build(descriptor)
    pictures = pictures_in(images, captions)
    if chosen_by is not None:
        left_out = len(pictures) - chosen_by.keeps(len(pictures))
        check = min(MOST_CHECKED, left_out // 10) if screen_check is None else screen_check
        chosen_by = replace(chosen_by, check=check)
    if caption is not None:
        pictures = [Picture(p.file, caption) for p in pictures]
    target = load(model, dtype=dtype, device=device, **model_options(model_option, lora))
    screen.say_target(target)
    if alike is None:
        with screen.stoppable():
            values = compared(cheap, target, pictures, out, batch_size=batch_size, progress=_compared)
        _show_values(cheap, pictures, values, as_json=as_json)
        return
    if beta is None:
        from ..demo.world import World

        beta = World(BUNDLED[model]).same_picture
    chosen = varied(target, preset, updates=updates, steps=steps, scales=tried)
    method = InvMM(target, alike, chosen, beta=beta)
    screen.say(f"{len(pictures)} pictures, preset {chosen.name}, at most {chosen.updates} updates each; kept in {out}")
    with screen.stoppable():
        found = measured(
            method, pictures, out, batch_size=batch_size, progress=_told, command=screen.command(), companions=cheap,
            screen=chosen_by, compare=_compared, watch=_watched,
        )  # fmt: skip
    keep_known_levels(model, out)
    page = write_report(out)
    _show(found, cheap, chosen_by, chosen.name, as_json=as_json)
    screen.say(f"Report: {page}")


def keep_known_levels(model: str | None, folder: Path) -> None:
    """Put scores of the bundled model's own pictures beside those of the folder, where they were measured under the same setting."""
    from ..records.measures import keep_levels

    if model in BUNDLED and (known := levels_of(model)).exists():
        keep_levels(folder, known)


def levels_of(model: str) -> Path:
    """Scores of a bundled model's own pictures, by dose; the file need not exist."""
    from ..demo.world import ASSETS

    return ASSETS / f"levels-{model}.json"


def _names(given: Sequence[str] | None) -> list[str]:
    """Names, each once, of options that may be repeated and may hold several."""
    return list(dict.fromkeys(name.strip() for part in given or () for name in part.split(",") if name.strip()))


def _show(found: list[Measured], cheap: Sequence[Measure], by: Screen | None, preset: str, *, as_json: bool) -> None:
    out = sum(m.status != "measured" for m in found)
    if by is not None:
        screen.say(
            f"{out} of {len(found)} pictures were screened out by {by.measure.name}, which kept a share of {by.share:g}: how strongly "
            f"they are stored was not measured."
        )
        if out:
            from ..report.measured import missed_words

            screen.say(missed_words([bool(m.result["passed"]) for m in found if m.checked]))
    if as_json:
        screen.show_json([{**vars(m), "result": m.result or None} for m in found])
        return
    columns = {m.name: m for m in [*cheap, *([by.measure] if by else [])]}
    screen.table(
        ["picture", "nats per dimension", "nats", "reproduced", "at least, by plain noise", "guidance", *columns],
        [
            [*_row(m), *(_value(m.companions.get(name)) for name in columns)]
            for m in sorted(found, key=lambda m: _place(m, by))
        ],
        right=(1, 2, *range(6, 6 + len(columns))),
    )
    screen.say(f"Low is strongly stored. Scores of preset {preset} compare with each other only.")
    _say_readings(columns.values())


def _place(m: Measured, by: Screen | None) -> tuple[float, ...]:
    """Sorts the most strongly stored first, then what was not reached, then what was screened out, the most suspicious first."""
    if m.status != "measured":
        return 1.0, by.key(m.companions) if by is not None else 0.0
    return 0.0, m.score, float(m.result["paid"])


def _show_values(
    cheap: Sequence[Measure], pictures: Sequence[Picture], values: Sequence[Values], *, as_json: bool
) -> None:
    if as_json:
        told = zip(pictures, values, strict=True)
        screen.show_json([{"image": str(p.file), "caption": p.caption, "companions": v} for p, v in told])
        return
    from ..audit.companions import Screen

    first = Screen(cheap[0])
    order = sorted(range(len(pictures)), key=lambda i: first.key(values[i]))
    screen.table(
        ["picture", *(m.name for m in cheap)],
        [[pictures[i].file.name, *(_value(values[i][m.name]) for m in cheap)] for i in order],
        right=range(1, 1 + len(cheap)),
    )
    _say_readings(cheap)


def _say_readings(measures: Iterable[Measure]) -> None:
    for m in measures:
        screen.say(
            f"{m.name}: {m.reads}; {'low' if m.low_is_stored else 'high'} is stored. No threshold comes with it."
        )


def _compared(name: str, done: int, asked: int) -> None:
    screen.say(f"{name}: {done}/{asked} pictures")


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _scales(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(SCALE.admits, found)):
        raise UsageError(f"--scales is {shown(text)}; write guidance scales, each {SCALE.words}, for instance 1,3,7.")
    return found


def _watched(course: Course) -> None:
    screen.say(
        f"  update {course.update}: {course.pictures} on their way, loss {course.loss:.4f}, λ {course.weight:.3g}, nearest "
        f"{course.similarity:.2f}"
    )


def _told(done: int, asked: int, m: Measured) -> None:
    screen.say(f"{done}/{asked} {Path(m.image).name}: {_score(m)}")


def _score(m: Measured) -> str:
    return f"> {m.result['paid']:.4f}, not reproduced" if m.result["score"] is None else f"{m.score:.4f}"


def _row(m: Measured) -> list[str]:
    r = m.result
    if m.status != "measured":
        return [Path(m.image).name, "–", "–", m.status, "–", "–"]
    again = "not confirmed" if r["succeeded"] is None else f"{r['succeeded'][0]}/{r['succeeded'][1]} fresh draws"
    return [
        Path(m.image).name, f"> {r['paid']:.4f}" if r["score"] is None else f"{m.score:.4f}",
        "–" if r["nats"] is None else f"{r['nats']:.2f}",
        f"no (nearest {r['similarity']:.2f})" if not r["passed"] else again,
        "unknown" if r["at_least"] is None else f"{r['at_least']:.3g}", "–" if r["scale"] is None else f"{r['scale']:g}",
    ]  # fmt: skip
