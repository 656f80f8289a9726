"""Filtering, sorting and cutting into pages, so that a page shows a hundred lines of any number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

from ..errors import UnknownName, UsageError
from ..report.words import NO_GROUP
from .reading import Line, Snapshot
from .runs import Entry

__all__ = ["Page", "Pair", "Place", "Query", "compared", "groups", "list_runs", "listed", "place", "place_of_pair"]

SIZE = 100
"""Lines on a page."""

LONGEST_NAME = 1000
"""Characters of a group's name that can be asked for."""


T = TypeVar("T")


@dataclass(frozen=True)
class Query:
    """What a list is asked for, as it stands in the address.

    Attributes:
        by: ``prompt`` or ``sample``.
        q: Words that must occur, in any case, in the prompt, an id, or the reference's name.
        group: Only this group; empty: all.
        show: One of the names of :data:`SHOW` (or :data:`SHOW_PAIRS`).
        sort: One of the names of :data:`SORT` (or :data:`SORT_PAIRS`), with a minus to turn it around.
        page: From 1.
        fixed: What else stands in the address and stays there, such as the runs that are compared.
    """

    by: str = "prompt"
    q: str = ""
    group: str = ""
    show: str = "all"
    sort: str = "worst"
    page: int = 1
    fixed: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Query:
        """From the parameters of an address; others than these are not looked at.

        Raises:
            UnknownName: there is no such unit.
            UsageError: the page is no number.
        """
        found: dict[str, Any] = {k: given[k] for k in ("by", "q", "group", "show", "sort") if k in given}
        if found.get("by", "prompt") not in ("prompt", "sample"):
            raise UnknownName("unit", found["by"], ("prompt", "sample"))
        page = given.get("page", "1")
        if not (page.isascii() and page.isdigit() and 0 < len(page) < 10):
            raise UsageError(f"page = {page!r}: give a number from 1.")
        return cls(**found, page=max(1, int(page)))

    def href(self, **changes: Any) -> str:
        """The query part of the address with some values changed; what is at its default stays out."""
        asked, usual = replace(self, **changes), Query()
        free = [(k, v) for k, v in vars(asked).items() if k != "fixed" and v != getattr(usual, k)]
        return "?" + urlencode([*asked.fixed, *free], errors="replace")

    def at(self, *fixed: tuple[str, str]) -> Query:
        """The same query on another page of ours, with what that page needs in its address."""
        return replace(self, fixed=fixed)

    def sorted_by(self, name: str) -> str:
        """The value of ``sort`` that a click on a column's head asks for: a second click turns it around."""
        return f"-{name}" if self.sort == name else name


@dataclass(frozen=True)
class Page(Generic[T]):
    """A piece of a list.

    Attributes:
        lines: What is shown.
        number: Which page, from 1.
        pages: How many there are, at least 1.
        matching: How many lines match on all pages.
        all: How many there are without any filter.
    """

    lines: Sequence[T]
    number: int
    pages: int
    matching: int
    all: int

    @property
    def first(self) -> int:
        """Number of the first line, from 1."""
        return (self.number - 1) * SIZE + 1


def _cut(lines: Sequence[T], query: Query, all: int) -> Page[T]:
    pages = max(1, math.ceil(len(lines) / SIZE))
    number = min(query.page, pages)
    return Page(lines[(number - 1) * SIZE : number * SIZE], number, pages, len(lines), all)


def list_runs(entries: Sequence[Entry], query: Query) -> Page[Entry]:
    """The runs whose name, kind, status or model has the words of a query, in the order in which they are given."""
    words = query.q.casefold().split()
    chosen = [e for e in entries if _has(words, f"{e.name}\n{e.kind}\n{e.status}\n{e.model}")]
    return _cut(chosen, query, len(entries))


def _has(words: Sequence[str], text: str) -> bool:
    """Whether all words, in small letters, occur in a text, in any case."""
    folded = text.casefold()
    return all(word in folded for word in words)


# Lines of one run ---------------------------------------------------------------------------------------------------------

