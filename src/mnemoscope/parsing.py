"""The one reader of JSON, of JSON lines, and of YAML. Nothing else of mnemoscope, and no torch.

Documents come from people one does not know. What the common parsers let pass is refused here, with the place where it stands:

* a key that is written twice, of which they keep the last without a word;
* NaN, infinities, and numbers beyond 64 bits, which other programs read otherwise or not at all;
* half a character (a lone surrogate), which no file can hold;
* more nesting or more bytes than a document of its kind has, before anything is built from it;
* in YAML, aliases, merge keys and tags: 330 bytes of aliases stand for a billion values.

A message never quotes a value: a document may hold a secret.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, runtime_checkable

if TYPE_CHECKING:
    import yaml

__all__ = [
    "DEEPEST",
    "LONGEST_LINE",
    "ParseError",
    "json_lines",
    "lines_of",
    "parse_json",
    "parse_yaml",
    "through_json",
]

DEEPEST = 64
"""How deep the parts of a document may lie in each other."""

LONGEST_LINE = 16 << 20
"""Bytes of the longest line of a file of JSON lines."""

LARGEST_YAML = 1 << 20
"""Bytes of the largest YAML document: it is written by hand."""

LONGEST_NUMBER = 20
"""Digits of an integer that are looked at: no one of 64 bits has more."""

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_TOKEN = re.compile(_STRING.pattern + r"|[\[\]{},\n]", re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class ParseError(ValueError):
    """A text is no document of its kind; the message says why, and on which line."""


@runtime_checkable
class LineFile(Protocol):
    """An open file of bytes, or one in memory."""

    def readline(self, size: int = -1, /) -> bytes:
        """The next line with its line feed, or as many of its bytes."""
        ...


# JSON ---------------------------------------------------------------------------------------------------------------------


def parse_json(data: bytes | str, *, lenient: bool = False) -> Any:
    """The plain value of a JSON document.

    Args:
        data: UTF-8, with or without a byte-order mark.
        lenient: Whether NaN, infinities, larger integers and half characters may stand in it: in documents of other programs, whose
            reader judges them.

    Raises:
        ParseError: it is no JSON, or holds what the head of this module names.
    """
    text = _decoded(data)
    _require_shallow(text)
    try:
        value = (_LENIENT if lenient else _STRICT).decode(text)
    except _WrittenTwice as e:
        raise ParseError(_written_twice(e.key, *_lines_of_key(text, e.key))) from None
    except json.JSONDecodeError as e:
        where = f"line {e.lineno}" if "\n" in text.rstrip() else "it"
        raise ParseError(f"{where} is not JSON: {e.msg}, column {e.colno}") from None
    except RecursionError:
        raise ParseError(f"its parts lie more than {DEEPEST} deep in each other") from None
    if not lenient and "\\u" in text and _SURROGATE.search(text):
        _require_whole_characters(value)
    return value


def lines_of(file: LineFile) -> Iterator[bytes]:
    """The lines of a file with their line feeds, one in memory at a time. One of more than :data:`LONGEST_LINE` bytes comes in pieces,
    the first of which is longer than that by one byte.
    """
    while line := file.readline(LONGEST_LINE + 1):
        yield line


def json_lines(file: LineFile) -> Iterator[tuple[int, Any]]:
    """The values of a file of JSON lines, with the numbers of their lines, one in memory at a time; empty lines are none.

    Lines end with a line feed and nothing else: a prompt may hold U+2028.

    Raises:
        ParseError: a line is too long, or no JSON; the message names it.
    """
    for number, raw in enumerate(lines_of(file), 1):
        if len(raw) > LONGEST_LINE:
            raise ParseError(f"line {number} has more than {LONGEST_LINE:,} bytes")
        if raw.strip():
            try:
                yield number, parse_json(raw)
            except ParseError as e:
                raise ParseError(f"line {number} cannot be read ({e})") from None


def through_json(value: Any) -> Any:
    """A plain value as it comes back from a file: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


def _decoded(data: bytes | str) -> str:
    if isinstance(data, str):
        return data.removeprefix("\ufeff")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ParseError(f"line {line} is no UTF-8; save it in that encoding") from None


def _require_shallow(text: str) -> None:
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > DEEPEST:
            raise ParseError(f"its parts lie more than {DEEPEST} deep in each other")


class _WrittenTwice(Exception):
    def __init__(self, key: str):
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _WrittenTwice(key)
            seen.add(key)
    return content


