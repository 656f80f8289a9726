"""The command that browses runs."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from .. import bounds, interrupts
from ..errors import UsageError
from . import places, screen
from .pairs import number_option

PORT = 7347


def view(
    folder: Annotated[
        Path, typer.Argument(help="A run folder, or a folder that holds runs.", parser=places.folder)
    ] = Path("runs"),
    host: Annotated[str, typer.Option(help="Where to listen; other than this machine needs a token.")] = "127.0.0.1",
    port: Annotated[int, number_option(bounds.PORT, "0 takes a free one.")] = PORT,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MNEMOSCOPE_VIEW_TOKEN",
            help="What visitors must show; better set by the environment, which no list of processes shows.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Browse runs in a web browser, also while they are written: only from this machine, and needs no torch.

    Example: mnemoscope view runs
    """
    try:
        from ..web.app import create_app, serve
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise UsageError(
            f"`mnemoscope view` needs {package}, which is not installed; install it with: pip install 'mnemoscope[view]'"
        ) from e
    app = create_app(folder, host=host, token=token)
    with bound(host, port) as listening:
        screen.show(address(host, listening.getsockname()[1]))
        screen.say(
            f"Shows the runs in {folder}{'; asks for the token once: add ?token=… to the address' if token else ''}. Ctrl-C ends it."
        )
        try:
            serve(app, listening)
        except KeyboardInterrupt:
            interrupts.ignore()
            raise typer.Exit(0) from None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, or why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as e:
        raise UsageError(f"--host {host!r} is no address of this machine; leave it out, or give 0.0.0.0.") from e
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as e:
        listening.close()
        if e.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use; give another one, or --port 0 for any that is free.") from e
        raise UsageError(
            f"cannot listen on {host} port {port} ({e.strerror or e}); give another --host or --port."
        ) from e
    return listening


def address(host: str, port: int) -> str:
    """What to open."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"
