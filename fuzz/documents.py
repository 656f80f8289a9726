"""Kinds of documents: what is altered, which commands read it, and what would be wrong."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .changes import (
    change_bytes,
    change_json,
    change_lines,
    change_place,
    change_safetensors,
    change_yaml,
    equal_documents,
    stands_twice,
    stands_twice_in_yaml,
)
from .forgeries import (
    COUNTED,
    DERIVED,
    JUDGED,
    ROWS,
    change_archive,
    equal_packets,
    read_folder,
    read_members,
    signed_anew,
    write_archive,
    write_folder,
)
from .honest import Honest
from .tries import Kind, Try

RECORDS = ("run.json", "samples.jsonl", "thresholds.json")
PROMPT = "a red apple"
PLACES = 0.12
"""Share of inputs in which a file is something else."""


def change_file(t: Try, path: Path) -> bytes | None:
    """Alter a file by what it is; its bytes now, or None: it is no file any more."""
    if t.chance.random() < PLACES:
        t.say(f"{path.name}: {change_place(t.chance, path)}")
        return None
    changes: dict[str, Callable[[random.Random, bytes], tuple[bytes, str]]] = {
        ".json": change_json, ".jsonl": change_lines, ".yaml": change_yaml, ".safetensors": change_safetensors,
    }  # fmt: skip
    content, what = changes.get(path.suffix, change_bytes)(t.chance, path.read_bytes())
    path.write_bytes(content)
    t.say(f"{path.name}: {what}")
    return content


def choose_file(t: Try, folder: Path, likely: str = "") -> Path:
    """A file of a folder, more often one whose name fits a pattern."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    often = [p for p in files if re.search(likely, p.name)]
    return t.chance.choice(often if often and t.chance.random() < 0.8 else files)


# Packets ------------------------------------------------------------------------------------------------------------------


def try_packet(honest: Honest, t: Try) -> None:
    """A packet that was changed, with or without new sums, by bytes, values, entries or with a plan."""
    path, members = t.folder / "p.zip", read_members(honest.packet)
    way = t.chance.choice(("bytes", "member", "archive", "signed", "forged", "forged", "packed"))
    if way == "bytes":
        content, what = change_bytes(t.chance, honest.packet.read_bytes())
        path.write_bytes(content)
        t.say(what)
    elif way == "archive":
        t.say(change_archive(t.chance, members, path))
    elif way in ("member", "signed"):
        folder = t.folder / "unpacked"
        write_folder(members, folder)
        file = choose_file(t, folder, "json|SUMS|README")
        change = {".json": change_json, ".jsonl": change_lines}.get(file.suffix, change_bytes)
        content, what = change(t.chance, file.read_bytes())
        t.say(f"{file.name}: {what}{', sums made anew' if way == 'signed' else ''}")
        members[str(file.relative_to(folder))] = content
        write_archive(signed_anew(members) if way == "signed" else members, path)
    else:
        name, forge = t.chance.choice(ROWS if way == "packed" else ROWS + DERIVED)
        forge(t.chance, members)
        t.say(f"{name}, {'packed' if way == 'packed' else 'sums made'} anew")
        if way == "forged":
            write_archive(signed_anew(members), path)
        elif not _packed(t, members):
            return
    _verify(honest, t, path, way)


def _packed(t: Try, members: dict[str, bytes]) -> bool:
    write_folder(
        {k: v for k, v in members.items() if k not in ("packet.json", "SHA256SUMS", "README.txt", "report.html")},
        t.folder / "run",
    )
    return t.run("pack", "run", "--out", "p.zip").code == 0


