"""Ways to alter a document. Each takes a source of chance and the original, and gives the altered one with the words that say how."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

DEEP = 3000
LONG = 200_000

NUMBERS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-1", "0", "-0.0", "1", "2", "0.5", "1.5", "1e-320", "9007199254740993",
    "9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "10000000000", "0.1e1", "1E400", "3.0000000001",
)  # fmt: skip
NO_NUMBERS = ("01", "0x10", "1_000", "+1", ".5", "nan", ".nan", ".inf", "1:30", "0o17", "2020-01-01", "~", "yes", "- 1")
TEXTS = (
    "", " ", "\x00", "\x1b[31m\x07", "\u202egnp.exe", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "file:///etc/passwd",
    "https://example.org/x", "<script>alert(1)</script>", "{{7*7}}", "${x}", "%s%n", "=1+1", "nan", "null", "true", "-1", "\ufeff",
    "a\nb\r\nc", "mnemoscope: done", "C:\\con", "💥" * 50, "\u0301" * 200, "x" * LONG,
)  # fmt: skip
YAML_ONLY = (
    "!!python/object/apply:os.system [id]", "!!python/name:os.system", "&a [*a]", "*nobody", "!!binary x", "!!float nan", ".nan",
    "!!set {a}", "!!timestamp 2020-01-01", "!<tag:x> y", "<<: {a: b}", "? [a]\n: b", "|\n  x", "@x", "%x", "`x`",
)  # fmt: skip


class Pairs(list[tuple[str, Any]]):
    """An object of JSON as it stands: its keys in order, also those that stand twice."""


@dataclass(frozen=True)
class Raw:
    """Text that is written as it is where a value belongs."""

    text: str


def parse(text: str | bytes) -> Any:
    """JSON with its objects as Pairs."""
    return json.loads(text, object_pairs_hook=Pairs)


def written(value: Any) -> str:
    """JSON, and what is not quite JSON."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {written(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def equal_documents(one: bytes, other: bytes) -> bool:
    """Whether two JSON documents hold the same, whatever their spaces; no document with a key that stands twice equals another."""
    try:
        return bool(_plain(parse(one)) == _plain(parse(other)))
    except (ValueError, RecursionError):
        return one == other


def _plain(value: Any) -> Any:
    if isinstance(value, Pairs):
        names = [k for k, _ in value]
        if len(set(names)) < len(names):
            raise ValueError("a key stands twice")
        return {k: _plain(v) for k, v in value}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return (type(value) is bool, value)


# Values -------------------------------------------------------------------------------------------------------------------


def change_value(chance: random.Random, tree: Any) -> tuple[Any, str]:
    """Alter one value somewhere inside a parsed document, which is changed itself."""
    places = list(_places(tree, ()))
    if not places:
        return Raw(chance.choice(NUMBERS)), "the whole document is a number"
    holder, key, way = chance.choice(places)
    name, change = chance.choice(VALUE_CHANGES)
    change(chance, holder, key)
    return tree, f"{name} at {'.'.join(map(str, way))}"


def _places(value: Any, way: tuple[Any, ...]) -> Iterator[tuple[Any, int, tuple[Any, ...]]]:
    items = list(value) if isinstance(value, list) else []
    for i, item in enumerate(items):
        name, inner = item if isinstance(value, Pairs) else (i, item)
        yield value, i, (*way, name)
        yield from _places(inner, (*way, name))


def _put(holder: Any, i: int, value: Any) -> None:
    holder[i] = (holder[i][0], value) if isinstance(holder, Pairs) else value


def _get(holder: Any, i: int) -> Any:
    return holder[i][1] if isinstance(holder, Pairs) else holder[i]


def _delete(chance: random.Random, holder: Any, i: int) -> None:
    del holder[i]


def _repeat(chance: random.Random, holder: Any, i: int) -> None:
    holder.insert(chance.randrange(len(holder) + 1), holder[i])


def _number(chance: random.Random, holder: Any, i: int) -> None:
    _put(holder, i, Raw(chance.choice(NUMBERS)))


def _nudge(chance: random.Random, holder: Any, i: int) -> None:
    value = _get(holder, i)
    if isinstance(value, bool):
        _put(holder, i, not value)
    elif isinstance(value, int):
        _put(holder, i, value + chance.choice((-1, 1, 7)))
    elif isinstance(value, float):
        _put(holder, i, value * chance.choice((0.5, 0.99, 1.01, -1.0)) + 1e-3)
    elif isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        _put(holder, i, value[:at] + chance.choice("ax0/.\u00e9") + value[at + 1 :])
    else:
        _put(holder, i, None)


