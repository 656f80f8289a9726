"""The page: Gradio's controls, and what each of them does. What is shown is made in :mod:`.fragments`, what is done in :mod:`.model`."""

from __future__ import annotations

import base64
import binascii
import functools
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import gradio as gr

from ..errors import MnemoscopeError, UsageError
from ..explain.edits import Edit
from ..explain.words import without
from . import fragments
from .model import Stopped, Studio, Tell
from .session import LARGEST, LONGEST, Link, Session, edited_from, read_session

__all__ = ["Page", "build"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Values: TypeAlias = list[Any]

QUEUE = 32
"""Requests that wait for the model; more are turned away."""

VISITORS = 64
"""Sessions that are remembered; of more, the one that was used longest ago is forgotten."""

STAY = 6 * 3600
"""Seconds that a session is remembered after it was used last."""

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

PARTS = (
    "session", "prompt", "status", "bar", "rest", "result", "words", "offers", "pictures", "history", "exported", "draw", "export", "stop",
)  # fmt: skip
"""What handlers may change, in the order of their answers."""

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
AT_ONCE: dict[str, Any] = {"queue": False}
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Page:
    """A page that is ready to be served.

    Attributes:
        blocks: Gradio's.
        theme: System fonts only.
        css: Ours.
        leave: Tells whatever is at work to stop.
    """

    blocks: gr.Blocks
    theme: gr.themes.Base
    css: str
    leave: Callable[[], None]


def build(studio: Studio, offer: Callable[[Path], str]) -> Page:
    """The page of a studio.

    Args:
        studio: What is asked.
        offer: Makes a run folder downloadable, and returns its key.
    """
    desk = Desk(studio, offer)
    with gr.Blocks(title="mnemoscope studio", analytics_enabled=False) as blocks:
        desk.lay_out()
        desk.connect(blocks)
    blocks.queue(max_size=QUEUE, api_open=False)
    blocks.state_session_capacity = VISITORS
    _keep_no_statistics(blocks)
    return Page(blocks, _theme(), _text("page.css"), desk.leaving.set)


class _Nothing(dict[str, Any]):
    """A dictionary that stays empty."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Forget it."""


def _keep_no_statistics(blocks: gr.Blocks) -> None:
    """Gradio counts events by visitor and function, for a page that is not there, and where that fails it keeps the event for ever."""
    blocks._queue.event_analytics = _Nothing()
    blocks._queue.compute_analytics_summary = lambda records: {}  # type: ignore[method-assign]


class Desk:
    """The controls of the page, and what they do. Each handler answers with one value for each of :data:`PARTS`."""

    def __init__(self, studio: Studio, offer: Callable[[Path], str]):
        self.studio, self.offer = studio, offer
        self.leaving = threading.Event()
        self.parts: dict[str, Any] = {}

    # What is there --------------------------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        """Place the controls, from above: ask, see the score, change words, draw, go back, take it along."""
        parts = self.parts
        parts["session"] = gr.State(Session(), time_to_live=STAY)
        self.intro = _html(fragments.intro(self.studio))
        with gr.Row(equal_height=True, elem_classes="ask"):
            parts["prompt"] = gr.Textbox(
                label="Prompt", placeholder="a red apple on a table", lines=1, max_lines=4, max_length=LONGEST, scale=5,
                autofocus=True, elem_id="prompt",
            )  # fmt: skip
            self.score = gr.Button("Score it", variant="primary", scale=1, min_width=120, elem_id="score")
        with gr.Column(elem_classes="notice"):  # stays in sight, wherever on the page one is
            parts["status"] = _html("", template='<div role="status" aria-live="polite">${value}</div>')
            with gr.Row(elem_classes="busy"):
                parts["bar"] = _html("", elem_id="bar")
                parts["stop"] = gr.Button(
                    "Cancel", variant="stop", visible=False, min_width=100, scale=0, elem_id="stop"
                )
        parts["result"] = _html("")
        with gr.Column(visible=False) as parts["rest"]:
            parts["words"] = _html("")
            with gr.Row(elem_classes="actions"):
                self.suggest = gr.Button(
                    "Suggest an edit", size="sm", scale=0, min_width=150, elem_id="suggest",
                    visible=self.studio.calibration is not None,
                )  # fmt: skip
                self.undo = gr.Button("Undo", size="sm", scale=0, min_width=100, elem_id="undo")
            parts["offers"] = _html("")
            n = len(self.studio.explainer.seeds)
            _html("<section><h2>What it draws</h2></section>")
            with gr.Row(elem_classes="actions"):
                label = f"Draw {n} picture{'s' if n > 1 else ''}"
                parts["draw"] = gr.Button(label, size="sm", variant="primary", scale=0, min_width=150, elem_id="draw")
                self.where = gr.Checkbox(
                    label="Show where in the picture the words pull", container=False, scale=1, elem_id="where"
                )
            parts["pictures"] = _html("")
            parts["history"] = _html("")
            _html("<section><h2>Keep it</h2></section>")
            with gr.Row(elem_classes="actions"):
                parts["export"] = gr.Button("Export this session", size="sm", scale=0, min_width=180, elem_id="export")
            parts["exported"] = _html("")
        self.reopen = _html(fragments.reopen())

    def connect(self, blocks: gr.Blocks) -> None:
        """Say which control does what."""
        p = self.parts
        changed = [p[name] for name in PARTS]
        model: dict[str, Any] = {"outputs": changed, **QUIETLY, **ONE_AT_A_TIME}
        model |= {"show_progress": "minimal", "show_progress_on": p["bar"]}  # which says who is before one in the queue
        quick: dict[str, Any] = {"outputs": changed, **QUIETLY, **AT_ONCE}
        blocks.load(self.arrive, [p["session"]], **model)
        for event in (self.score.click, p["prompt"].submit):
            event(self.typed, [p["session"], p["prompt"]], **model)
        for part in (self.intro, p["words"], p["offers"], self.reopen):
            part.act(self.act, [p["session"]], **model)
        p["history"].act(self.back, [p["session"], self.where], **quick)
        self.undo.click(self.undone, [p["session"], self.where], **quick)
        self.where.change(self.mapped, [p["session"], self.where], **quick)
        self.suggest.click(self.suggested, [p["session"]], **model)
        for button, work, inputs in ((p["draw"], self.drawn, [self.where]), (p["export"], self.written, [])):
            began = button.click(self.begin, [p["session"]], **quick)
            began.then(work, [p["session"], *inputs], **model).then(self.end, [p["session"]], **quick)
        p["stop"].click(self.stop, [p["session"]], **quick)

    # What is done ---------------------------------------------------------------------------------------------------------

    def arrive(self, session: Session, request: gr.Request) -> Values:
        """A visitor: what the address says is scored."""
        settings = self.studio.settings
        link = Link.parse(dict(request.query_params), settings)
        if link.prompt is None:
            return answer(session=session)
        return said(self._follow)(session, link)

    def _follow(self, session: Session, link: Link) -> Values:
        prompts = [p for p in (link.prompt, link.edited) if p is not None]
        origin = None
        for look, edit in zip(self.studio.look(prompts), ("as typed", "edited"), strict=False):
            origin = session.add(look, edit, origin).number
        other = link.differs(self.studio.settings)
        talk = (
            f"The link was made with other settings ({'; '.join(other)}), so its numbers were others." if other else ""
        )
        return self._shown(session, talk, where=False)

    def typed(self, session: Session, prompt: str | None) -> Values:
        """Score what was typed."""

        def work() -> Values:
            session.add(self.studio.look([prompt or ""])[0])
            return self._shown(session)

        return said(work)()

    def act(self, session: Session, event: gr.EventData) -> Values:
        """A button inside a fragment."""
        given = event._data if isinstance(event._data, dict) else {}
        does = {
            "example": self._example, "word": self._word, "close": self._close, "apply": self._apply, "write": self._write,
            "open": self._open, "large": self._large,
        }  # fmt: skip
        wanted = does.get(str(given.get("do")))
        return answer() if wanted is None else said(wanted)(session, given)

    def _example(self, session: Session, given: dict[str, Any]) -> Values:
        chosen = self.studio.examples[_index(given, len(self.studio.examples))]
        session.add(self.studio.look([chosen.prompt])[0])
        return self._shown(session)

    def _word(self, session: Session, given: dict[str, Any]) -> Values:
        now = session.current
        if now is None:
            return answer()
        index = _index(given, len(now.look.words))
        session.found = list(self.studio.changes(now.look, now.look.words[index]))
        opened = fragments.words(session, index, session.found, now.look.threshold)
        return answer(words=opened, offers="", status="")

    def _close(self, session: Session, given: dict[str, Any]) -> Values:
        session.found = []
        return answer(words=fragments.words(session), offers="")

    def _apply(self, session: Session, given: dict[str, Any]) -> Values:
        now, edit = session.current, session.found[_index(given, len(session.found))]
        return self._edited(session, edit.prompt, edit.words, None if now is None else now.number)

    def _write(self, session: Session, given: dict[str, Any]) -> Values:
        now = session.current
        if now is None:
            return answer()
        word = now.look.words[_index(given, len(now.look.words))]
        text = str(given.get("text") or "").strip()
        if not text:
            raise UsageError("no word was typed; write one, or drop the word instead.")
        prompt = without(now.look.prompt, [word], text)
        return self._edited(session, prompt, Edit("replace", word.text, text[:60], prompt, 0.0).words, now.number)

    def _edited(self, session: Session, prompt: str, edit: str, origin: int | None) -> Values:
        before = session.current
        now = session.add(self.studio.look([prompt])[0], edit, origin)
        change = "" if before is None else f": score {before.look.score:.2f} → {now.look.score:.2f}"
        return self._shown(session, f"{edit}{change}.")

    def _open(self, session: Session, given: dict[str, Any]) -> Values:
        try:
            data = base64.b64decode(str(given.get("data", "")), validate=True)
        except binascii.Error:
            raise UsageError("the file did not arrive whole; choose it once more.") from None
        prompts = read_session(str(given.get("name", "the file")), data)
        origins: list[int | None] = []
        for (_, edit), look, place in zip(
            prompts, self.studio.look([p for p, _ in prompts]), edited_from(prompts), strict=True
        ):
            origins.append(session.add(look, edit, None if place is None else origins[place]).number)
        n = len(prompts)
        return self._shown(session, f"{n} prompt{'s' if n > 1 else ''} read, and scored by this model.")

    def _large(self, session: Session, given: dict[str, Any]) -> Values:
        raise UsageError(
            f"{given.get('name')} has more than {LARGEST >> 20} MB; give the samples.jsonl of the run instead."
        )

    def suggested(self, session: Session) -> Values:
        """Look for the smallest edit that brings the score under the threshold."""

        def work() -> Values:
            now = session.current
            if now is None:
                return answer()
            found = self.studio.suggest(now.look)
            session.found = [*found.edits[-1:], *found.alternatives]
            return answer(words=fragments.words(session), offers=fragments.offers(found, session.found), status="")

        return said(work)()

    def back(self, session: Session, where: bool, event: gr.EventData) -> Values:
        """Show an earlier look."""
        given = event._data if isinstance(event._data, dict) else {}
        number = str(given.get("index"))
        session.show(int(number) if number.isdecimal() else 0)
        return self._shown(session, where=where)

    def undone(self, session: Session, where: bool) -> Values:
        """Forget the last change."""
        if len(session.states) < 2:
            return answer(status=fragments.said("There is nothing to undo."))
        session.undo()
        return self._shown(session, "Undone.", where=where)

    def mapped(self, session: Session, where: bool) -> Values:
        """Maps over the pictures, or no longer."""
        return answer(pictures=fragments.pictures(self.studio, session, where=where))

    def begin(self, session: Session) -> Values:
        """Long work is about to begin: it can be stopped from now on, also while it waits for its turn."""
        session.busy, session.stopped = True, False
        idle = gr.update(interactive=False)
        return answer(stop=gr.update(visible=True), draw=idle, export=idle, status="")

    def end(self, session: Session) -> Values:
        """It has ended, however."""
        session.busy = False
        ready = gr.update(interactive=True)
        return answer(stop=gr.update(visible=False), draw=ready, export=ready, bar="")

    def stop(self, session: Session) -> Values:
        """The visitor has seen enough; a click that comes too late changes nothing."""
        session.stopped = True
        return answer(status=fragments.said("Stopping …")) if session.busy else answer()

    def drawn(self, session: Session, where: bool) -> Iterator[Values]:
        """Draw what is shown, and the prompt that it was edited from, where they are not drawn yet."""
        states = [s for s in (session.first, session.current) if s is not None and s.drawn is None]

        def work() -> Iterator[Values]:
            for k, state in enumerate(states):
                what = "Drawing" if len(states) == 1 else f"Drawing, {k + 1} of {len(states)} prompts"
                draw = functools.partial(self.studio.draw, state.prompt)
                session.draw(state.number, (yield from _told(draw, session, what, self.leaving)))
            yield self._shown(session, "" if states else "These pictures are drawn already.", where=where)

        yield from _said(work)

    def written(self, session: Session) -> Iterator[Values]:
        """Write the session as a run folder."""

        def work() -> Iterator[Values]:
            write = functools.partial(self.studio.export, list(session.states))
            run = yield from _told(write, session, "Writing", self.leaving)
            part = fragments.exported(str(run.folder), self.offer(run.folder), run.manifest.asked)
            yield answer(exported=part)

        yield from _said(work)

    # What is seen afterwards ----------------------------------------------------------------------------------------------

    def _shown(self, session: Session, talk: str = "", *, where: bool = False) -> Values:
        now = session.current
        if now is None:
            return answer(session=session)
        return answer(
            session=session,
            prompt=now.prompt,
            status=fragments.said(talk),
            rest=gr.update(visible=True),
            result=fragments.result(self.studio, session),
            words=fragments.words(session),
            offers="",
            pictures=fragments.pictures(self.studio, session, where=where),
            history=fragments.history(self.studio, session),
        )


def answer(**changed: Any) -> Values:
    """One value for each part of the page: those that change, and nothing for the others."""
    return [changed.get(name, gr.skip()) for name in PARTS]


def said(work: Callable[..., Values]) -> Callable[..., Values]:
    """The same work, whose errors are sentences on the page, as they are on the command line."""

    @functools.wraps(work)
    def safely(*given: Any) -> Values:
        try:
            return work(*given)
        except Exception as e:
            return answer(status=fragments.alert(_sentence(e)))

    return safely


def _said(work: Callable[[], Iterator[Values]]) -> Iterator[Values]:
    """The same for work that tells how far it is."""
    try:
        yield from work()
    except Exception as e:
        yield answer(status=fragments.alert(_sentence(e)))


def _sentence(error: Exception) -> str:
    if isinstance(error, Stopped):
        return str(error) or "Stopped; nothing of it was kept."
    if isinstance(error, MnemoscopeError):
        return str(error)
    log.exception("the studio failed", exc_info=error)
    return (
        f"the studio failed ({type(error).__name__}); the terminal it runs in says more, and your session is as it was."
    )


def _told(
    work: Callable[[Tell], T], session: Session, what: str, leaving: threading.Event, every: float = 0.25
) -> Generator[Values, None, T]:
    """Do something long in a thread of its own, and show how far it is now and then; ends soon once the session is stopped, or all ends."""
    reached, shown, left = (0, 1), (-1, 1), False
    session.busy = True

    def tell(done: int, asked: int) -> None:
        nonlocal reached
        reached = (done, asked)
        if session.stopped or left or leaving.is_set():
            raise Stopped

    with ThreadPoolExecutor(1, "studio") as pool:
        future = pool.submit(work, tell)
        try:
            while not wait([future], every).done:
                if reached != shown:
                    shown = reached
                    yield answer(bar=fragments.progress(what, *shown))
        finally:
            left = True  # also where nobody asks any more, because the page was closed
            session.busy = False
        return future.result()


def _index(given: dict[str, Any], count: int) -> int:
    """The place that a button stands for, as a browser says it: anything may come."""
    text = str(given.get("index"))
    if not text.isdecimal() or len(text) > 6 or int(text) >= count:
        raise UsageError("what was chosen is not there any more; choose among what is shown.")
    return int(text)


def _html(value: str, *, template: str = "${value}", elem_id: str | None = None) -> gr.HTML:
    """A fragment whose buttons send their data as the event ``act``."""
    return gr.HTML(
        value,
        html_template=template,
        js_on_load=_text("page.js"),
        apply_default_css=False,
        elem_classes="m",
        elem_id=elem_id,
    )


@functools.cache
def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _theme() -> gr.themes.Base:
    blue, dark = "#0b5a94", "#2f7fbd"
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="sm", font=list(FONT), font_mono=list(MONO)
    ).set(
        body_background_fill="#ffffff", body_background_fill_dark="#14171a", block_background_fill_dark="#14171a",
        button_primary_background_fill=blue, button_primary_background_fill_hover="#094a7a", button_primary_text_color="#ffffff",
        button_primary_background_fill_dark=dark, button_primary_background_fill_hover_dark="#3d8ecd",
    )  # fmt: skip
