"""Evidence that contradicts itself: what a forger changes in a run folder, or in an unpacked packet, before its sums are made anew."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Members = dict[str, bytes]
"""Files of a packet or a run folder by name."""

SUMS = "SHA256SUMS"
Forgery = Callable[[random.Random, Members], None]


def _rows(members: Members) -> list[dict[str, Any]]:
    return [json.loads(line) for line in members["samples.jsonl"].splitlines()]


def _put_rows(members: Members, rows: list[dict[str, Any]]) -> None:
    members["samples.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _row_change(change: Callable[[random.Random, dict[str, Any]], None]) -> Forgery:
    def forge(chance: random.Random, members: Members) -> None:
        rows = _rows(members)
        change(chance, chance.choice(rows))
        _put_rows(members, rows)

    return forge


def _document_change(name: str, change: Callable[[random.Random, dict[str, Any]], None]) -> Forgery:
    def forge(chance: random.Random, members: Members) -> None:
        document = json.loads(members[name])
        change(chance, document)
        members[name] = json.dumps(document, indent=2).encode()

    return forge


# Rows ---------------------------------------------------------------------------------------------------------------------


def _lose_rows(chance: random.Random, members: Members) -> None:
    rows = _rows(members)
    for _ in range(chance.choice((1, 1, 4))):
        del rows[chance.randrange(len(rows))]
    _put_rows(members, rows)


def _lose_seed(chance: random.Random, members: Members) -> None:
    rows = _rows(members)
    seed = chance.choice(rows)["seed"]
    _put_rows(members, [row for row in rows if row["seed"] != seed])


def _repeat_row(chance: random.Random, members: Members) -> None:
    rows = _rows(members)
    rows.append(chance.choice(rows))
    _put_rows(members, rows)


def _raise_score(chance: random.Random, row: dict[str, Any]) -> None:
    row["scores"]["magnitude"]["value"] *= chance.choice((0.5, 1.5, 10.0))


def _exceed_similarity(chance: random.Random, row: dict[str, Any]) -> None:
    row["nearest"]["similarity"] = chance.choice((1.5, -1.5, 7.0))
    row["nearest"]["copy_found"] = row["nearest"]["similarity"] > row["nearest"]["threshold"]


def _move_line(chance: random.Random, row: dict[str, Any]) -> None:
    near = row["nearest"]
    near["threshold"] = 0.999 if near["copy_found"] else near["similarity"] - 0.1
    near["copy_found"] = near["similarity"] > near["threshold"]


def _call_otherwise(chance: random.Random, row: dict[str, Any]) -> None:
    row["nearest"]["copy_found"] = not row["nearest"]["copy_found"]


def _change_seed(chance: random.Random, row: dict[str, Any]) -> None:
    row["seed"] += 5


def _change_prompt(chance: random.Random, row: dict[str, Any]) -> None:
    row["prompt"] += " x"


# Documents ----------------------------------------------------------------------------------------------------------------


def _raise_threshold(chance: random.Random, document: dict[str, Any]) -> None:
    document["threshold"] = chance.choice((1e9, 5.0, 0.0, -1.0))


def _exceed_rate(chance: random.Random, document: dict[str, Any]) -> None:
    document["fpr"] = chance.choice((1.5, 0.9, 0.0, -0.1))


def _other_setting(chance: random.Random, document: dict[str, Any]) -> None:
    document["setting"] = dict(document["setting"], steps=50)


def _other_target(chance: random.Random, document: dict[str, Any]) -> None:
    document["target"] = dict(
        document["target"], kind="unconditional", scheduler={"class": "PNDMScheduler"}, dtype="float16"
    )


def _other_config(chance: random.Random, document: dict[str, Any]) -> None:
    document["config"] = dict(document["config"], seeds=50, steps=99)


def _more_asked(chance: random.Random, document: dict[str, Any]) -> None:
    document["asked"] = chance.choice((document["asked"] + 1, document["asked"] - 1, 0, 1000))


# Packets ------------------------------------------------------------------------------------------------------------------


def _replace_report(chance: random.Random, members: Members) -> None:
    members["report.html"] = b"<html><title>No copies</title>No copy of a reference image was found.</html>"


def _edit_report(chance: random.Random, members: Members) -> None:
    members["report.html"] = re.sub(rb"copy of a reference", b"trace of a reference", members["report.html"])


def _replace_readme(chance: random.Random, members: Members) -> None:
    members["README.txt"] = b"Nothing was found. There is nothing to check.\n"


def _claim_other_version(chance: random.Random, document: dict[str, Any]) -> None:
    document["made_with"] = {**document["made_with"], "numpy": "0.0.1"}
    document["headline"] = "No copy of a reference image was found."


def _move_bounds(chance: random.Random, document: dict[str, Any]) -> None:
    document["made_with"] = {**document["made_with"], "mnemoscope": "0.0.1"}
    _walk_bounds(document)


def _walk_bounds(value: Any) -> None:
    if isinstance(value, dict):
        if isinstance(value.get("low"), float) and isinstance(value.get("high"), float):
            value["low"], value["high"] = value["low"] / 2, value["high"] / 2
        for inner in value.values():
            _walk_bounds(inner)
    elif isinstance(value, list):
        for inner in value:
            _walk_bounds(inner)


def _other_part_sums(chance: random.Random, document: dict[str, Any]) -> None:
    text = json.dumps(document["parts"])
    sums = sorted(set(re.findall(r"[0-9a-f]{64}", text)))
    document["parts"] = json.loads(text.replace(chance.choice(sums), "0" * 64))


def _pictures(members: Members) -> list[str]:
    return sorted(name for name in members if re.fullmatch(r"images/[0-9a-f]+\.webp", name))


def _swap_pictures(chance: random.Random, members: Members) -> None:
    one, other = chance.sample(_pictures(members), 2)
    members[one], members[other] = members[other], members[one]


def _break_picture(chance: random.Random, members: Members) -> None:
    members[chance.choice(_pictures(members))] = b"no picture"


def _blank_picture(chance: random.Random, members: Members) -> None:
    from PIL import Image

    kept = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(kept, "webp", lossless=True)
    members[chance.choice(_pictures(members))] = kept.getvalue()


def _lose_picture(chance: random.Random, members: Members) -> None:
    del members[chance.choice(_pictures(members))]


def _add_file(chance: random.Random, members: Members) -> None:
    name = chance.choice(
        (
            "gate.json",
            "notes.txt",
            "images/extra.webp",
            "measures/x.json",
            "run.JSON",
            "a/../b",
            "C:\\x",
            "con",
            "x\ny",
            ".hidden",
        )
    )
    members[name] = b"{}"


ROWS: tuple[tuple[str, Forgery], ...] = (
    ("rows are missing under status done", _lose_rows),
    ("a seed is missing under status done", _lose_seed),
    ("a row stands twice", _repeat_row),
    ("a score is not the mean of its steps", _row_change(_raise_score)),
    ("a similarity is none", _row_change(_exceed_similarity)),
    ("a row has a threshold of its own", _row_change(_move_line)),
    ("a copy is called against its similarity", _row_change(_call_otherwise)),
    ("a row has a seed that was not asked for", _row_change(_change_seed)),
    ("a row has another prompt", _row_change(_change_prompt)),
    ("the threshold does not follow from its scores", _document_change("thresholds.json", _raise_threshold)),
    ("the rate of false positives is another", _document_change("thresholds.json", _exceed_rate)),
    ("the threshold is of another setting", _document_change("thresholds.json", _other_setting)),
    ("target and setting disagree", _document_change("run.json", _other_target)),
    ("config and setting disagree", _document_change("run.json", _other_config)),
    ("the number of samples asked for is another", _document_change("run.json", _more_asked)),
)  # fmt: skip
"""In the records themselves; whatever is derived from them may be made anew."""

COUNTED = ROWS[:2]
"""What makes a run incomplete."""

JUDGED = (ROWS[9], ROWS[10])
"""What makes a threshold none."""

DERIVED: tuple[tuple[str, Forgery], ...] = (
    ("another report", _replace_report), ("a word of the report", _edit_report), ("another README", _replace_readme),
    ("another headline under another version", _document_change("packet.json", _claim_other_version)),
    ("other bounds under another version", _document_change("packet.json", _move_bounds)),
    ("sums of parts", _document_change("packet.json", _other_part_sums)), ("two pictures exchanged", _swap_pictures),
    ("a picture that is none", _break_picture), ("a white picture", _blank_picture), ("a picture is missing", _lose_picture),
    ("a file more", _add_file),
)  # fmt: skip
"""In what a packet holds besides."""


def signed_anew(members: Members) -> Members:
    """The same with sums that hold, as far as the forger knows."""
    others = {name: content for name, content in members.items() if name != SUMS}
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(others.items())]
    return {**others, SUMS: "".join(lines).encode("utf-8", errors="replace")}


def read_members(path: Path) -> Members:
    """Files of a packet."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def read_folder(folder: Path) -> Members:
    """Files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_folder(members: Members, folder: Path) -> None:
    """Write files into a folder."""
    for name, content in members.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def write_archive(members: Members, path: Path) -> None:
    """Write a packet."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(_info(name), content, zipfile.ZIP_DEFLATED)


