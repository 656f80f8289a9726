"""Packets as a forger makes them: changed, with every sum and everything that follows computed again."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import STEPS, make_run

from mnemoscope import stats
from mnemoscope.records.schema import Row
from mnemoscope.records.store import sample_id
from mnemoscope.report.archive import SUMS, Archive, sha256_of, write_sums
from mnemoscope.report.claims import facts_of
from mnemoscope.report.packet import Records, derive, encoded, render_reports, summary_of

Change = Callable[[dict[str, bytes]], None]

TARGET = {
    "kind": "stable-diffusion",
    "weights": {"unet": "sha256:" + "3f" * 32, "vae": "sha256:" + "a9" * 32},
    "scheduler": {"class": "DDIMScheduler", "prediction_type": "epsilon"},
    "dtype": "float32",
}
METHOD = {"name": "magnitude", "class": "Magnitude", "options": {"window": [0, 1]}}
SETTING = {
    "target": TARGET, "detectors": {"magnitude": METHOD}, "guidance": 3.0, "steps": STEPS, "base_seed": 0, "seed_mode": "shared",
}  # fmt: skip
"""A setting as an audit states it."""


def make_stated_run(folder: Path, **changes: Any) -> Path:
    """A run whose manifest states everything that an audit states: model, detectors, reference set."""
    make_run(folder, per_group=2, seeds=2, labels=True, failure=False, setting=SETTING, **changes)
    rows = [Row.model_validate_json(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
    for row in rows:
        row.id = sample_id(row.prompt, row.seed, SETTING)
        if row.image is not None:
            (folder / row.image).rename(folder / f"images/{row.id}.webp")
            row.image = f"images/{row.id}.webp"
    (folder / "samples.jsonl").write_text("".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows))
    manifest = json.loads((folder / "run.json").read_bytes())
    manifest["config"]["reference"] = {"name": "pixels", "pictures": 60, "threshold": 0.9}
    (folder / "run.json").write_text(json.dumps(manifest))
    thresholds = json.loads((folder / "thresholds.json").read_bytes())
    thresholds["setting"] = {
        "target": TARGET, "guidance": 3.0, "steps": STEPS, "window": [0, 1], "seeds": 2, "seed_mode": "shared", "base_seed": 0,
        "method": METHOD | {"options": {}},
    }  # fmt: skip
    (folder / "thresholds.json").write_text(json.dumps(thresholds))
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """A thousand draws per interval would be most of the time of these tests, and none of their point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "separation", functools.partial(stats.separation, resamples=10))
        yield


def nothing(contents: dict[str, bytes]) -> None:
    """No change."""


def rewrite(packed: Path, out: Path, change: Change, *, sums: bool = False) -> Path:
    with zipfile.ZipFile(packed) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    change(contents)
    if sums:
        contents[SUMS] = write_sums({name: sha256_of([data]) for name, data in contents.items() if name != SUMS})
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in contents.items():
            new.writestr(name, data)
    return out


def of_json(name: str, change: Callable[[Any], object]) -> Change:
    def apply(contents: dict[str, bytes]) -> None:
        value = json.loads(contents[name])
        change(value)
        contents[name] = json.dumps(value).encode()

    return apply


def of_row(number: int, change: Callable[[dict[str, Any]], None]) -> Change:
    def apply(contents: dict[str, bytes]) -> None:
        lines = contents["samples.jsonl"].splitlines()
        row = json.loads(lines[number])
        change(row)
        lines[number] = json.dumps(row).encode()
        contents["samples.jsonl"] = b"\n".join(lines) + b"\n"

    return apply


def member(packed: Path, name: str) -> Any:
    with zipfile.ZipFile(packed) as archive:
        return json.loads(archive.read(name))


def write_zip(out: Path, contents: Mapping[str, bytes]) -> Path:
    """An archive of these files, with the sums that they have."""
    listing = write_sums({name: sha256_of([data]) for name, data in contents.items() if name != SUMS})
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**contents, SUMS: listing}.items():
            archive.writestr(name, data)
    return out


def forge(packed: Path, out: Path, change: Change, afterwards: Change = nothing) -> Path:
    """A packet with other records, from which all else follows once more: sums, counts, curves, reports.

    Args:
        packed: An honest packet.
        out: The file to write.
        change: Of what everything else follows from.
        afterwards: Of what follows.
    """
    with zipfile.ZipFile(packed) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    statement = json.loads(contents["packet.json"])
    of_parts(statement, contents)
    contents["packet.json"] = encoded(statement)
    with Archive(write_zip(out, contents)) as archive:
        records, facts = Records(archive), facts_of(statement)
        summary = summary_of(records, facts.run)
        contents |= {name: encoded(value) for name, value in derive(records, summary, facts).items()}
        contents |= render_reports(archive, summary)
    afterwards(contents)
    return write_zip(out, contents)


def of_parts(statement: dict[str, Any], contents: Mapping[str, bytes]) -> None:
    """State the sums and the claims that an honest packet of these files states."""
    manifest = json.loads(contents["run.json"])
    for part in statement["parts"]:
        part["files"] = {name: sha256_of([contents[name]]) for name in part["files"] if name in contents}
        part |= {key: manifest[key] for key in part.keys() & manifest.keys()}
    pictures = statement["pictures"]
    pictures["sha256"] = {name: sha256_of([contents[name]]) for name in pictures["sha256"] if name in contents}
    pictures["packed"] = len(pictures["sha256"])