def _verify(honest: Honest, t: Try, path: Path, way: str) -> None:
    outcome = t.run("verify", "p.zip", verdicts=(1, 3))
    same = equal_packets(honest.packet, path) or (way == "packed" and _is_repaired(honest, t, path))
    if outcome.code == 0 and way != "signed" and not same:
        t.blame("wrongly accepted", f"verify: sound, but {'; '.join(t.words)}")
    if way == "signed" and not same and t.chance.random() < 0.3:
        noted = t.run("verify", "p.zip", "--digest", honest.noted, verdicts=(1, 3))
        if noted.code == 0:
            t.blame("wrongly accepted", "verify --digest: sound")


def _is_repaired(honest: Honest, t: Try, path: Path) -> bool:
    """Whether packing has left out what was wrong, or says what is missing."""
    records = [{k: v for k, v in read_members(p).items() if k in RECORDS} for p in (honest.packet, path)]
    rows = [{row["id"]: row for row in map(json.loads, r.pop("samples.jsonl").splitlines())} for r in records]
    said = "".join(outcome.out + outcome.err for _, outcome in t.outcomes)
    incomplete = len(rows[1]) < honest.samples and f"{len(rows[1])} of {honest.samples}" in said
    return records[0] == records[1] and (rows[0] == rows[1] or incomplete)


# Runs ---------------------------------------------------------------------------------------------------------------------


def try_run(honest: Honest, t: Try) -> None:
    """A run folder that was changed, read by a report, a gate, or packed and verified."""
    folder = t.folder / "run"
    way = t.chance.choice(("altered", "altered", "incomplete", "judged"))
    if way == "altered":
        shutil.copytree(honest.run, folder)
        file = choose_file(t, folder, r"^(run|samples|thresholds|controls)\.json")
        content = change_file(t, file)
        twice = content is not None and file.suffix == ".json" and file.name != "gate.json" and stands_twice(content)
    else:
        members, twice = read_folder(honest.run), False
        name, forge = t.chance.choice(COUNTED if way == "incomplete" else JUDGED)
        forge(t.chance, members)
        write_folder(members, folder)
        t.say(name)
    reader = t.chance.choice(("report", "report", "gate", "pack"))
    kept = _kept_rows(honest, folder)
    if reader == "gate":
        _gate(honest, t, kept, way, twice)
    elif reader == "report":
        _report(honest, t, kept, twice)
    else:
        _pack(honest, t, kept, twice)


def _kept_rows(honest: Honest, folder: Path) -> int | None:
    """How many of the run's rows are still there, as they were or with other values; None: that cannot be counted."""
    known = {json.loads(line)["id"] for line in (honest.run / "samples.jsonl").read_bytes().splitlines()}
    file, kept = folder / "samples.jsonl", set()
    if not file.is_file() or file.stat().st_size > 1 << 24:
        return None
    for line in file.read_bytes().splitlines():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            kept |= {json.loads(line)["id"]} & known
    return len(kept)


def _gate(honest: Honest, t: Try, kept: int | None, way: str, twice: bool) -> None:
    outcome = t.run("gate", "run", "--policy", honest.policy, "--out", "gate.json", "--json", verdicts=(1, 3))
    if outcome.code != 0:
        return
    if kept is not None and kept < honest.samples:
        t.blame("lost rows", f"gate: passes with {kept} of {honest.samples} rows")
    if way == "judged" or twice:
        t.blame("wrongly accepted", f"gate: passes, but {'; '.join(t.words)}")


def _report(honest: Honest, t: Try, kept: int | None, twice: bool) -> None:
    form = t.chance.choice(("json", "json", "markdown", "html"))
    outcome = t.run("report", "run", "--format", form, "--out", "made")
    if outcome.code != 0:
        return
    text = (t.folder / "made").read_text(encoding="utf-8", errors="replace") + outcome.err + outcome.out
    if kept is not None and kept < honest.samples and not re.search(rf"\b{kept} of {honest.samples}\b", text):
        t.blame("lost rows", f"report {form}: does not say that {kept} of {honest.samples} rows are there")
    if twice:
        t.blame("wrongly accepted", "report: a key stands twice")