def _lines_of_key(text: str, key: str) -> tuple[int, int]:
    """The lines on which an object of a sound JSON text has a key for the second time, and for the first."""
    objects: list[dict[str, int] | None] = []  # the keys of each object that is open, with their lines; None: a list
    line, expects_key = 1, False
    for token in _TOKEN.finditer(text):
        part = token[0]
        if part == "\n":
            line += 1
        elif part in "[{":
            objects.append({} if part == "{" else None)
            expects_key = part == "{"
        elif part in "]}":
            objects.pop()
            expects_key = False
        elif part == ",":
            expects_key = bool(objects) and objects[-1] is not None
        elif expects_key:
            keys, expects_key = objects[-1], False
            if keys is not None and (name := json.loads(part, strict=False)) == key:
                if key in keys:
                    return keys[key], line
                keys[name] = line
    return line, line


def _written_twice(key: str, first: int, second: int) -> str:
    where = f"lines {first} and {second}" if first != second else f"line {first}"
    return f"{_quoted(key)} is written twice ({where})"


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER or not _fits(value := int(digits)):
        raise ParseError("an integer has more than 64 bits")
    return value


def _long_integer(digits: str) -> int:
    if len(digits) > 1000:
        raise ParseError("an integer has more than 1,000 digits")
    return int(digits)


def _fits(value: int) -> bool:
    return -(1 << 63) <= value < (1 << 64)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ParseError("a number is larger than any that is computed with")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ParseError(f"it holds {name}, which is no number of JSON")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite, parse_constant=_refuse_constant
)
_LENIENT = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_long_integer)


def _require_whole_characters(value: Any) -> None:
    try:
        for part in _parts(value):
            if isinstance(part, str):
                part.encode()
    except UnicodeEncodeError:
        raise ParseError("a text holds half a character (a lone surrogate)") from None


def _parts(value: Any) -> Iterator[Any]:
    """A plain value and everything in it, keys included."""
    parts = [value]
    while parts:
        part = parts.pop()
        yield part
        if isinstance(part, list):
            parts.extend(part)
        elif isinstance(part, dict):
            parts.extend(part)
            parts.extend(part.values())


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[\w.-]{1,60}", key) else repr(key if len(key) <= 60 else key[:59] + "…")


# YAML ---------------------------------------------------------------------------------------------------------------------


def parse_yaml(data: bytes | str) -> Any:
    """The plain value of a YAML document: texts, numbers, switches, nulls, lists, and mappings whose keys are texts.

    Dates stay texts, as nothing here is one. An empty document is None.

    Raises:
        ParseError: it is no YAML, or holds what the head of this module names.
    """
    import yaml

    text = _decoded(data)
    if len(text) > LARGEST_YAML:
        raise ParseError(f"it has {len(text):,} characters, and the limit is {LARGEST_YAML:,}")
    try:
        _require_plain_events(text)
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _value(loader, node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1} is not YAML: " if mark else "it is not YAML: "
        raise ParseError(where + (e.problem or e.context or "it cannot be read")) from None
    except yaml.YAMLError as e:
        raise ParseError(f"it is not YAML: {str(e).splitlines()[0]}") from None
    except UnicodeEncodeError:
        raise ParseError("a text holds half a character (a lone surrogate)") from None
    except RecursionError:
        raise ParseError(f"its parts lie more than {DEEPEST} deep in each other") from None


def _loader() -> type[yaml.SafeLoader]:
    """The parser that is written in C where there is one: it is ten times faster, and reads the same."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _require_plain_events(text: str) -> None:
    """Walk through the parts of a YAML text before anything is built from them."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_loader()):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ParseError(f"line {line} repeats another part by an alias (*name); write it out")
        if getattr(event, "tag", None) is not None:
            raise ParseError(f"line {line} has a tag (!name); write a plain value, in quotes if it is text")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ParseError(f"line {line}: its parts lie more than {DEEPEST} deep in each other")


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    import yaml

    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, part) for part in node.value]
    return _scalar(loader, node)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ParseError(f"line {line} has a key that is no name")
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise ParseError(f"line {line} merges another part (<<); write it out")
        key = str(_scalar(loader, key_node))
        if key in lines:
            raise ParseError(_written_twice(key, lines[key], line))
        lines[key] = line
        content[key] = _value(loader, value_node)
    return content


def _scalar(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    line = node.start_mark.line + 1
    if node.tag == "tag:yaml.org,2002:timestamp":
        return node.value
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > 2 * LONGEST_NUMBER:
        raise ParseError(f"line {line} has an integer of more than 64 bits")
    try:
        value = loader.construct_object(node)
    except ValueError:
        raise ParseError(f"line {line} has a value that is no number; put it in quotes if it is text") from None
    if isinstance(value, int) and not _fits(value):
        raise ParseError(f"line {line} has an integer of more than 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ParseError(f"line {line} has {value}, which is no number to compute with")
    return value
