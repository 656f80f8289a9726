"""The command that opens a page to try prompts on."""

from __future__ import annotations

import logging
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bounds, interrupts
from ..bounds import GUIDANCE, SEEDS, STEPS
from ..errors import UsageError
from . import output, places, screen
from .opening import bundled_calibration, reference_set
from .pairs import model_options, number_option
from .view import address, bound

if TYPE_CHECKING:
    from ..studio.model import Studio
    from ..studio.server import Doors

PORT = 7348
PATIENCE = 2.0
"""Seconds that work may take to stop after Ctrl-C."""
TOKEN = "MNEMOSCOPE_STUDIO_TOKEN"
FAVORITES = ("oncoming police car", "polar bear, arctic and white")
"""Captions of often repeated pictures that the page begins with."""


def studio(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
    ] = "demo",
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
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Reference set of `mnemoscope index build`, to look for copies in.",
            show_default=False,
            parser=places.folder,
        ),
    ] = None,
    seeds: Annotated[int, number_option(SEEDS, "Pictures of a prompt, and what its score averages over.")] = 4,
    steps: Annotated[int, number_option(STEPS, "Length of the sampler's schedule.")] = 50,
    guidance: Annotated[float | None, number_option(GUIDANCE, "Guidance scale; default: the model's own.")] = None,
    out: Annotated[Path, typer.Option(help="Where exported sessions are written.", parser=places.later_folder)] = Path(
        "runs"
    ),
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: by the device.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="name=value handed to the loader; repeatable.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; other than this machine needs a token.")] = "127.0.0.1",
    port: Annotated[int, number_option(bounds.PORT, "0 takes a free one.")] = PORT,
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN,
            help="What visitors must show; better set by the environment, which no list of processes shows.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Try prompts in a web browser: score, words, pictures, edits side by side. Only from this machine, and works offline.

    Example: mnemoscope studio
    """
    if not find_spec("gradio"):
        raise UsageError(
            "`mnemoscope studio` needs gradio, which is not installed; install it with: pip install 'mnemoscope[studio]'"
        )
    from ..web.access import HEADERS, Gate, hosts
    from ..web.app import serve

    hosts(host, token, TOKEN)  # refused before a model is loaded
    with bound(host, port) as listening:
        options = {"dtype": dtype, "device": device, "model_options": model_options(model_option)}
        settings = {"seeds": seeds, "steps": steps, "guidance": guidance, "accept_threshold": accept_threshold}
        opened = _open(model, calibration, reference, out, **settings, **options)
        from ..studio.server import METHODS, POLICY, create_app

        headers = {**HEADERS, "Content-Security-Policy": POLICY}
        doors = create_app(opened)
        app = Gate(doors, host, token, variable=TOKEN, methods=METHODS, headers=headers)
        screen.show(address(host, listening.getsockname()[1]))
        asks = "; asks for the token once: add ?token=… to the address" if token else ""
        screen.say(f"Open this address in a browser{asks}. Ctrl-C ends it.")
        try:
            with output.without_prompts():
                serve(app, listening, lifespan="on", leaving=lambda: end_soon(doors))
        except KeyboardInterrupt:
            pass
        interrupts.ignore()
        raise typer.Exit(0)


def end_soon(doors: Doors) -> None:
    """Tell all work to stop. A step of a large model hears of it late, so the process does not wait longer than :data:`PATIENCE`."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that are left behind are no news
    doors.leave()
    timer = threading.Timer(PATIENCE, output.end_process, (0,))
    timer.daemon = True
    timer.start()


def _open(model: str, calibration: Path | None, reference: Path | None, out: Path, **settings: Any) -> Studio:
    """The model with its threshold and its reference pictures; what is missing is said."""
    screen.say_loading(f"Loading {model} …")  # before torch is imported, which takes its time
    from ..audit.config import AuditConfig
    from ..audit.run import load
    from ..detect.calibrate import Calibration
    from ..studio.model import Studio

    given = {"calibration": calibration, "reference": reference}
    config = AuditConfig(model=model, **settings, **{k: None if v is None else str(v) for k, v in given.items()})
    found = Calibration.load(calibration) if calibration else None
    pictures = reference_set(reference, model)
    target = load(config)
    screen.say_target(target)
    among, examples = None, ()
    if model == "demo":
        from ..demo.world import World

        among, examples = World().ordinary_words, _examples()
        if found is None:
            found = bundled_calibration(target, config.guidance, config.steps, config.seeds, 1, config.accept_threshold)
            config = config if found is None else config.model_copy(update={"calibration": str(_bundled_thresholds())})
    if found is None:
        screen.say(
            "Note: scores are uncalibrated for this model: ranking is meaningful, “above” is not (mnemoscope calibrate)."
        )
    if pictures is None:
        screen.say("Note: no --reference was given, so pictures are not compared and no copy is called.")
    return Studio(target, config, found, pictures, among, examples, out)


def _bundled_thresholds() -> Path:
    from ..demo.world import ASSETS

    return ASSETS / "thresholds.json"


def _examples() -> tuple[Any, ...]:
    """Prompts of the bundled world whose past is known, the most repeated first."""
    from ..demo.world import World
    from ..studio.model import Example

    world = World()
    most = world.levels[-1]
    shown = [r for r in world.of("planted", copies=most) if r.caption in FAVORITES]
    return (
        *(Example(r.caption, f"its picture stood {most} times in training") for r in shown),
        Example(world.of("heldout")[0].caption, "its picture was never shown"),
        Example("a red apple", "ordinary words"),
    )