def _pack(honest: Honest, t: Try, kept: int | None, twice: bool) -> None:
    packed = t.run("pack", "run", "--out", "p.zip")
    if packed.code != 0:
        return
    outcome = t.run("verify", "p.zip", verdicts=(1, 3))
    text = packed.err + packed.out + outcome.err + outcome.out
    if outcome.code == 0 and twice:
        t.blame("wrongly accepted", "pack and verify: a key stands twice")
    if (
        outcome.code == 0
        and kept is not None
        and kept < honest.samples
        and not re.search(rf"\b{kept} of {honest.samples}\b", text)
    ):
        t.blame("lost rows", f"pack and verify: sound with {kept} of {honest.samples} rows")


# Indexes ------------------------------------------------------------------------------------------------------------------


def try_index(honest: Honest, t: Try) -> None:
    """An index that was changed: what it answers is what the original answers, or it is refused."""
    folder = t.folder / "index"
    shutil.copytree(honest.index, folder)
    file = choose_file(t, folder, "manifest|rows|vectors")
    before = file.read_bytes()
    content = change_file(t, file)
    if content is not None and t.chance.random() < 0.3:
        t.say("its sum is made anew")
        _sign_index(folder, file.name, before, content)
        signed = True
    else:
        signed = False
    if t.chance.random() < 0.2:
        t.run(
            *t.chance.choice(
                (
                    ("index", "info", "index"),
                    ("duplicates", "index", "--out", "d"),
                    ("index", "locate", "index", honest.pictures),
                )
            )
        )
        return
    outcome = t.run("index", "query", "index", honest.pictures / "p1.png", "--json")
    if outcome.code != 0:
        return
    answer, right = json.loads(outcome.out)["pictures"][0]["nearest"], honest.nearest
    if any(not isinstance(m["similarity"], float) or not -1.001 <= m["similarity"] <= 1.001 for m in answer):
        t.blame("wrongly accepted", "index query: a similarity is no number from -1 to 1")
    elif not signed and [(m["reference"], m["similarity"]) for m in answer] != right:
        t.blame("wrongly accepted", f"index query: another answer, but {'; '.join(t.words)}")
    elif content is not None and file.suffix == ".json" and stands_twice(content):
        t.blame("wrongly accepted", "index query: a key stands twice")


def _sign_index(folder: Path, name: str, before: bytes, content: bytes) -> None:
    import hashlib

    manifest = folder / "manifest.json"
    if name != manifest.name and manifest.is_file():
        text = manifest.read_text()
        was, now = (hashlib.sha256(c).hexdigest() for c in (before, content))
        manifest.write_text(text.replace(was, now))


# Thresholds, policies, configurations -------------------------------------------------------------------------------------


def try_thresholds(honest: Honest, t: Try) -> None:
    """A threshold that was changed, for a prompt."""
    file = t.folder / "thresholds.json"
    shutil.copyfile(honest.thresholds, file)
    content = change_file(t, file)
    outcome = t.run(
        "check", honest.model, PROMPT, "--seeds", 1, "--steps", 2, "--calibration", file.name, "--json", verdicts=()
    )
    if outcome.code == 0 and content is not None and not _is_lawful(content, honest.thresholds.read_bytes()):
        t.blame("wrongly accepted", f"check: {'; '.join(t.words)}")


def _is_lawful(content: bytes, original: bytes) -> bool:
    """Whether a threshold follows from its scores, at a rate that is one, and is of the same setting."""
    from mnemoscope import stats

    if equal_documents(content, original):
        return True
    try:
        document, was = json.loads(content), json.loads(original)
        follows = stats.threshold_at_fpr(document["scores"], document["fpr"], confidence=document["confidence"]).value
        near = math.isclose(follows, document["threshold"], rel_tol=1e-9)
        return (
            near
            and 0 < document["fpr"] < 1
            and _stated(document["setting"]) == _stated(was["setting"])
            and not stands_twice(content)
        )
    except Exception:  # what cannot be computed is not lawful
        return False


