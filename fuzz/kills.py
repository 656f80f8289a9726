"""Commands that are killed, interrupted or ended at any moment, and then repeated: nothing is lost, and the result is the same."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .children import Child, command, fault_of, run, sentences_of
from .honest import Honest
from .tries import Kind, Try

KILLS = 3
"""Of one try, at most."""

NEAR = 1e-3
"""Relative difference of numbers that were computed in other batches."""

INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """A command that writes a folder ``out`` and can be continued.

    Attributes:
        words: The command.
        content: What the folder holds, as rows by name, without times.
    """

    words: Callable[[Honest], tuple[object, ...]]
    content: Callable[[Path], dict[str, Any]]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def _audit_content(out: Path) -> dict[str, Any]:
    rows = {row["id"]: {k: v for k, v in row.items() if k != "seconds"} for row in _rows(out / "samples.jsonl")}
    pictures = {str(p.relative_to(out)): p.stat().st_size > 0 for p in sorted((out / "images").iterdir())}
    return rows | pictures | {"status": json.loads((out / "run.json").read_bytes())["status"]}


def _measure_content(out: Path) -> dict[str, Any]:
    kept = ("id", "value", "values", "result", "status")
    files = {str(p.relative_to(out)): json.loads(p.read_bytes()) for p in sorted(out.rglob("*/*.json"))}
    return {name: {k: v for k, v in document.items() if k in kept} for name, document in files.items()}


def _train_content(out: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    weights = load_file(out / "pytorch_lora_weights.safetensors")
    steps = [row["step"] for row in _rows(out / "losses.jsonl") if "step" in row]
    return {name: float(abs(tensor).sum()) for name, tensor in weights.items()} | {"steps": steps}


def _index_content(out: Path) -> dict[str, Any]:
    manifest = json.loads((out / "manifest.json").read_bytes())
    rows = {row["id"]: row for row in _rows(out / "rows.jsonl")}
    return rows | {
        "vectors": (out / "vectors.bin").read_bytes().hex(),
        "status": manifest["status"],
        "pictures": manifest["pictures"],
    }


AUDIT = ("--seeds", 2, "--steps", 3, "--images", "--batch-size", 2, "--out", "out")
TRAIN = ("--lora", 2, "--steps", 6, "--batch-size", 2, "--save-every", 2, "--out", "out")
CHEAP = ("--only", "denoising-loss", "--batch-size", 1, "--out", "out")
LEARNED = ("--updates", 2, "--steps", 2, "--beta", 0.0, "--caption", "dots", "--batch-size", 1, "--out", "out")
JOBS = {
    "audit": Job(lambda h: ("audit", h.model, "--prompts", h.prompts, "--reference", h.index, *AUDIT), _audit_content),
    "measure": Job(lambda h: ("measure", h.model, h.pictures, *CHEAP), _measure_content),
    "measure by prompts": Job(lambda h: ("measure", h.model, *h.measured, *LEARNED), _measure_content),
    "train": Job(lambda h: ("train", h.model, h.pictures, *TRAIN), _train_content),
    "index build": Job(lambda h: ("index", "build", h.pictures, "--out", "out"), _index_content),
}


@cache
def _undisturbed(honest: Honest, name: str) -> tuple[float, dict[str, Any]]:
    """How long a job takes, and what it leaves."""
    folder = honest.folder / f"job-{name.replace(' ', '-')}"
    folder.mkdir()
    outcome = run(folder, *JOBS[name].words(honest))
    if outcome.code != 0:
        raise RuntimeError(f"{name}: {outcome.err[-3000:]}")
    return outcome.seconds, JOBS[name].content(folder / "out")


def _prepare(honest: Honest) -> None:
    _ = honest.model, honest.prompts, honest.index, honest.pictures
    for name in JOBS:
        _undisturbed(honest, name)


def _try_job(number: signal.Signals) -> Callable[[Honest, Try], None]:
    def attempt(honest: Honest, t: Try) -> None:
        name = t.chance.choice(sorted(JOBS))
        job = JOBS[name]
        seconds, right = _undisturbed(honest, name)
        words = job.words(honest)
        t.say(name)
        for _ in range(t.chance.randrange(1, KILLS + 1)):
            child, moment = Child(command(*words), t.folder), t.chance.uniform(0, 1.1 * seconds)
            if not child.ended_within(moment):
                child.send(number)
                t.kills += 1
                t.say(f"{number.name} after {moment:.3f} s")
            outcome = child.wait()
            t.outcomes.append((" ".join(map(str, words)), outcome))
            if outcome.signal != number and (fault := fault_of(outcome, (0, 2, INTERRUPTED), ())):
                t.blame(fault[0], f"{name}, {number.name}: {fault[1]}")
            if outcome.code == 2:
                t.blame("lost rows", f"{name} does not continue: {sentences_of(outcome)[0]}")
        outcome = t.run(*words)
        if outcome.code != 0:
            t.blame("lost rows", f"{name} does not continue: exit code {outcome.code}, {outcome.err.strip()[-200:]}")
        elif apart := list(_apart(right, job.content(t.folder / "out"))):
            t.blame("lost rows", f"{name}: {len(apart)} differences to an undisturbed one, the first: {apart[0]}")

    return attempt


def _apart(one: Any, other: Any, way: str = "") -> Any:
    """Where two contents differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {**one, **other}:
            if name not in one or name not in other:
                yield f"{way}/{name} is {'more' if name in other else 'missing'}"
            else:
                yield from _apart(one[name], other[name], f"{way}/{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _apart(a, b, f"{way}/{i}")
    elif isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=NEAR, abs_tol=NEAR):
            yield f"{way} is {other}, and {one} undisturbed"
    elif one != other:
        yield f"{way} is {str(other)[:80]}, and {str(one)[:80]} undisturbed"


def try_start(honest: Honest, t: Try) -> None:
    """Ctrl-C while a real process starts: one line and exit code 130, as soon as there is code of ours to say it."""
    words = t.chance.choice(
        (
            ("check", honest.model, "a cat", "--steps", 2, "--seeds", 1),
            ("index", "info", honest.index),
            ("report", "nothing"),
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mnemoscope", *map(str, words)], cwd=t.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env=dict(os.environ),
    )  # fmt: skip
    moment = t.chance.uniform(0.1, 5.0)
    time.sleep(moment)
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGINT)
        t.kills += 1
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        t.blame("hangs", "no end after SIGINT")
        return
    t.say(f"{words[0]}, SIGINT after {moment:.3f} s")
    text = err.decode("utf-8", errors="replace")
    ours = "mnemoscope/" in text
    if "Traceback" in text and ours:
        t.blame("tracebacks", f"{words[0]} while it starts: {text.strip().splitlines()[-1][:200]}")
    elif alive and process.returncode not in (0, 2, INTERRUPTED, -signal.SIGINT):
        t.blame("tracebacks", f"{words[0]} while it starts: exit code {process.returncode}")


KINDS = (
    Kind("kills", 110, _prepare, _try_job(signal.SIGKILL)),
    Kind("interrupts", 40, _prepare, _try_job(signal.SIGINT)),
    Kind("terminations", 30, _prepare, _try_job(signal.SIGTERM)),
    Kind("interrupted starts", 16, lambda h: (h.model, h.index), try_start),
)
