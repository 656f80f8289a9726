"""Prompt sets in: TXT, JSONL, JSON, CSV, TSV, Parquet, or a Python list.

A prompt is taken as it stands: no trimming, no repair. What cannot be read for certain is an error that names the line; nothing
is dropped without being counted.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from ..bounds import shown
from ..errors import UsageError
from ..parsing import ParseError, parse_json
from ..records.files import read_regular

__all__ = ["Columns", "Prompt", "PromptSet", "read_prompts"]

LARGEST = 1 << 30
"""Bytes that a list of text may have: it is held in memory, several times as large."""

COLUMNS = ("prompt", "caption", "text")
"""Names under which the prompt column is found when none is given, whatever their case."""

MEANINGS = ("id", "group", "label", "family", "swap")
"""What else a column may hold, found under the same names."""

HEADINGS = frozenset({*COLUMNS, *MEANINGS, "file_name", "image", "url"})
"""Names of columns by which the first line of a table is known to be its header."""

TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")

UNKNOWN = ("", "nan", "none", "null")
"""What stands in the place of a label that nobody knows, as tables write it."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: Its id in the source, or a hash of the text.
        text: The text, as it stands in the source.
        group: Its group in the source (for instance ``planted`` or ``ordinary``).
        label: Known ground truth: True where the prompt is known to be memorized; None: unknown.
        family: Its family in the source: prompts of one picture, brand or layout.
        swap: Another caption of its picture, with which the picture was not shown in training (:mod:`~mnemoscope.audit.variants`).
        control: The control that it was made for from another prompt; None: it stands in the source.
        origin: For a control: the id of the prompt that it was made from.
    """

    id: str
    text: str
    group: str | None = None
    label: bool | None = None
    family: str | None = None
    swap: str | None = None
    control: str | None = None
    origin: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says about its prompt, besides the text: fields of :class:`~mnemoscope.records.schema.Row`."""
        named = ("group", "label", "family", "control", "origin")
        return {"prompt_id": self.id} | {name: getattr(self, name) for name in named}


@dataclass(frozen=True)
class PromptSet:
    """Different prompts, and what happened on the way in.

    Attributes:
        prompts: The prompts, each text once, in the order of the source.
        source: Where they come from, in words.
        notes: What was left out and why, with counts.
        taken: What was taken for what: the columns that were read, and whether the first line is a header.
    """

    prompts: tuple[Prompt, ...]
    source: str
    notes: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


@dataclass(frozen=True)
class Columns:
    """Which column (or key) holds what; None: found by its usual name, if it is there."""

    prompt: str | None = None
    id: str | None = None
    group: str | None = None
    label: str | None = None
    family: str | None = None
    swap: str | None = None


def read_prompts(
    source: str | Path | Sequence[Any], columns: Columns = Columns(), *, limit: int | None = None
) -> PromptSet:
    """Read a prompt set.

    Args:
        source: A file (``.txt``: one prompt per line; ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``), or a sequence of
            strings, mappings or :class:`Prompt` objects.
        columns: Which columns to read. The prompt is looked for under ``prompt``, ``caption`` and ``text`` when not named.
        limit: Keep the first so many different prompts.

    Returns:
        Different prompts: a text that occurs again is counted and left out. An empty prompt is a prompt, except in TXT, where
        blank lines are counted and left out.

    Raises:
        UsageError: no such file, a format or encoding that is not certain, a damaged line, a missing column, an id that two
            prompts share, or no prompt at all. The message names the place and the cure.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        name = str(path)
        table, notes = _read(path, columns)
    else:
        items = [(f"item {i} of the list", item) for i, item in enumerate(source, 1)]
        table, notes, name = _table(items), [], f"a list of {len(source)}"
    roles, taken, unread = _roles(table, columns, name)
    notes += unread
    prompts, more = _once(list(_prompts(table, roles)), name)
    if not prompts:
        raise UsageError(f"{name} holds no prompt; write one per line, or name a file that has some.")
    if limit is not None and limit < len(prompts):
        more.append(f"limit: the first {limit} of {len(prompts)} prompts")
        prompts = prompts[:limit]
    return PromptSet(tuple(prompts), name, tuple(notes + more), tuple(taken))


# A table: rows as mappings, each with the words that say where it is --------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Columns and rows of a source of prompts.

    Attributes:
        columns: Names of all columns.
        rows: Where each row stands, and its values.
        header: Whether the first line of the file has the names; None: in such a file no line has.
    """

    columns: list[str]
    rows: list[tuple[str, Mapping[str, Any]]]
    header: bool | None = None


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """The rows of any file that prompts could be read from, whatever their columns mean.

    Raises:
        UsageError: as for :func:`read_prompts`.
    """
    return [row for _, row in _read(path, None)[0].rows]