def _stated(setting: Any) -> Any:
    """A setting without what it leaves open: null, and no such key, are the same."""
    if isinstance(setting, dict):
        return {key: _stated(value) for key, value in setting.items() if value is not None}
    return [_stated(value) for value in setting] if isinstance(setting, list) else setting


def try_policy(honest: Honest, t: Try) -> None:
    """A policy that was changed, for a good run."""
    file = t.folder / "policy.yaml"
    shutil.copyfile(honest.policy, file)
    shutil.copyfile(honest.policy.with_name("leaks.jsonl"), t.folder / "leaks.jsonl")
    content = change_file(t, file if t.chance.random() < 0.8 else t.folder / "leaks.jsonl")
    more = t.chance.choice(((), ("--dry-run",), ("--junit", "j.xml", "--summary", "s.md")))
    outcome = t.run("gate", honest.run, "--policy", file.name, "--out", "gate.json", *more, verdicts=(1, 3))
    if outcome.code in (0, 1, 3) and content is not None and stands_twice_in_yaml(file.read_bytes()):
        t.blame("wrongly accepted", "gate: a key stands twice")


def try_config(honest: Honest, t: Try) -> None:
    """A configuration that was changed."""
    file = t.folder / "config.yaml"
    shutil.copyfile(honest.config, file)
    content = change_file(t, file)
    outcome = t.run("audit", "--config", file.name, "--dry-run", "--json")
    if outcome.code == 0 and content is not None and stands_twice_in_yaml(content):
        t.blame("wrongly accepted", "audit --config: a key stands twice")


def try_log(honest: Honest, t: Try) -> None:
    """A guard's log that was changed: every generation counts, or the log is refused."""
    file = t.folder / "guard.jsonl"
    shutil.copyfile(honest.log, file)
    content = change_file(t, file)
    outcome = t.run("calibrate", honest.model, "--from-log", file.name, "--steps", 2, "--fpr", 0.5, "--json")
    if outcome.code != 0 or content is None:
        return
    scores = json.loads(outcome.out)["magnitude"]["scores"]
    if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
        t.blame("wrongly accepted", "calibrate --from-log: a score is no number")
    if len(scores) < sum(1 for line in content.split(b"\n") if line.strip()) - 1:  # a last line may have been cut off
        t.blame("lost rows", f"calibrate --from-log: {len(scores)} scores")
    if any(stands_twice(line) for line in content.split(b"\n")):
        t.blame("wrongly accepted", "calibrate --from-log: a key stands twice")


# Pictures -----------------------------------------------------------------------------------------------------------------


def try_pictures(honest: Honest, t: Try) -> None:
    """Pictures with altered bytes beside a good one: each is a row, or skipped with a reason."""
    folder = t.folder / "pictures"
    folder.mkdir()
    shutil.copyfile(honest.pictures / "p1.png", folder / "good.png")
    for i in range(3):
        ending = t.chance.choice(sorted(honest.encoded))
        content, what = _altered_picture(t.chance, honest.encoded, ending)
        t.say(f"{ending}: {what}")
        named = t.chance.choice((ending, ending, ending, "png", "jpg"))
        file = folder / f"altered{i}.{named}"
        file.write_bytes(content)
        if t.chance.random() < 0.05:
            t.say(change_place(t.chance, file))
    files = sum(1 for p in folder.iterdir() if p.suffix != ".bmp" and (p.is_symlink() or not p.is_dir()))
    if t.chance.random() < 0.2:
        t.run("index", "query", honest.index, "pictures", "--workers", 1, "--json")
        return
    outcome = t.run("index", "build", "pictures", "--out", "i", "--workers", 1, "--json")
    if outcome.code != 0:
        return
    held = json.loads(outcome.out)
    if held["pictures"] + sum(held["skipped"].values()) < files:
        t.blame("lost rows", f"index build: {held['pictures']} pictures and {held['skipped']} of {files} files")


