"""The command that explains one prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bounds import FINITE, GUIDANCE, SEEDS, STEP, STEPS, shown
from ..errors import UsageError
from . import places, screen
from .opening import bundled_calibration
from .pairs import LoRA, model_options, number_option
from .screen import speaks_unicode as _speaks_unicode

if TYPE_CHECKING:
    from ..explain.edits import Suggestion
    from ..explain.tokens import Explainer, Explanation

LONGEST = 18
"""Digits of a number that are looked at."""

BAR = 24
"""Characters of the longest bar."""


def explain(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
    ],
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    method: Annotated[
        str,
        typer.Option(
            help="edit (default), wen (the published significance), wen-official, gradient-input, "
            "integrated-gradients or leave-one-out."
        ),
    ] = "edit",
    seeds: Annotated[int, number_option(SEEDS, "Generations.")] = 4,
    at: Annotated[
        str,
        typer.Option(help="Steps to look at, counted from 0: 0, 0-9 or 0,10,49. Only the first costs no trajectory."),
    ] = "0",
    steps: Annotated[int, number_option(STEPS, "Length of the sampler's schedule.")] = 50,
    guidance: Annotated[float | None, number_option(GUIDANCE, "Guidance scale; default: the model's own.")] = None,
    special: Annotated[bool, typer.Option("--special", help="Also show end of text and padding, as one.")] = False,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Look for the smallest edit that brings the score under the threshold.")
    ] = False,
    threshold: Annotated[
        float | None, number_option(FINITE, "What --suggest comes under, without a calibration.")
    ] = None,
    regions: Annotated[
        Path | None,
        typer.Option(
            help="Write a WebP that shows where the prompt pulls its pictures.",
            show_default=False,
            parser=places.written_file,
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="With --regions: curvature, score or attention.")] = "curvature",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of `mnemoscope calibrate`, or its thresholds.json.",
            show_default=False,
            parser=places.file_or_folder,
        ),
    ] = None,
    accept_threshold: Annotated[
        bool, typer.Option("--accept-threshold", help="Use a calibration made under another setting.")
    ] = False,
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
    """Which words make a prompt's score, which edit lowers it, and where in the picture it pulls.

    Example: mnemoscope explain demo "oncoming police car" --suggest
    """
    looked = read_steps(at)
    if looked[-1] >= steps:
        raise UsageError(f"--at names step {looked[-1]}, and the sampler's steps are 0 to {steps - 1}; 0 is the first.")
    screen.say_loading(f"Loading {model} …")  # before torch is imported, which takes its time
    from ..detect.calibrate import Calibration
    from ..explain.tokens import Explainer
    from ..models.load import load

    found = Calibration.load(calibration) if calibration else None
    target = load(model, dtype=dtype, device=device, **model_options(model_option, lora))
    screen.say_target(target)
    if found is None and model == "demo" and looked == tuple(range(len(looked))):
        found = bundled_calibration(target, guidance, steps, seeds, len(looked), accept_threshold)
    run = Explainer(target, seeds=seeds, at=looked, steps=steps, guidance=guidance)
    result = run.explain([prompt], method, calibration=found, accept_threshold=accept_threshold)[0]
    document = result.to_dict()
    if not as_json:
        _show(result, special=special)
    if suggest:
        suggested = _suggest(run, result, threshold, bundled=model == "demo")
        document["suggestion"] = suggested.to_dict()
        if not as_json:
            _show_suggestion(suggested)
    if regions is not None:
        document["regions"] = _write_regions(run, prompt, kind, regions)
        if not as_json:
            screen.show()
            screen.show(f"{regions}: {document['regions']['alt']}")
    if as_json:
        screen.show_json(document)


def read_steps(text: str) -> tuple[int, ...]:
    """``0``, ``0-9`` or ``0,10,49``: indices, each once, ascending."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if span is None:
            raise UsageError(f"--at {text!r} names no steps; write 0, 0-9 or 0,10,49.")
        first, last = (_step(digits, text) for digits in (span[1], span[2] or span[1]))
        found |= set(range(first, last + 1))
    if not found:
        raise UsageError(f"--at {text!r} is an empty range; write the smaller step first, for instance 0-9.")
    return tuple(sorted(found))


def _step(digits: str, text: str) -> int:
    number = int(digits) if len(digits) <= LONGEST else STEP.high + 1
    if not STEP.admits(number):
        raise UsageError(f"--at is {shown(text)}; each step is {STEP.words}, and 0 is the first.")
    return int(number)


def bar(share: float) -> str:
    """A bar for a share in [−1, 1] of the largest value; what lowers the score is drawn lighter."""
    full, light = "█░" if _speaks_unicode() else "#-"
    return (full if share > 0 else light) * round(abs(share) * BAR)


def _show(result: Explanation, *, special: bool) -> None:
    screen.show(result.sentence)
    rows = [[w.text, f"{w.value:.4f}", bar(share), _places(w.positions)] for w, share in result.shares(special=special)]
    screen.table(["word", result.method, "of the largest", "positions"], rows, right=(1,))
    if not rows:
        screen.show("no words: the empty prompt is the null prompt, and scores 0")
    screen.say(f"{result.forwards} forwards, {result.backwards} backward passes")


def _places(positions: Sequence[int]) -> str:
    """Positions in a row as a range."""
    if len(positions) > 1 and positions[-1] - positions[0] == len(positions) - 1:
        return f"{positions[0]}-{positions[-1]}"
    return ",".join(map(str, positions))


def _suggest(run: Explainer, result: Explanation, threshold: float | None, *, bundled: bool) -> Suggestion:
    from ..demo.world import World
    from ..explain.edits import suggest

    return suggest(run, result, threshold, among=World().ordinary_words if bundled else None)


def _show_suggestion(suggested: Suggestion) -> None:
    screen.show()
    screen.show(suggested.words)
    if suggested.edits:
        screen.show(f"  {suggested.text}")
    if suggested.alternatives:
        rows = [[e.words, f"{e.score:.4f}", e.prompt] for e in suggested.alternatives]
        screen.table(["or", "score", "prompt"], rows, right=(1,))


def _write_regions(run: Explainer, prompt: str, kind: str, out: Path) -> dict[str, Any]:
    from ..explain.overlay import overlay
    from ..explain.regions import regions
    from ..records.store import write_whole

    options: dict[str, Any] = {"seeds": run.seeds, "steps": run.steps, "guidance": run.guidance}
    drawn = overlay(regions(run.target, prompt, kind, **options))
    write_whole(out, drawn.webp)
    return {"file": str(out), "alt": drawn.alt, "kind": kind}
