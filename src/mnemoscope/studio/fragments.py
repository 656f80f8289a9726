"""Parts of the page as HTML. Whatever comes from a visitor, a model or a reference set is escaped on its way in."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence, Sized
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..explain.edits import Edit, Suggestion
from ..report.words import percent, printable, reference
from .model import Studio
from .session import LARGEST, LONGEST, Link, Session, State
from .wording import copies, pull, scale, verdict

__all__ = [
    "alert",
    "exported",
    "history",
    "intro",
    "offers",
    "pictures",
    "progress",
    "reopen",
    "result",
    "said",
    "words",
]


@cache
def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("mnemoscope.studio"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    env.filters |= {"percent": percent, "uri": _uri, "reference": reference}
    return env


def _uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{b64encode(webp).decode()}"


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(f"{name}.html.jinja").render(values)


def intro(studio: Studio) -> str:
    """What this page is for, what model it asks, and prompts to begin with."""
    c = studio.calibration
    return _render(
        "intro",
        model=studio.target.name,
        seeds=len(studio.explainer.seeds),
        ordinary=None if c is None else len(c.record.scores),
        fpr=None if c is None else c.record.fpr,
        compared=studio.reference is not None,
        pictures=len(studio.reference) if isinstance(studio.reference, Sized) else None,
        examples=studio.examples,
    )


def result(studio: Studio, session: Session) -> str:
    """The score of what is shown, in words and on a line; empty: nothing is shown."""
    now, first = session.current, session.first
    if now is None:
        return ""
    c = studio.calibration
    model = studio.config.model or studio.target.name
    return _render(
        "result",
        prompt=now.prompt,
        verdict=verdict(now.look, c, model),
        first=first,
        now=now,
        scale=None if c is None else scale(now.look, first.look if first else None, c),
    )


def words(session: Session, opened: int | None = None, found: Sequence[Edit] = (), limit: float | None = None) -> str:
    """The words of what is shown as buttons; with ``opened`` the place of one and ``found``, what may be done with it."""
    now = session.current
    if now is None:
        return ""
    shares = pull(now.look)
    most = max((share for _, share in shares), default=0.0) or 1.0
    word = None if opened is None else now.look.words[opened].text
    return _render(
        "words", words=shares, most=most, opened=opened, word=word, found=found, limit=limit, longest=LONGEST
    )


def offers(suggested: Suggestion | None, found: Sequence[Edit]) -> str:
    """Suggested edits; empty: nobody asked."""
    if suggested is None:
        return ""
    return _render("offers", suggested=suggested, found=found)


def pictures(studio: Studio, session: Session, *, where: bool) -> str:
    """Pictures of what is shown, beside those of the prompt it was edited from; with ``where``, maps of the pull."""
    now, first = session.current, session.first
    columns: list[tuple[str, State]] = []
    if first is not None and first.drawn is not None:
        columns.append(("As typed", first))
    if now is not None and now.drawn is not None:
        columns.append(("After the edit" if first else "As typed", now))
    if not columns:
        return ""
    seeds = range(len(columns[0][1].drawn.shots))
    told = [(title, copies(state.drawn)) for title, state in columns]
    return _render("pictures", columns=columns, seeds=seeds, told=told, where=where)


def history(studio: Studio, session: Session) -> str:
    """The looks so far, and a link to what is shown; empty: none."""
    if session.current is None:
        return ""
    link = Link.of(session, studio.settings).query
    return _render("history", states=session.states, at=session.at, link=link)


def progress(what: str, done: int, asked: int) -> str:
    """A bar, and the same in figures."""
    return _render("progress", what=what, done=done, asked=asked)


def reopen() -> str:
    """Where the file of a session is chosen."""
    return _render("reopen", largest=LARGEST)


def exported(folder: str, key: str, samples: int) -> str:
    """Where a session lies now, and what reads it."""
    return _render("exported", folder=folder, key=key, samples=samples)


def said(text: str) -> str:
    """A line of talk."""
    return _render("said", text=text, alert=False)


def alert(text: str) -> str:
    """An error sentence, which screen readers say at once."""
    return _render("said", text=text, alert=True)