def _altered_picture(chance: random.Random, encoded: dict[str, bytes], ending: str) -> tuple[bytes, str]:
    way = chance.random()
    if way < 0.1:
        wide, high = (chance.choice((0, 1, 9400, 50_000, 2**31 - 1, 2**31, 2**32 - 1)) for _ in range(2))
        return _png(wide, high, chance.choice((1, 8, 16)), b"\0" * 1000), f"{wide} × {high} pixels by its header"
    if way < 0.15:
        return _png(64, 64, 8, b"\0" * 12480, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))), "80 MB of text"
    if way < 0.2:
        kind = chance.choice((b"iCCP", b"eXIf", b"acTL", b"iTXt", b"gAMA", b"tRNS"))
        return _png(64, 64, 8, b"\0" * 12480, (kind, chance.randbytes(40))), f"a broken chunk {kind.decode()}"
    return change_bytes(chance, encoded[ending])


def _png(wide: int, high: int, depth: int, pixels: bytes, *more: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", wide, high, depth, 0 if depth == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks
    )


# Models -------------------------------------------------------------------------------------------------------------------


def try_model(honest: Honest, t: Try) -> None:
    """A model folder with one altered file."""
    folder = t.folder / "model"
    shutil.copytree(honest.model, folder)
    change_file(t, choose_file(t, folder, r"(config|index)\.json$"))
    outcome = t.run("check", "model", PROMPT, "--seeds", 1, "--steps", 2, "--json")
    _judge_scores(t, outcome.code, outcome.out)


def try_lora(honest: Honest, t: Try) -> None:
    """A LoRA with an altered header."""
    file = t.folder / "lora.safetensors"
    shutil.copyfile(honest.lora, file)
    change_file(t, file)
    outcome = t.run("check", honest.model, PROMPT, "--seeds", 1, "--steps", 2, "--lora", file.name, "--json")
    _judge_scores(t, outcome.code, outcome.out)


def _judge_scores(t: Try, code: int | None, out: str) -> None:
    if code == 0:
        scores = json.loads(out)["scores"]
        if not all(isinstance(s, float) and math.isfinite(s) for s in scores):
            t.blame("wrongly accepted", f"check: scores {scores}")


# Measured pictures --------------------------------------------------------------------------------------------------------


def try_measures(honest: Honest, t: Try) -> None:
    """Records of measured pictures."""
    folder = t.folder / "measure"
    shutil.copytree(honest.measure, folder)
    file = choose_file(t, folder, "json$")
    content = change_file(t, file)
    form = t.chance.choice(("json", "markdown", "html"))
    outcome = t.run("report", "measure", "--format", form, "--out", "made")
    if outcome.code != 0:
        return
    if content is not None and file.suffix == ".json" and file.parent.name != "companions" and stands_twice(content):
        t.blame("wrongly accepted", "report: a key stands twice")  # companions are opened by `measure` alone


KINDS = (
    Kind("packets", 900, lambda h: (h.packet, h.noted), try_packet),
    Kind("run folders", 700, lambda h: (h.run, h.policy), try_run),
    Kind("indexes", 700, lambda h: (h.index, h.nearest), try_index),
    Kind("thresholds", 350, lambda h: h.thresholds, try_thresholds),
    Kind("policies", 500, lambda h: (h.run, h.policy), try_policy),
    Kind("configurations", 350, lambda h: h.config, try_config),
    Kind("guard logs", 200, lambda h: h.log, try_log),
    Kind("pictures", 600, lambda h: (h.index, h.encoded), try_pictures),
    Kind("models", 300, lambda h: h.model, try_model),
    Kind("LoRA", 150, lambda h: h.lora, try_lora),
    Kind("measured pictures", 400, lambda h: h.measure, try_measures),
)
