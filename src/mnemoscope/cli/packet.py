"""``mnemoscope pack`` and ``mnemoscope verify``: an audit as one archive, and whether such an archive is sound. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import places, screen

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def pack(
    runs: Annotated[
        list[Path],
        typer.Argument(help="A run folder, or the folders of one audit's shards.", parser=places.folder),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; default RUN.packet.zip beside the run.", show_default=False, parser=places.written_file
        ),
    ] = None,
    images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images",
            help="Pack the pictures too, and noises that lead to measured ones; they may be other people's.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Pack a run for somebody who was not there: rows, splits, hashes, seeds, thresholds, ROC, what was not tested.

    Example: mnemoscope pack runs/demo
    """
    from ..report.packet import pack as write

    packed = write(runs, out, images=images)
    if as_json:
        screen.show_json(packed.to_dict())
        return
    if packed.status != "done":
        there = f"{packed.counts['ok'] + packed.counts['failed']:,} of {packed.counts['asked']:,} samples are there"
        screen.say(f"Note: the run is {packed.status} ({there}), and the packet says so.")
    screen.show(packed.path)
    screen.show(f"digest {packed.digest}")
    screen.say(f"{packed.files} files, {screen.size(packed.size)}. Check with: mnemoscope verify {packed.path}")
    screen.say(
        "Note the digest, sign it, or have it timestamped: whoever has it can tell whether anything was changed since."
    )


def verify(
    packet: Annotated[Path, typer.Argument(help="A packet of `mnemoscope pack`.", parser=places.file)],
    digest: Annotated[
        str | None, typer.Option(help="The digest that was noted when it was packed.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a packet: every sum, and that its numbers follow from its rows. Exit 0: sound; 1: not; 2: cannot be read; 3: cannot be judged.

    Example: mnemoscope verify runs/demo.packet.zip
    """
    from ..report.verify import verify as check

    found = check(packet, expected=digest)
    if as_json:
        screen.show_json(found.to_dict())
        raise typer.Exit(found.exit_code)
    for fault in found.faults:
        screen.show(f"fault: {fault}")
    screen.show(found.headline)
    if found.digest is not None:
        screen.show(f"digest {found.digest}")
    for doubt in found.doubts:
        screen.say(f"Cannot be judged: {doubt}")
    for checked in found.checked:
        screen.say(f"Checked: {checked}")
    for unchecked in found.unchecked:
        screen.say(f"Not compared: {unchecked}")
    for note in found.notes:
        screen.say(f"Note: {note}")
    if digest is None and found.sound:
        screen.say("Note: compare the digest with the one that was noted when the packet was made (--digest).")
    raise typer.Exit(found.exit_code)