def _read(path: Path, columns: Columns | None) -> tuple[_Table, list[str]]:
    """The table in a file; without ``columns``, all that can be read of it."""
    reader = READERS.get(path.suffix.lower())
    if not os.path.isfile(path):
        beside = _names_in(path.parent)
        near = difflib.get_close_matches(path.name, beside, n=1)
        kind = "is a folder" if os.path.isdir(path) else "is no file" if os.path.exists(path) else "does not exist"
        raise UsageError(
            f"prompt file {path} {kind}"
            + (f"; did you mean {path.parent / near[0]}?" if near else "; name a file of prompts.")
        )
    if reader is None:
        raise UsageError(
            f"prompt file {path}: {path.suffix or 'no'} extension is not one of {', '.join(READERS)}; rename or convert it."
        )
    try:
        return reader(path, columns)
    except OSError as e:
        raise UsageError(
            f"prompt file {path} cannot be read ({e.strerror or e}); correct its path, or split a list that is too large."
        ) from e


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _text(path: Path) -> str:
    """The text of a file. UTF-8, or what its byte-order mark says; nothing is guessed."""
    data = read_regular(path, LARGEST)
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UsageError(
            f"{path} is not {encoding.upper()}: byte {e.start} (0x{data[e.start]:02x}, line {line}) does not decode; save it as UTF-8, "
            f"for instance with `iconv -f latin1 -t utf-8`."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageError(
            f"{path} has a NUL byte in line {line}: it is UTF-16 without a byte-order mark, or no text; save it as UTF-8."
        )
    return text


# UTF-32 first: its little-endian mark begins with the one of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _lines(text: str) -> list[tuple[int, str]]:
    # Not str.splitlines, which also breaks at characters that may stand inside a prompt (U+2028, form feed).
    return list(enumerate(re.split(r"\r\n|\n|\r", text), 1))


def _read_txt(path: Path, columns: Columns | None) -> tuple[_Table, list[str]]:
    lines = _lines(_text(path))
    if lines[-1][1] == "":  # what follows the last line break is not a line
        lines.pop()
    table = _table([(f"line {i} of {path}", line) for i, line in lines if line.strip()])
    return table, _blank(len(lines) - len(table.rows))


def _read_jsonl(path: Path, columns: Columns | None) -> tuple[_Table, list[str]]:
    places = ((f"line {i} of {path}", line) for i, line in _lines(_text(path)) if line.strip())
    return _table([(where, _json(line, where)) for where, line in places]), []


def _read_json(path: Path, columns: Columns | None) -> tuple[_Table, list[str]]:
    text = _text(path)
    content = _json(text, str(path)) if text.strip() else []
    if isinstance(content, dict) and len(lists := [v for v in content.values() if isinstance(v, list)]) == 1:
        content = lists[0]
    if not isinstance(content, list):
        raise UsageError(
            f"{path} holds {_kind(content)}; write a list of prompts, or a list of objects with a prompt key."
        )
    return _table([(f"item {i} of {path}", item) for i, item in enumerate(content, 1)]), []


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text, lenient=True)
    except ParseError as e:
        raise UsageError(f"{where}: {e}; correct it, or use .txt for one plain prompt per line.") from None