def _no_number(chance: random.Random, holder: Any, i: int) -> None:
    _put(holder, i, Raw(chance.choice(NO_NUMBERS)))


def _text(chance: random.Random, holder: Any, i: int) -> None:
    _put(holder, i, chance.choice(TEXTS))


def _surrogate(chance: random.Random, holder: Any, i: int) -> None:
    _put(holder, i, Raw('"\\ud800x"'))


def _type(chance: random.Random, holder: Any, i: int) -> None:
    value = _get(holder, i)
    others: list[Any] = [
        None, True, False, 0, "x", [], Pairs(), [[]], Pairs([("a", 1)]), str(value)[:50], [value], Pairs([("x", value)]),
    ]  # fmt: skip
    _put(holder, i, chance.choice(others))


def _deep(chance: random.Random, holder: Any, i: int) -> None:
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
    _put(holder, i, Raw(opening * DEEP + ("1" if closing == "}" else "") + closing * DEEP))


def _many(chance: random.Random, holder: Any, i: int) -> None:
    _put(holder, i, Raw("[" + "0," * LONG + "0]"))


def _swap(chance: random.Random, holder: Any, i: int) -> None:
    j = chance.randrange(len(holder))
    one, other = _get(holder, i), _get(holder, j)
    _put(holder, i, other)
    _put(holder, j, one)


def _rename(chance: random.Random, holder: Any, i: int) -> None:
    if isinstance(holder, Pairs):
        holder[i] = (
            chance.choice([*TEXTS[:-1], holder[i][0].upper(), holder[i][0] + " ", *(k for k, _ in holder)]),
            holder[i][1],
        )
    else:
        holder[i] = None


def _add(chance: random.Random, holder: Any, i: int) -> None:
    value: Any = chance.choice((1, "x", None, [], Raw("NaN")))
    if isinstance(holder, Pairs):
        holder.insert(i, (chance.choice(("x", "__class__", "model_config", "token", "class", "")), value))
    else:
        holder.insert(i, value)


Change = Callable[[random.Random, Any, int], None]
VALUE_CHANGES: tuple[tuple[str, Change], ...] = (
    ("left out", _delete), ("there twice", _repeat), ("another number", _number), ("another number", _number),
    ("a little different", _nudge), ("a little different", _nudge), ("no number", _no_number), ("another text", _text),
    ("half a character", _surrogate), ("another type", _type), ("another type", _type), ("very deep", _deep),
    ("very many", _many), ("exchanged", _swap), ("another name", _rename), ("one more", _add),
)  # fmt: skip


# Bytes --------------------------------------------------------------------------------------------------------------------


def change_bytes(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """Alter bytes without looking at what they mean."""
    name, change = chance.choice(BYTE_CHANGES)
    return change(chance, content), name


def _flip(chance: random.Random, content: bytes) -> bytes:
    altered = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 1, 4, 32))):
        altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
    return bytes(altered)


def _overwrite(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content) + 1)
    value = chance.choice(
        (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(64), chance.randbytes(16))
    )
    return content[:at] + value + content[at + len(value) :]


def _cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _cut_out(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + content[at + chance.choice((1, 2, 16, 200)) :]


def _insert(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content) + 1)
    value = chance.choice(
        (
            b"\0",
            b"\n",
            b"\r",
            b'"',
            b"{",
            b"[",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\xed\xa0\x80",
            b"#",
            b"'",
            b",",
            b"\t",
            b"---\n",
            chance.randbytes(8),
        )
    )
    return content[:at] + value + content[at:]


def _repeat_part(chance: random.Random, content: bytes) -> bytes:
    start, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:end] * chance.choice((1, 1, 3)) + content[end:]


def _repeat_line(chance: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True) or [b"\n"]
    i, j = (chance.randrange(len(lines)) for _ in range(2))
    lines.insert(j, lines[i])
    return b"".join(lines)


def _lose_line(chance: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True) or [b"\n"]
    del lines[chance.randrange(len(lines))]
    return b"".join(lines)


def _splice(chance: random.Random, content: bytes) -> bytes:
    one, other = (chance.randrange(len(content) + 1) for _ in range(2))
    return content[:one] + content[other:]


