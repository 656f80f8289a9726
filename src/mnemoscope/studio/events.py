"""What the page sends to Gradio, judged before Gradio sees it: Gradio keeps it, groups by it, and quotes it where it cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, TypeAlias

import gradio as gr
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError
from ..parsing import ParseError, parse_json
from ..records.store import first_error

__all__ = ["Handler", "handlers_of", "is_session", "read_event"]

SESSION = r"^[A-Za-z0-9_-]{1,64}$"
"""Names that a browser may give to its visit; Gradio's page makes them of small letters and digits."""

MOST_VALUES = 32
"""Values of controls, or facts about an event, that come together."""

ACCEPTED: dict[type, tuple[type, ...]] = {gr.State: (NoneType,), gr.Textbox: (str, NoneType), gr.Checkbox: (bool,)}
"""What each control that a handler reads may send; what a visitor did so far stays here."""


Plain: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True)
class Handler:
    """What a handler of the page takes.

    Attributes:
        queued: Whether it waits for its turn, rather than being answered at once.
        inputs: Types that each of its values may have.
    """

    queued: bool
    inputs: tuple[tuple[type, ...], ...]


class Event(BaseModel):
    """One event. What else a browser says of it is left out."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    session_hash: Annotated[str, Field(pattern=SESSION)]
    fn_index: Annotated[int, Field(ge=0, lt=10_000)]
    data: Annotated[list[bool | str | None], Field(max_length=MOST_VALUES)]
    trigger_id: Annotated[int, Field(ge=0, lt=10_000)] | None = None
    event_data: Annotated[dict[str, Plain], Field(max_length=MOST_VALUES)] | Plain = None


def handlers_of(blocks: gr.Blocks) -> dict[int, Handler]:
    """What the handlers of a page take, by their number."""
    return {
        number: Handler(bool(function.queue), tuple(ACCEPTED[type(control)] for control in function.inputs))
        for number, function in blocks.fns.items()
    }


def is_session(name: str) -> bool:
    """Whether it can be the name of a visit."""
    return re.fullmatch(SESSION, name) is not None


def read_event(body: bytes, handlers: Mapping[int, Handler], *, queued: bool) -> bytes:
    """An event as JSON, with nothing in it but what the page sends.

    Args:
        body: As it came.
        handlers: What there is.
        queued: Whether it came where events wait for their turn.

    Raises:
        UsageError: it is no event of the page.
    """
    try:
        event = Event.model_validate(parse_json(body))
    except ParseError as e:
        raise UsageError(f"this is no event of the page ({e}); load the page again.") from None
    except ValidationError as e:
        raise UsageError(f"this is no event of the page ({first_error(e)[:200]}); load the page again.") from None
    handler = handlers.get(event.fn_index)
    if handler is None or handler.queued != queued:
        raise UsageError("this is no event of the page (fn_index: it names nothing); load the page again.")
    if not _fits(event.data, handler):
        raise UsageError("this is no event of the page (data: other values are needed); load the page again.")
    return event.model_dump_json().encode()


def _fits(values: list[Any], handler: Handler) -> bool:
    kinds = handler.inputs
    return len(values) == len(kinds) and all(isinstance(v, kind) for v, kind in zip(values, kinds, strict=True))
