"""The command that measures how strongly pictures are stored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import screen
from .pairs import model_options

if TYPE_CHECKING:
    from ..audit.measures import Measured


def measure(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    caption: Annotated[
        str | None, typer.Option(help="One caption for all pictures; default: the empty prompt.", show_default=False)
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="JSONL file with image and caption.", show_default=False)
    ] = None,
    preset: Annotated[
        str, typer.Option(help="improved, or official (the authors' settings; many times slower).")
    ] = "improved",
    updates: Annotated[
        int | None, typer.Option(help="Budget of updates; default: the preset's.", show_default=False)
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help="Guidance scales that are tried, for instance 1,3,7; default: the preset's.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the sampler in tests; default: the preset's.", show_default=False)
    ] = None,
    descriptor: Annotated[str, typer.Option(help="What says how similar two pictures are.")] = "fingerprint",
    beta: Annotated[
        float | None,
        typer.Option(
            help="Similarity from which a draw is the picture; needed for models other than 'demo'.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 8,
    out: Annotated[Path, typer.Option(help="Where results are kept; the same command continues.")] = Path(
        "mnemoscope-runs/measure"
    ),
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: by the device.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="name=value handed to the loader; repeatable.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """How strongly is each picture stored? InvMM: the information that noise must carry to bring it back; low is strongly stored.

    Example: mnemoscope measure demo picture.png --caption "oncoming police car"
    """
    if caption is not None and captions is not None:
        raise UsageError("--caption and --captions both say what the pictures show; give one of them.")
    if beta is None and (model != "demo" or descriptor != "fingerprint"):
        raise UsageError(
            f"--beta says from which similarity by {descriptor} on a draw is the picture, for instance 0.85; only the bundled model "
            f"has a calibrated one for the fingerprint."
        )
    screen.say(f"Loading {model} …")
    from ..audit.measures import Picture, measured, pictures_in
    from ..measure.invmm import InvMM, varied
    from ..models.load import load
    from ..similarity.base import build

    pictures = pictures_in(images, captions)
    if caption is not None:
        pictures = [Picture(p.file, caption) for p in pictures]
    target = load(model, dtype=dtype, device=device, **model_options(model_option))
    screen.say_target(target)
    if beta is None:
        from ..demo.world import World

        beta = World().reference.threshold
    chosen = varied(target, preset, updates=updates, steps=steps, scales=_scales(scales))
    method = InvMM(target, build(descriptor), chosen, beta=beta)
    screen.say(f"{len(pictures)} pictures, preset {chosen.name}, at most {chosen.updates} updates each; kept in {out}")
    with screen.stoppable():
        found = measured(method, pictures, out, batch_size=batch_size, progress=_told)
    if as_json:
        screen.show_json([{**vars(m)} for m in found])
        return
    screen.table(
        ["picture", "nats per dimension", "nats", "reproduced", "at least, by plain noise", "guidance"],
        [_row(m) for m in sorted(found, key=lambda m: (m.score, m.result["paid"]))],
        right=(1, 2),
    )
    screen.say(f"Low is strongly stored. Scores of preset {chosen.name} compare with each other only.")


def _scales(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"--scales {text!r}: write guidance scales of 1 or more, for instance 1,3,7.")
    return found


def _told(done: int, asked: int, m: Measured) -> None:
    screen.say(f"{done}/{asked} {Path(m.image).name}: {_score(m)}")


def _score(m: Measured) -> str:
    return f"> {m.result['paid']:.4f}, not reproduced" if m.result["score"] is None else f"{m.score:.4f}"


def _row(m: Measured) -> list[str]:
    r = m.result
    again = "not confirmed" if r["succeeded"] is None else f"{r['succeeded'][0]}/{r['succeeded'][1]} fresh draws"
    return [
        Path(m.image).name, f"> {r['paid']:.4f}" if r["score"] is None else f"{m.score:.4f}",
        "–" if r["nats"] is None else f"{r['nats']:.2f}",
        f"no (nearest {r['similarity']:.2f})" if not r["passed"] else again,
        "unknown" if r["at_least"] is None else f"{r['at_least']:.3g}", "–" if r["scale"] is None else f"{r['scale']:g}",
    ]  # fmt: skip