def _read_csv(path: Path, columns: Columns | None) -> tuple[_Table, list[str]]:
    text = _text(path)
    if not text.strip():
        return _Table([], []), []
    lines: list[tuple[int, list[str]]] = []
    line, blank = 1, 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
        for cells in reader:
            line = reader.line_num
            if not cells:  # a blank line; an empty prompt in a single column is written ""
                blank += 1
            else:
                lines.append((line, cells))
                _require_fields(lines, path)
    except csv.Error as e:
        raise UsageError(
            f"{path} is not CSV after line {line} ({e}); double the quotes inside a quoted prompt and close them."
        ) from None
    if not lines:
        return _Table([], []), _blank(blank)
    header = _is_header(lines[0][1], columns)
    names, rows = (lines[0][1], lines[1:]) if header else ([COLUMNS[0]], lines)
    if repeated := [n for n, k in Counter(names).items() if k > 1]:
        raise UsageError(f"{path} has two columns named {repeated[0]!r}; rename one.")
    return _Table(
        names, [(f"line {number} of {path}", dict(zip(names, cells, strict=True))) for number, cells in rows], header
    ), _blank(blank)


def _require_fields(lines: list[tuple[int, list[str]]], path: Path) -> None:
    """Refuse a line that has not as many fields as the first."""
    (_, first), (line, cells) = lines[0], lines[-1]
    if len(cells) != len(first):
        raise UsageError(
            f"line {line} of {path} has {_count(len(cells), 'field')} and the header has {len(first)}; put quotes around "
            f"prompts that contain the delimiter, or use .txt for one plain prompt per line."
        )


def _is_header(cells: list[str], columns: Columns | None) -> bool:
    """Whether the first line of a table names its columns.

    It is known by a usual name, or by one that was asked for. A single column without one holds prompts from the first line on; of
    several columns nobody could tell which holds the prompts, so there the first line has to be a header.
    """
    asked = set() if columns is None else {name for name in vars(columns).values() if name is not None}
    return len(cells) > 1 or bool(asked) or cells[0].strip().lower() in HEADINGS


def _delimiter(path: Path, text: str) -> str:
    """The one of comma, semicolon, tab and bar that splits the header into most columns."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = next(line for _, line in _lines(text) if line.strip())
    return max(",;\t|", key=lambda d: len(next(csv.reader([header], delimiter=d), [])))


def _read_parquet(path: Path, columns: Columns | None) -> tuple[_Table, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            # Pictures beside the captions stay where they are.
            plain = [field.name for field in file.schema_arrow if _is_plain(field.type)]
            table = _Table(plain, [])
            if repeated := [n for n, k in Counter(plain).items() if k > 1]:
                raise UsageError(f"{path} has two columns named {repeated[0]!r}; rename one.")
            named = None if columns is None else set(_named(table, columns, str(path)).values())
            kept, notes = {}, []
            for name in plain:
                if named is not None and name not in named:
                    continue
                try:
                    kept[name] = file.read(columns=[name]).column(0).to_pylist()
                except Exception as e:  # whatever a column holds that has no counterpart in Python
                    why = f"column {name!r} of {path} cannot be read ({' '.join(str(e).split())[:160]})"
                    if named is not None:
                        raise UsageError(f"{why}; write it again as text, or name another column.") from e
                    notes.append(f"{why}, and is left out")
            count = file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UsageError(f"{path} is not a Parquet file that can be read ({e}).") from e
    rows: list[tuple[str, Mapping[str, Any]]] = [
        (f"row {i + 1} of {path}", {name: values[i] for name, values in kept.items()}) for i in range(count)
    ]
    return _Table(plain, rows), notes


def _is_plain(kind: Any) -> bool:
    """Whether a column of a Parquet file holds single values that may be texts, numbers or switches."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        return _is_plain(kind.value_type)
    held_apart = (kinds.is_nested, kinds.is_binary, kinds.is_large_binary, kinds.is_fixed_size_binary)
    return not any(is_kind(kind) for is_kind in held_apart)