def _info(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


# Archives -----------------------------------------------------------------------------------------------------------------


def change_archive(chance: random.Random, members: Members, path: Path) -> str:
    """Write a packet whose archive is odd, whatever is in it."""
    name, change = chance.choice(ARCHIVE_CHANGES)
    change(chance, dict(members), path)
    return name


def _add_entry(path: Path, info: zipfile.ZipInfo, content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> None:
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(info, content, kind)


def _twice(chance: random.Random, members: Members, path: Path) -> None:
    write_archive(members, path)
    name = chance.choice(sorted(members))
    _add_entry(path, _info(name), chance.choice((members[name], b"{}", members[name] + b"\n")))


def _symbolic_link(chance: random.Random, members: Members, path: Path) -> None:
    name = chance.choice([*sorted(members), "more"])
    members.pop(name, None)
    write_archive(members, path)
    info = _info(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    _add_entry(path, info, chance.choice((b"/etc/passwd", b"run.json", b"../x")))


def _odd_name(chance: random.Random, members: Members, path: Path) -> None:
    write_archive(members, path)
    name = chance.choice(
        (
            "../x",
            "/etc/x",
            "a\\b",
            "C:x",
            "run.json\0.txt",
            "RUN.json",
            "run.json ",
            "./run.json",
            "images//x",
            "x" * 5000,
            "\u202ex",
            "con.txt",
            "d/",
        )
    )
    _add_entry(path, _info(name), b"x")


def _surrounded(chance: random.Random, members: Members, path: Path) -> None:
    write_archive(members, path)
    more = chance.choice((b"#!/bin/sh\necho x\n", b"<html>", b"\0" * 100, b"%PDF-1.4\n"))
    content = path.read_bytes()
    path.write_bytes(more + content if chance.random() < 0.5 else content + more)


def _comment(chance: random.Random, members: Members, path: Path) -> None:
    write_archive(members, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = chance.choice((b"no copies were found", b"x" * 60000))


def _packed_otherwise(chance: random.Random, members: Members, path: Path) -> None:
    kind = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(_info(name), content, kind)


def _bomb(chance: random.Random, members: Members, path: Path) -> None:
    name = chance.choice([*sorted(members), "more"])
    members[name] = bytes(200 << 20)
    write_archive(members, path)


def _many(chance: random.Random, members: Members, path: Path) -> None:
    write_archive(members | {f"images/{i:05}.webp": b"" for i in range(5000)}, path)


def _other_order(chance: random.Random, members: Members, path: Path) -> None:
    names = sorted(members)
    chance.shuffle(names)
    write_archive({name: members[name] for name in names}, path)


ARCHIVE_CHANGES: tuple[tuple[str, Callable[[random.Random, Members, Path], None]], ...] = (
    ("an entry stands twice", _twice), ("an entry is a link", _symbolic_link), ("an entry has an odd name", _odd_name),
    ("bytes around the archive", _surrounded), ("a comment", _comment), ("packed otherwise", _packed_otherwise),
    ("very many entries", _many), ("another order", _other_order), ("a very large entry", _bomb),
)  # fmt: skip


def equal_packets(one: Path, other: Path) -> bool:
    """Whether two archives hold the same files and nothing else, however they are packed."""
    try:
        with zipfile.ZipFile(other) as archive:
            names = [info.filename for info in archive.infolist()]
            links = any(stat.S_ISLNK(info.external_attr >> 16) for info in archive.infolist())
            content = other.read_bytes()
            bare = content.startswith(b"PK\3\4") and content[-22:-18] == b"PK\5\6" and not links
            return bare and len(set(names)) == len(names) and read_members(one) == read_members(other)
    except Exception:  # what cannot be read again is not the same
        return False