SHOW: dict[str, Callable[[Line], bool]] = {
    "all": lambda line: True,
    "copies": lambda line: line.copies > 0,
    "above": lambda line: line.above is True,
    "borderline": lambda line: line.borderline,
    "failed": lambda line: line.failed > 0,
    "not judged": lambda line: line.above is None,
}
"""Filters by what was found."""

SORT: dict[str, Callable[[Line], Any]] = {
    "worst": lambda line: (-line.copies, line.above is not True, _down(line.score)),
    "score": lambda line: _down(line.score),
    "copies": lambda line: (not line.compared, -line.copies),
    "nearest": lambda line: _down(line.similarity),
    "prompt": lambda line: line.prompt.casefold(),
    "group": lambda line: line.group or "",
    "seed": lambda line: line.seed or 0,
    "newest": lambda line: -line.order,
}
"""Orders; what has no value comes last, whichever way."""


def _down(value: float | int | None) -> tuple[bool, float | int]:
    """Large values first."""
    return value is None, 0 if value is None else -value


def listed(run: Snapshot, query: Query) -> Page[Line]:
    """The lines of a run that a query asks for.

    Raises:
        UnknownName: there is no such filter or order.
    """
    lines = run.prompts if query.by == "prompt" else run.samples
    return _cut(_chosen(lines, query), query, len(lines))


@dataclass(frozen=True)
class Place(Generic[T]):
    """Where a line stands in the list that it was opened from.

    Attributes:
        here: The line itself; None: the list does not show it.
        before: The line before it.
        after: The line after it.
        number: Its place, from 1.
        matching: How many lines the list has.
    """

    here: T | None
    before: T | None
    after: T | None
    number: int
    matching: int

    @property
    def page(self) -> int:
        """The page that it is on, from 1."""
        return (self.number - 1) // SIZE + 1


def _place(lines: Sequence[T], is_it: Callable[[T], bool]) -> Place[T]:
    at = next((i for i, line in enumerate(lines) if is_it(line)), None)
    if at is None:
        return Place(None, None, None, 1, len(lines))
    before, after = lines[at - 1] if at else None, lines[at + 1] if at + 1 < len(lines) else None
    return Place(lines[at], before, after, at + 1, len(lines))


def place(run: Snapshot, query: Query, id: str, prompt: tuple[str, str]) -> Place[Line]:
    """Where a sample stands, or its prompt (id and text) where the list has a line per prompt."""
    if query.by == "prompt":
        return _place(_chosen(run.prompts, query), lambda line: (line.prompt_id, line.prompt) == prompt)
    return _place(_chosen(run.samples, query), lambda line: line.id == id)


def groups(*runs: Snapshot) -> list[str]:
    """Names of the groups that can be asked for, in the order of the report; empty where no prompt has one."""
    names = dict.fromkeys(group.name for run in runs for group in run.summary.groups)
    return [name for name in names if len(name) <= LONGEST_NAME]


def _chosen(lines: Iterable[Line], query: Query) -> list[Line]:
    return _picked(lines, query, SHOW, SORT, lambda line: line)


def _picked(
    items: Iterable[T],
    query: Query,
    show: Mapping[str, Callable[[T], bool]],
    sort: Mapping[str, Callable[[T], Any]],
    line_of: Callable[[T], Line],
) -> list[T]:
    """What the query asks for, in its order; words and group are looked for in ``line_of`` an item."""
    keep = _named("filter", show, query.show)
    words = query.q.casefold().split()
    return _ordered([x for x in items if keep(x) and _fits(line_of(x), query.group, words)], query.sort, sort)


def _fits(line: Line, group: str, words: Sequence[str]) -> bool:
    if group and (line.group or NO_GROUP) != group:
        return False
    return not words or _has(words, f"{line.prompt}\n{line.prompt_id}\n{line.id}\n{line.reference or ''}")


def _named(kind: str, known: Mapping[str, T], name: str) -> T:
    if name not in known:
        raise UnknownName(kind, name, known)
    return known[name]