READERS: dict[str, Callable[[Path, Columns | None], tuple[_Table, list[str]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _table(items: list[tuple[str, Any]]) -> _Table:
    """A table from mappings, prompts and bare texts; a bare text is a row whose only column is ``prompt``."""
    rows = [(where, _row(item)) for where, item in items]
    return _Table(list(dict.fromkeys(str(k) for _, row in rows for k in row)), rows)


def _row(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Prompt):
        own = {"prompt": item.text, "id": item.id, "group": item.group, "label": item.label}
        return own | {"family": item.family, "swap": item.swap}
    return item if isinstance(item, Mapping) else {"prompt": item}


# From a table to prompts --------------------------------------------------------------------------------------------------


def _named(table: _Table, columns: Columns, name: str) -> dict[str, str]:
    """Which column holds what: the meanings that the table has, and the names of their columns."""
    prompt = _column(table, columns.prompt, COLUMNS, name) or _only_column(table, name)
    others = {meaning: _column(table, getattr(columns, meaning), (meaning,), name) for meaning in MEANINGS}
    return {"prompt": prompt} | {meaning: column for meaning, column in others.items() if column is not None}


def _roles(table: _Table, columns: Columns, name: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Which column holds what, the same in words, and what is not read as what its name says.

    Raises:
        UsageError: a column is missing, or most labels can be read and one cannot.
    """
    if not table.rows:
        return {}, [], []
    roles, notes = _named(table, columns, name), []
    if columns.label is None and "label" in roles and (odd := _odd_label(table, roles["label"])) is not None:
        column = roles.pop("label")
        notes.append(f"column {column!r} of {name} holds {odd!r} and the like, no yes or no, and is not read as labels")
    return roles, _in_words(table, roles, name), notes


def _odd_label(table: _Table, column: str) -> Any:
    """A value of a column that is called *label* and holds something else; None: it holds labels.

    Raises:
        UsageError: most of its values are labels and one is not: to leave any of them out would change what is counted.
    """
    values = [(where, row.get(column)) for where, row in table.rows]
    odd = [(where, value) for where, value in values if _truth(value) is NotImplemented]
    sound = sum(isinstance(_truth(value), bool) for _, value in values)
    if not odd:
        return None
    where, value = odd[0]
    if len(odd) >= sound:
        return value
    raise UsageError(
        f"{where}: label {shown(value)} is not one of {', '.join(TRUE + FALSE)}; correct it, leave it empty where nobody knows, or "
        f"rename column {column!r} if it holds no labels."
    )


def _in_words(table: _Table, roles: Mapping[str, str], name: str) -> list[str]:
    """What was taken for what."""
    if table.header is False:
        text = next(iter(table.rows[0][1].values()))
        return [
            f"{name}: the first line ({shown(text)}) is taken as a prompt, because it is called neither {', '.join(COLUMNS[:-1])} nor "
            f"{COLUMNS[-1]}; if it is a header, name it as the prompt's column (--column)"
        ]
    if table.columns == [COLUMNS[0]] and table.header is None:
        return []
    others = "".join(f", {column!r} as its {meaning}" for meaning, column in roles.items() if meaning != "prompt")
    first = "; the first line is read as a header" if table.header else ""
    return [f"{name}: column {roles['prompt']!r} is taken as the prompt{others}{first}"]


def _prompts(table: _Table, roles: Mapping[str, str]) -> Iterator[Prompt]:
    for where, row in table.rows:
        if roles["prompt"] not in row:
            raise UsageError(f"{where} has no {roles['prompt']!r}; every row needs a prompt.")
        facts = {meaning: row.get(column) for meaning, column in roles.items()}
        found = _prompt(facts["prompt"], facts.get("id"), facts.get("group"), facts.get("label"), where)
        swap = facts.get("swap")
        yield replace(found, family=_word(facts.get("family")), swap=None if is_missing(swap) else _sound(swap, where))


def _column(table: _Table, asked: str | None, usual: Iterable[str], name: str) -> str | None:
    if asked is not None:
        if asked not in table.columns:
            raise _no_column(f"no column {asked!r}", asked, table, name)
        return asked
    by_lower = {c.strip().lower(): c for c in reversed(table.columns)}
    return next((by_lower[u] for u in usual if u in by_lower), None)


def _only_column(table: _Table, name: str) -> str:
    if len(table.columns) == 1:
        return table.columns[0]
    raise _no_column("no column named prompt, caption or text", "prompt", table, name, headless=bool(table.header))


def _no_column(what: str, asked: str, table: _Table, name: str, *, headless: bool = False) -> UsageError:
    near = difflib.get_close_matches(asked.lower(), [c.lower() for c in table.columns], n=1, cutoff=0.5)
    hint = f" Did you mean {next(c for c in table.columns if c.lower() == near[0])!r}?" if near else ""
    listing = ", ".join(repr(c) for c in table.columns[:20])
    if headless and any(" " in column.strip() for column in table.columns):
        hint = " If its first line holds prompts already, write one with names above it, or use .txt for one plain prompt per line."
    return UsageError(f"{name} has {what}; name one of its columns: {listing}.{hint}")


def _truth(value: Any) -> Any:
    """True, False or None (unknown); NotImplemented for anything else."""
    if is_missing(value):
        return None
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    word = str(value).strip().lower().removesuffix(".0")  # a table with gaps turns 1 into 1.0
    if word in UNKNOWN:
        return None
    return True if word in TRUE else False if word in FALSE else NotImplemented


def _prompt(text: Any, id: Any, group: Any, label: Any, where: str) -> Prompt:
    text = _sound(text, where)
    truth = _truth(label)
    if truth is NotImplemented:
        raise UsageError(
            f"{where}: label {label!r} is not one of {', '.join(TRUE + FALSE)}; choose another label column."
        )
    return Prompt(_word(id) or hashlib.sha256(text.encode()).hexdigest()[:12], text, _word(group), truth)


def is_missing(value: Any) -> bool:
    """Whether a cell of a table holds nothing: null, NaN, or an empty text."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, Real) and value != value)
    )


def word_of(value: Any) -> str:
    """A value of a table as a name: 1.0, which is how a column of whole numbers with gaps stores 1, is ``1``."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _word(value: Any) -> str | None:
    return None if is_missing(value) else word_of(value)


def _sound(text: Any, where: str) -> str:
    """A text that can be encoded."""
    if not isinstance(text, str):
        raise UsageError(f"{where}: the prompt is {_kind(text)}, not text; correct it, or choose another column.")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(
            f"{where}: the prompt has half of a character (U+{ord(text[e.start]):04X}) at position {e.start}; correct it."
        ) from None
    return text


def _once(found: list[Prompt], name: str) -> tuple[list[Prompt], list[str]]:
    """Each text once. Ids must tell prompts apart, because reports do."""
    first: dict[str, Prompt] = {}
    ids: dict[str, str] = {}
    contradicting = 0
    for prompt in found:
        kept = first.setdefault(prompt.text, prompt)
        contradicting += (kept.group, kept.label) != (prompt.group, prompt.label)
        if kept is prompt and ids.setdefault(prompt.id, prompt.text) != prompt.text:
            raise UsageError(
                f"{name}: two prompts have the id {prompt.id!r}; make ids unique, or choose another id column."
            )
    repeated = len(found) - len(first)
    notes = [f"{_count(repeated, 'repeated prompt')} left out"] if repeated else []
    if contradicting:
        notes.append(
            f"{_count(contradicting, 'repeated prompt')} had another group or label than the first, which counts"
        )
    return list(first.values()), notes


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _blank(n: int) -> list[str]:
    return [f"{_count(n, 'blank line')} left out"] if n else []


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