def _recode(chance: random.Random, content: bytes) -> bytes:
    text = content.decode("utf-8", errors="replace")
    return text.encode(chance.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7", "utf-16-le")), errors="replace")


def _empty(chance: random.Random, content: bytes) -> bytes:
    return chance.choice((b"", b"\n", b" ", b"\0" * 1000, b"null", b"[]", b"{}", b"0", b'"x"', b"\xef\xbb\xbf"))


BYTE_CHANGES: tuple[tuple[str, Callable[[random.Random, bytes], bytes]], ...] = (
    ("bits turned", _flip), ("bits turned", _flip), ("bytes written over", _overwrite), ("cut off", _cut),
    ("a part cut out", _cut_out), ("bytes put in", _insert), ("a part repeated", _repeat_part),
    ("a line repeated", _repeat_line), ("a line lost", _lose_line), ("two parts joined", _splice), ("another encoding", _recode),
    ("nothing in it", _empty),
)  # fmt: skip


# Documents ----------------------------------------------------------------------------------------------------------------


def change_json(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """Alter a value of a JSON document, or its bytes."""
    if chance.random() < 0.25:
        return change_bytes(chance, content)
    tree, what = change_value(chance, parse(content))
    return written(tree).encode("utf-8", errors="surrogatepass"), what


def change_lines(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """The same for JSON lines."""
    if chance.random() < 0.35:
        return change_bytes(chance, content)
    lines = content.splitlines()
    i = chance.randrange(len(lines))
    tree, what = change_value(chance, parse(lines[i]))
    lines[i] = written(tree).encode("utf-8", errors="surrogatepass")
    return b"\n".join(lines) + b"\n", f"line {i + 1}: {what}"


def change_yaml(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """Alter a YAML document: its values (written as JSON, which is YAML as well), its lines, or its bytes."""
    import yaml

    way = chance.random()
    if way < 0.35:
        return change_bytes(chance, content)
    tree = _of_yaml(yaml.safe_load(content))
    if way < 0.5:
        places = list(_places(tree, ()))
        holder, i, path = chance.choice(places)
        _put(holder, i, Raw(chance.choice(YAML_ONLY)))
        return written(tree).encode(), f"YAML's own at {'.'.join(map(str, path))}"
    tree, what = change_value(chance, tree)
    return written(tree).encode("utf-8", errors="surrogatepass"), what


def _of_yaml(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs((str(k), _of_yaml(v)) for k, v in value.items())
    if isinstance(value, list):
        return [_of_yaml(v) for v in value]
    return Raw(value.isoformat()) if isinstance(value, date) else value


def change_safetensors(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """Alter the header of a safetensors file, its length, a number in it, or its bytes."""
    way = chance.random()
    size = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + size], content[8 + size :]
    if way < 0.15:
        return change_bytes(chance, content)
    if way < 0.25:
        length = chance.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, len(content)))
        return length.to_bytes(8, "little") + content[8:], f"a header of {length} bytes"
    if way < 0.4:
        at = chance.randrange(len(tensors) // 4) * 4
        value = chance.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"))
        return content[: 8 + size] + tensors[:at] + value + tensors[at + 4 :], "a weight is NaN, infinite or very large"
    tree, what = change_value(chance, parse(header))
    altered = written(tree).encode("utf-8", errors="surrogatepass")
    return len(altered).to_bytes(8, "little") + altered + tensors, f"header: {what}"


def stands_twice(content: bytes) -> bool:
    """Whether a key of a JSON document stands twice in an object."""
    try:
        _plain(parse(content))
    except (RecursionError, UnicodeDecodeError):
        return False
    except ValueError as error:
        return "stands twice" in str(error)
    return False


def stands_twice_in_yaml(content: bytes) -> bool:
    """The same of a YAML document."""
    import yaml

    def walk(node: yaml.Node | None) -> bool:
        if isinstance(node, yaml.MappingNode):
            names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            return len(set(names)) < len(names) or any(walk(value) for _, value in node.value)
        return isinstance(node, yaml.SequenceNode) and any(map(walk, node.value))

    try:
        return walk(yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError):
        return False


# Places -------------------------------------------------------------------------------------------------------------------


def change_place(chance: random.Random, path: Path) -> str:
    """Put something else where a file or folder is."""
    name, change = chance.choice(PLACE_CHANGES)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    change(path)
    return name


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(6 << 30)


PLACE_CHANGES: tuple[tuple[str, Callable[[Path], object]], ...] = (
    ("it is missing", lambda path: None),
    ("it is a folder", lambda path: path.mkdir()),
    ("it is a pipe", lambda path: os.mkfifo(path)),
    ("it is a link to itself", lambda path: path.symlink_to(path.name)),
    ("it is a link to nothing", lambda path: path.symlink_to("nothing-here")),
    ("it is a link to a device", lambda path: path.symlink_to("/dev/zero")),
    ("it is a link that leads out", lambda path: path.symlink_to("/etc/passwd")),
    ("it has 6 GB of zeros", _sparse),
)  # fmt: skip
