"""The command that serves a model behind the guard."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bounds, interrupts
from ..bounds import AMOUNT, COUNT, FINITE, POSITIVE, SERVED_GUIDANCE, SIDE, STEPS
from ..errors import UnknownName, UsageError
from ..records.files import open_to_append
from . import output, places, screen
from .pairs import model_options, number_option
from .view import address, bound

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from ..detect.calibrate import Calibration
    from ..models.base import Target
    from ..serve.app import Endpoint

log = logging.getLogger(__name__)

PORT = 7349
KEY = "MNEMOSCOPE_API_KEY"
LONGEST_KEY = 1 << 12
"""Characters of a key: servers take no longer header."""
ON_HIT = ("observe", "mitigate", "refuse")
ON_ERROR = ("open", "closed")


def serve(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder or .safetensors file of the model; 'demo' is the bundled one.")
    ],
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="A score above which a generation is a hit, or the run folder of `mnemoscope calibrate`.",
            show_default=False,
        ),
    ] = None,
    accept_threshold: Annotated[
        bool, typer.Option("--accept-threshold", help="Use a calibration made under another setting.")
    ] = False,
    on_hit: Annotated[
        str, typer.Option(help="What becomes of a hit: observe (count it), mitigate, refuse.")
    ] = "observe",
    mitigation: Annotated[str, typer.Option(help="How to mitigate; see `mnemoscope ls mitigations`.")] = "prompt",
    on_error: Annotated[
        str, typer.Option(help="When the guard itself fails: open draws unguarded, closed draws nothing.")
    ] = "open",
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log",
            help="File that gets one JSON line per decision; SIGHUP opens it again.",
            show_default=False,
            parser=places.appended_file,
        ),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into that file as well.")] = False,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: its own name.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        number_option(STEPS, "Sampler steps where a request says nothing; default: 50, or as calibrated."),
    ] = None,
    guidance: Annotated[
        float | None,
        number_option(SERVED_GUIDANCE, "The same for the guidance scale; default: the model's own."),
    ] = None,
    max_steps: Annotated[int, number_option(STEPS, "Most sampler steps of a request.")] = 100,
    max_size: Annotated[
        int | None,
        number_option(SIDE, "Longest side in pixels; default: twice what the model was trained at."),
    ] = None,
    max_n: Annotated[int, number_option(COUNT, "Most pictures of a request, which are drawn together.")] = 4,
    max_prompt: Annotated[int, number_option(COUNT, "Most characters of a prompt.")] = 4000,
    queue: Annotated[int, number_option(AMOUNT, "How many requests may wait; more are told to come back.")] = 16,
    timeout: Annotated[float, number_option(POSITIVE, "Seconds that a request may take, waiting included.")] = 300.0,
    grace: Annotated[
        int, number_option(AMOUNT, "Seconds that what is drawn may still take when the server is ended.")
    ] = 30,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: by the device.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default=False)] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="name=value handed to the loader; repeatable.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; other than this machine needs a key.")] = "127.0.0.1",
    port: Annotated[int, number_option(bounds.PORT, "0 takes a free one.")] = PORT,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with the key that callers must send; or set {KEY}.", show_default=False, parser=places.file
        ),
    ] = None,
) -> None:
    """Serve a model over OpenAI's images API, with a guard in front that knows memorized content by the first step.

    Example: mnemoscope serve demo
    """
    for package in ("fastapi", "uvicorn"):
        if not find_spec(package):
            raise UsageError(
                f"`mnemoscope serve` needs {package}, which is not installed; install it with: pip install 'mnemoscope[serve]'"
            )
    from ..web.access import hosts
    from ..web.connections import require_room

    # What is cheap to refuse is refused before a model is loaded.
    key = api_key(api_key_file)
    hosts(host, key, KEY)
    require_room(queue)
    for option, given, known in (("--on-hit", on_hit, ON_HIT), ("--on-error", on_error, ON_ERROR)):
        if given not in known:
            raise UnknownName(f"{option} value", given, known)
    if thresholds is None and on_hit != "observe" and model != "demo":
        raise UsageError(f"--on-hit {on_hit} needs --thresholds: without them nothing is a hit.")
    if log_prompts and log_file is None:
        raise UsageError("--log-prompts needs --log: name the file that they should be written to.")
    if steps is not None and steps > max_steps:
        raise UsageError(f"--steps {steps} is more than --max-steps {max_steps}; make one of them fit the other.")
    if isinstance(file := _threshold(thresholds), Path):
        places.file_or_folder(str(file))
    interrupts.take_terminate()  # with 0, which is what uvicorn ends with when it was told to end
    with ExitStack() as stack:
        listening = stack.enter_context(bound(host, port))
        written = None if log_file is None else stack.enter_context(LogFile(log_file))
        if written is not None and hasattr(signal, "SIGHUP"):
            stack.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, written.open_again))
        screen.say_loading(f"Loading {model} …")  # before torch is imported, which takes its time
        guarding = {
            "on_hit": on_hit, "mitigation": mitigation, "on_error": on_error, "log": written, "log_prompts": log_prompts,
            "accept": accept_threshold,
        }  # fmt: skip
        limiting = {
            "name": name or "", "largest": max_size, "steps": steps, "most_steps": max_steps,
            "guidance": guidance, "most_pictures": max_n, "longest_prompt": max_prompt,
        }  # fmt: skip
        loading = {"dtype": dtype, "device": device, **model_options(model_option)}
        serving = {"queue": queue, "seconds": timeout, "keyed": key is not None}
        endpoint = _open(model, thresholds, guarding, limiting, loading, serving)
        from ..web.app import serve as answer

        app = gated(endpoint, host, key)
        interrupts.end_loading()
        code: Any = 0
        try:
            screen.show(address(host, listening.getsockname()[1]))
            asks = "asks for the key; " if key else ""
            screen.say(f"Serves {endpoint.limits.model} at /v1/images/generations; {asks}Ctrl-C ends it.")
            with output.without_prompts():
                # Uvicorn's own deadline comes after ours, and only for what does not keep to it.
                answer(
                    app,
                    listening,
                    lifespan="on",
                    grace=grace + 2,
                    leaving=lambda: endpoint.leave(float(grace)),
                    waiting=queue,
                )
        except KeyboardInterrupt:
            pass
        except SystemExit as end:
            code = end.code
        interrupts.ignore()
        if endpoint.worker.alive:
            output.end_process(code or 0)
        raise typer.Exit(code or 0)


def api_key(file: Path | None) -> str | None:
    """The key that callers must send, from a file or the environment; None: nobody is asked.

    Raises:
        UsageError: the file cannot be read, or what it holds cannot stand in a header.
    """
    if file is None:
        key, source = os.environ.get(KEY), KEY
        if key is None:
            return None
    else:
        source = str(file)
        try:
            key = _start_of(file).decode("utf-8")
        except (OSError, UnicodeError) as e:
            raise UsageError(f"--api-key-file {file} cannot be read ({e}); give a file with one line, the key.") from e
    if len(key) > LONGEST_KEY:
        raise UsageError(f"the key in {source} has more than {LONGEST_KEY:,} characters; give one long random word.")
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"the key in {source} is empty or has other than ASCII characters without spaces; give a long random word."
        )
    return key


def _start_of(file: Path) -> bytes:
    """As much as a key can have, of a file or of a pipe that somebody writes; nobody is waited for who never comes."""
    number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(number, True)
        with os.fdopen(number, "rb", closefd=False) as content:
            return content.read(LONGEST_KEY + 1)
    finally:
        os.close(number)


def gated(endpoint: Endpoint, host: str, key: str | None) -> ASGIApp:
    """The application behind whoever decides who may come in."""
    from ..serve.app import PROBES
    from ..serve.schema import error_response
    from ..web.access import KeyGate

    return KeyGate(endpoint.app, host, key, refusal=error_response, variable=KEY, open=PROBES)


class LogFile:
    """A file that lines are appended to. It can be opened again, for whoever has moved it away.

    Args:
        path: Where it lies.

    Raises:
        UsageError: it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()  # a signal may come while its own handler runs
        try:
            self._file = open_to_append(path)
        except OSError as e:
            raise UsageError(
                f"--log {path} cannot be written ({e.strerror or e}); name a file in a folder that exists."
            ) from e

    def write(self, text: str) -> None:
        """Append it, at once."""
        with self._lock:
            self._file.write(text)
            self._file.flush()

    def open_again(self, *_: object) -> None:
        """Go on in a file of the same name; where there can be none, in the one that is open."""
        with self._lock:
            try:
                other = open_to_append(self.path)
            except OSError as e:
                log.warning("the log was not opened again: %s", e.strerror or type(e).__name__)
                return
            self._file.close()
            self._file = other

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _open(
    model: str,
    thresholds: str | None,
    guarding: dict[str, Any],
    limiting: dict[str, Any],
    loading: dict[str, Any],
    serving: dict[str, Any],
) -> Endpoint:
    """The guarded pipeline with its limits; what is missing is said."""
    from ..detect.calibrate import Calibration
    from ..models.load import build, open_pipeline
    from ..serve.app import Endpoint
    from ..serve.guard import guard
    from ..serve.schema import calibrated, in_words, limits_of

    chosen: float | Path | Calibration = _threshold(thresholds)
    if isinstance(chosen, Path):  # before the model is opened, which takes its time
        chosen = Calibration.load(chosen)
    pipe, origin, recommended = open_pipeline(model, **loading)
    target = build(pipe, origin, **recommended)
    if "height" not in inspect.signature(type(pipe).__call__).parameters:
        raise UsageError(
            f"{origin.name} is a {type(pipe).__name__}, which draws no picture from a prompt alone; serve a text-to-image model."
        )
    limits = limits_of(target, **limiting)
    screen.say_target(target)
    bundled = _bundled(target) if thresholds is None and model == "demo" else None
    if thresholds is None and bundled is None:
        if guarding["on_hit"] != "observe":
            raise UsageError(f"--on-hit {guarding['on_hit']} needs --thresholds: without them nothing is a hit.")
        screen.say(
            "Note: scores are uncalibrated, so they are reported and nothing is a hit; for a threshold run `mnemoscope calibrate "
            f"{model} --prompts ordinary.txt --seeds 1 --seed-mode per-prompt --out runs/ordinary` and give --thresholds runs/ordinary."
        )
    pipe.set_progress_bar_config(disable=True)
    guarded = guard(pipe, bundled or chosen, name=limits.model, **guarding)
    narrowed = calibrated(limits, guarded, steps=limiting["steps"])
    if narrowed is not limits:
        size, counts = f"{narrowed.width}x{narrowed.height}", in_words(narrowed.counts)
        screen.say(f"Note: serves {size} with {counts} steps only, which is what the thresholds were made for.")
    return Endpoint(guarded, narrowed, **serving)


def _bundled(target: Target) -> Calibration | None:
    """The thresholds that come with the bundled model, where it runs as it did when they were made."""
    from ..demo.world import World
    from ..models.identity import PROVENANCE

    found = World().guard_thresholds
    now = {k: v for k, v in target.identity().items() if k not in PROVENANCE}
    return found if now == found.record.setting["target"] else None


def _threshold(text: str | None) -> float | Path:
    """A number or a file; without either, what no score exceeds.

    Raises:
        UsageError: no threshold is so large or so small, or none at all.
    """
    from ..serve.schema import NEVER

    if text is None:
        return NEVER
    try:
        number = float(text)
    except ValueError:
        return Path(text)
    return float(FINITE.judge("--thresholds", number))
