"""Lists of prompts and captions: odd ones that are right, of which nothing may be lost, and broken ones."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .documents import change_file
from .honest import Honest
from .tries import Kind, Try

HEADS = ("prompt", "caption", "text")
ODD_TEXTS = (
    "a cat", 'a "quoted" cat', "a, b and c", "it's", "a\tb", "  spaces  ", "=1+1", "-1", "007", "nan", "null", "true", "#hash",
    "a;b", "a|b", "two\nlines", "ünïcödé", "猫", "🐈", "a\u2028b", "a\u00a0b", "\ufefffirst", "'", '"', "\\", "{}", "a" * 3000,
    "prompt", "text", "1.5",
)  # fmt: skip


def try_prompts(honest: Honest, t: Try) -> None:
    """A list of prompts: odd but honest, of which none may be lost; or broken."""
    texts = t.chance.sample(ODD_TEXTS, t.chance.randrange(2, 12))
    form = t.chance.choice(("txt", "csv", "tsv", "jsonl", "json", "parquet"))
    file = t.folder / f"prompts.{form}"
    right = WRITERS[form](t.chance, texts, file, t.say)
    if t.chance.random() < 0.5:
        t.say(form)
        change_file(t, file)
        right = None
    if t.chance.random() < 0.1:
        t.run("audit", honest.model, "--prompts", file.name, "--dry-run")
        return
    outcome = t.call(f"read {file.name}", lambda: _print_prompts(file))
    if outcome.code == 0 and right is not None:
        read = {_bare(text) for text in json.loads(outcome.out)["texts"]}
        if lost := [text for text in right if _bare(text) not in read]:
            t.blame(
                "lost rows",
                f"{form} ({'; '.join(t.words)}): {len(lost)} of {len(right)} prompts, the first {lost[0][:40]!r}",
            )


def _bare(text: str) -> str:
    return " ".join(text.replace("\ufeff", "").split())


def _print_prompts(file: Path) -> None:
    """What a command that reads prompts does first."""
    from mnemoscope.audit.prompts import read_prompts
    from mnemoscope.errors import MnemoscopeError

    try:
        prompts = read_prompts(file)
    except MnemoscopeError as error:
        text = " ".join(str(error).split("\n"))
        print(f"mnemoscope: {text}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(json.dumps({"texts": [prompt.text for prompt in prompts]}))


Say = Callable[[str], None]


def _write_txt(chance: random.Random, texts: list[str], file: Path, say: Say) -> list[str]:
    texts = [text for text in texts if len(text.splitlines()) == 1]
    end = chance.choice(("\n", "\r\n"))
    file.write_bytes((end.join(texts) + chance.choice(("", end))).encode(chance.choice(("utf-8", "utf-8-sig"))))
    return texts


def _write_table(chance: random.Random, texts: list[str], file: Path, say: Say) -> list[str]:
    kept, head = io.StringIO(newline=""), chance.choice((*HEADS, "Prompt", None))
    table = csv.writer(
        kept, delimiter="\t" if file.suffix == ".tsv" else ",", lineterminator=chance.choice(("\n", "\r\n"))
    )
    more = chance.choice(([], ["id"], ["label"], ["group", "x"]))
    say(f"header {head}, more columns {more}")
    if head is None:
        texts = [text for text in texts if text not in HEADS]  # which would be one
    else:
        table.writerow([head, *more])
    for i, text in enumerate(texts):
        values = {
            "id": chance.choice((str(i), f"i{i}", f"nan{i}")),
            "label": chance.choice(("1", "0", "maybe", "")),
            "group": "g",
            "x": "",
        }
        table.writerow([text, *(values[name] for name in more)])
    file.write_bytes(kept.getvalue().encode(chance.choice(("utf-8", "utf-8-sig"))))
    return texts


def _write_jsonl(chance: random.Random, texts: list[str], file: Path, say: Say) -> list[str]:
    ascii_only = chance.random() < 0.5
    items: list[Any] = [
        text if chance.random() < 0.1 else {"prompt": text, "id": chance.choice((i, str(i)))}
        for i, text in enumerate(texts)
    ]
    lines = [json.dumps(item, ensure_ascii=ascii_only) for item in items]
    text = "[" + ",\n".join(lines) + "]" if file.suffix == ".json" else "\n".join(lines) + "\n"
    file.write_bytes(text.encode())
    return texts


def _write_parquet(chance: random.Random, texts: list[str], file: Path, say: Say) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(texts)
    odd = {
        "nested": pa.array([{"a": [1]}] * n), "bytes": pa.array([b"\xff"] * n), "nothing": pa.nulls(n),
        "late": pa.array([10**15] * n, pa.timestamp("ms")), "late_ns": pa.array([2**62] * n, pa.timestamp("ns")),
        "decimal": pa.array([None] * n, pa.decimal128(38, 2)), "length": pa.array([2**62] * n, pa.duration("s")),
        "half": pa.array([None] * n, pa.float16()), "zone": pa.array([0] * n, pa.timestamp("us", tz="Nowhere/Land")),
        "day": pa.array([10**8] * n, pa.date32()),
    }  # fmt: skip
    name = chance.choice(sorted(odd))
    kind = chance.choice(
        (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.string())
    )
    column = (
        pa.array(texts, pa.string()).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(texts).dictionary_encode()
    )
    columns = {"prompt": column, name: odd[name]}
    if chance.random() < 0.3:
        columns["id"] = pa.array([float(i) if i else None for i in range(n)])
    say(f"prompts as {kind}, a column {name}{', ids with a gap' if 'id' in columns else ''}")
    pq.write_table(pa.table(columns), file)
    return texts


WRITERS: dict[str, Callable[[random.Random, list[str], Path, Say], list[str] | None]] = {
    "txt": _write_txt, "csv": _write_table, "tsv": _write_table, "jsonl": _write_jsonl, "json": _write_jsonl, "parquet": _write_parquet,
}  # fmt: skip


def try_captions(honest: Honest, t: Try) -> None:
    """The captions of a training set."""
    folder = t.folder / "data"
    shutil.copytree(honest.pictures, folder)
    pictures = len(list(folder.glob("*.png")))
    content = change_file(t, folder / "metadata.jsonl")
    outcome = t.run("train", honest.model, "data", "--lora", 2, "--steps", 1, "--dry-run", "--json")
    if outcome.code != 0 or content is None:
        return
    plan = json.loads(outcome.out)
    if plan["pictures"] + len({p["id"] for p in plan["problems"]}) < pictures:
        t.blame(
            "lost rows",
            f"train: {plan['pictures']} pictures and {len(plan['problems'])} reasons for {pictures} pictures",
        )


KINDS = (
    Kind("prompt lists", 700, lambda h: h.model, try_prompts),
    Kind("captions", 100, lambda h: (h.model, h.pictures), try_captions),
)