def _ordered(lines: list[T], sort: str, known: Mapping[str, Callable[[T], Any]]) -> list[T]:
    key = _named("order", known, sort.removeprefix("-"))
    if not sort.startswith("-"):
        return sorted(lines, key=key)
    # Turned around, but what has no value stays last.
    ordered = sorted(lines, key=key, reverse=True)
    return sorted(ordered, key=lambda line: _valueless(key(line)))


def _valueless(key: Any) -> bool:
    return isinstance(key, tuple) and len(key) == 2 and key[0] is True


# Two runs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt in two runs; None: this run does not have it."""

    a: Line | None
    b: Line | None

    @property
    def either(self) -> Line:
        """The line of the first run that has the prompt."""
        line = self.a or self.b
        assert line is not None
        return line

    @property
    def ids(self) -> tuple[str, str]:
        """The samples that the pair opens; empty where the run does not have the prompt."""
        return self.a.id if self.a else "", self.b.id if self.b else ""

    @property
    def changed(self) -> bool:
        """Whether the two runs call the prompt differently: a copy in one alone, or above threshold in one alone."""
        if self.a is None or self.b is None:
            return False
        copied = self.a.compared and self.b.compared and (self.a.copies > 0) != (self.b.copies > 0)
        judged = self.a.above is not None and self.b.above is not None and self.a.above != self.b.above
        return bool(copied or judged)


SHOW_PAIRS: dict[str, Callable[[Pair], bool]] = {
    "all": lambda pair: True,
    "changed": lambda pair: pair.changed,
    "both": lambda pair: pair.a is not None and pair.b is not None,
    "only the first": lambda pair: pair.b is None,
    "only the second": lambda pair: pair.a is None,
}
"""Filters of prompts in two runs."""

SORT_PAIRS: dict[str, Callable[[Pair], Any]] = {
    "worst": lambda pair: (
        not pair.changed,
        pair.a is None or pair.b is None,
        *min(SORT["worst"](line) for line in (pair.a, pair.b) if line),
    ),
    "prompt": lambda pair: SORT["prompt"](pair.either),
    "group": lambda pair: SORT["group"](pair.either),
    "first score": lambda pair: _down(pair.a.score if pair.a else None),
    "second score": lambda pair: _down(pair.b.score if pair.b else None),
    "first copies": lambda pair: _down(pair.a.copies if pair.a else None),
    "second copies": lambda pair: _down(pair.b.copies if pair.b else None),
}
"""Orders of prompts in two runs."""


def compared(a: Snapshot, b: Snapshot, query: Query) -> Page[Pair]:
    """Prompts of two runs side by side: those with the same id and text, then those with the same text.

    Raises:
        UnknownName: there is no such filter or order.
    """
    pairs = _pairs(a.prompts, b.prompts)
    return _cut(_chosen_pairs(pairs, query), query, len(pairs))


def place_of_pair(a: Snapshot, b: Snapshot, query: Query, ids: tuple[str, str]) -> Place[Pair]:
    """Where a pair stands that opens these two samples; an empty id stands for the run that does not have the prompt."""
    return _place(_chosen_pairs(_pairs(a.prompts, b.prompts), query), lambda pair: pair.ids == ids)


def _chosen_pairs(pairs: Iterable[Pair], query: Query) -> list[Pair]:
    return _picked(pairs, query, SHOW_PAIRS, SORT_PAIRS, lambda pair: pair.either)


def _pairs(first: Sequence[Line], second: Sequence[Line]) -> list[Pair]:
    exact = {(line.prompt_id, line.prompt): line for line in second}
    found = {id(a): exact.pop((a.prompt_id, a.prompt), None) for a in first}
    by_text: dict[str, Line] = {line.prompt: line for line in reversed(exact.values())}
    for a in first:
        if found[id(a)] is None:
            found[id(a)] = by_text.pop(a.prompt, None)
    taken = {id(b) for b in found.values() if b is not None}
    return [Pair(a, found[id(a)]) for a in first] + [Pair(None, b) for b in second if id(b) not in taken]
