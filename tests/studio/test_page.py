"""The served page without a browser: what a visitor sees, whom it asks, who may come in, and hostile text that stays text."""

from __future__ import annotations

import asyncio
import base64
import re
import sys
import time
from html import unescape
from urllib.parse import parse_qsl

import pytest
import typer
from desk import KNOWN, ORDINARY, pictures_of, small_studio, small_world
from starlette.testclient import TestClient
from typer.testing import CliRunner

from mnemoscope.cli.studio import TOKEN, studio
from mnemoscope.errors import UsageError
from mnemoscope.web.access import HEADERS, Gate

gradio = pytest.importorskip("gradio", reason="gradio is not installed")

# ruff: noqa: E402 (the page cannot be imported without gradio)
from mnemoscope.studio import fragments, page
from mnemoscope.studio.model import Example
from mnemoscope.studio.page import Desk, answer
from mnemoscope.studio.server import LARGEST_REQUEST, METHODS, POLICY, Doors, Packets, create_app
from mnemoscope.studio.session import Session

LOOPBACK = "http://127.0.0.1:7348"
HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} \"onclick='alert(3)' </script><b>\u202e"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_studio(tmp_path_factory.mktemp("studio"), reference=pictures_of(small_world()))


@pytest.fixture(scope="module")
def served(small):
    headers = {**HEADERS, "Content-Security-Policy": POLICY}
    app = Gate(create_app(small), variable=TOKEN, methods=METHODS, headers=headers)
    with TestClient(app, base_url=LOOPBACK) as client:
        yield client


@pytest.fixture(scope="module")
def desk(small):
    """Handlers without a page; they hold nothing of a visitor."""
    return Desk(small, lambda folder: "key")


def event(**given: object) -> gradio.EventData:
    return gradio.EventData(None, given)


def part(values: list[object], name: str) -> str:
    """What a handler answers for one part of the page."""
    found = dict(zip(page.PARTS, values, strict=True))[name]
    assert isinstance(found, str), name
    return found


# The server ---------------------------------------------------------------------------------------------------------------


def test_nothing_on_the_page_is_asked_of_anybody_else(served):
    shown = served.get("/")
    assert shown.status_code == 200
    fetched = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']([^"']+)""", shown.text)
    assert fetched
    assert not [url for url in fetched if re.match(r"(https?:)?//", url)]
    theme = served.get("/theme.css")
    assert theme.status_code == 200
    for text in (theme.text, page._text("page.css"), page._text("page.js")):
        assert not re.search(r"""@import|fetch\(|url\((?!["']?data:)""", text)
    assert "system-ui" in theme.text
    assert '"analytics_enabled":false' in shown.text


def test_the_browser_is_told_to_ask_nobody_else(served):
    policy = served.get("/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert not any(re.search(r"https?:|\*", rule) for rule in rules.values())


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=README.md", "/gradio_api/file=https://example.org/", "/file=/etc/passwd",
        "/gradio_api/proxy=https://x.hf.space/", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/runs", "/gradio_api/mcp/",
        "/monitoring", "/docs", "/login", "/packet/guess", "/gradio_api/upload_progress?upload_id=1",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(served, path):
    assert served.get(path).status_code == 404


def test_files_cannot_be_uploaded(served):
    assert served.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_large_requests_are_cut_off():
    seen = []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            seen.append(len(message["body"]))
        seen.append(message["type"])

    async def receive():
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    async def ignore(message):
        pass

    asyncio.run(Doors(app)({"type": "http", "method": "POST", "path": "/config", "headers": []}, receive, ignore))
    assert seen.pop() == "http.disconnect"
    assert sum(seen) == LARGEST_REQUEST


def test_pages_of_other_servers_cannot_use_it(served):
    asked = {"data": [], "fn_index": 0, "session_hash": "x"}
    for origin in ("https://example.org", "http://127.0.0.1:9", "null"):
        assert served.post("/gradio_api/queue/join", json=asked, headers={"Origin": origin}).status_code == 403
    assert served.get("/", headers={"Host": "evil.example"}).status_code == 421
    assert served.put("/").status_code == 405


def test_a_token_is_asked_for(small):
    guarded = Gate(create_app(small), "0.0.0.0", "word", variable=TOKEN, methods=METHODS)
    with TestClient(guarded, base_url=LOOPBACK) as client:
        refused = client.get("/")
        assert refused.status_code == 401
        assert TOKEN in refused.text
        assert client.post("/gradio_api/queue/join", json={}).status_code == 401
        assert client.get("/?token=word").status_code == 200  # and the cookie that it gives
        assert client.get("/").status_code == 200


def test_downloads_have_names_that_nobody_guesses(small):
    packets = Packets()
    keys = {packets.offer(small.out) for _ in range(200)}
    assert len(keys) == 200
    assert min(map(len, keys)) >= 16
    assert len(packets._folders) == 64


def test_visitors_queue_for_the_one_model(small):
    async def built():
        return page.build(small, lambda folder: "key").blocks

    blocks = asyncio.run(built())
    working = [fn for fn in blocks.fns.values() if fn.queue]
    assert len(working) > 5
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in working} == {("model", 1)}
    assert {fn.api_visibility for fn in blocks.fns.values()} == {"private"}
    assert blocks._queue.max_size == page.QUEUE
    assert not blocks.analytics_enabled


# What a visitor does ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_scored_and_its_words_are_buttons(desk):
    session = Session()
    seen = desk.typed(session, KNOWN)
    assert "pulls unusually hard" in part(seen, "result")
    words = part(seen, "words")
    named = re.findall(r'<button[^>]+aria-label="(\w+), (\d+(?:\.\d)?) % of the pull, drop or replace"', words)
    assert [word for word, _ in named] == KNOWN.split()
    assert [f"{figure} %" for _, figure in named] == re.findall(
        r"<small>([^<]+)</small>", words
    )  # said without color as well


def test_a_word_is_dropped_and_the_score_falls(desk):
    session = Session()
    desk.typed(session, KNOWN)
    opened = desk.act(session, event(do="word", index="1"))
    announced = re.search(
        r"Drop it</button> <span>score ([\d.]+), (not above|above) the threshold", part(opened, "words")
    )
    assert announced is not None
    dropped = desk.act(session, event(do="apply", index="0"))
    assert part(dropped, "prompt") == "the lisa"
    assert f"→ <b>{announced[1]}</b>" in part(dropped, "result")
    assert part(dropped, "status").startswith('<p class="say">drop &#39;mona&#39;: score')
    assert desk.act(session, event(do="apply", index="0"))[page.PARTS.index("status")].startswith(
        '<p class="alert" role="alert">'
    )


def test_a_word_is_replaced_by_another(desk):
    session = Session()
    desk.typed(session, KNOWN)
    replaced = desk.act(session, event(do="write", index="0", text=" a "))
    assert part(replaced, "prompt") == "a mona lisa"
    assert [s.edit for s in session.states] == ["as typed", "replace 'the' by 'a'"]
    assert "no word was typed" in part(desk.act(session, event(do="write", index="0", text=" ")), "status")
    undone = desk.undone(session, False)
    assert part(undone, "prompt") == KNOWN
    assert "nothing to undo" in part(desk.undone(session, False), "status")


def test_edits_are_suggested(desk):
    session = Session()
    desk.typed(session, KNOWN)
    offered = part(desk.suggested(session), "offers")
    assert "not above the threshold" in offered
    desk.act(session, event(do="apply", index="0"))
    assert session.current is not None
    assert session.current.look.above is False


def test_pictures_stand_side_by_side_and_copies_are_blurred(desk):
    session = Session()
    desk.typed(session, KNOWN)
    desk.act(session, event(do="word", index="1"))
    desk.act(session, event(do="apply", index="0"))
    *_, last = desk.drawn(session, True)
    shown = part(last, "pictures")
    assert (
        shown.count("<img") == 3 * 4 + 2
    )  # a picture and its nearest, before and after, with three seeds; and two maps
    assert "<b>As typed:</b> Copy found in 3 of 3 seeds." in shown
    assert "<b>After the edit:</b> No copy found in 3 seeds." in shown
    frames = re.findall(r'<span class="frame( shaded)?"><img[^>]+alt="([^"]+)"', shown)
    for shaded, alt in frames:
        assert bool(shaded) == (alt.startswith("training picture") or alt == f"picture drawn for: {KNOWN}")
    assert "drawn, copy in 3 of 3" in part(last, "history")
    again = list(desk.drawn(session, False))
    assert len(again) == 1
    assert "drawn already" in part(again[0], "status")
    assert 'class="where"' not in part(desk.mapped(session, False), "pictures")


def test_drawing_is_stopped_and_nothing_is_left_behind(desk, monkeypatch):
    session = Session()
    desk.typed(session, KNOWN)
    desk.begin(session)
    desk.stop(session)
    *_, last = desk.drawn(session, False)
    assert "Stopped; nothing of it was kept." in part(last, "status")
    assert session.current is not None
    assert session.current.drawn is None
    desk.begin(session)  # the next time it goes on to the end
    list(desk.drawn(session, False))
    assert session.current.drawn is not None


def test_progress_is_told_while_it_works(desk, monkeypatch):
    session = Session()
    desk.typed(session, KNOWN)
    original = type(desk.studio).draw

    def slowly(self, prompt, tell):
        tell(1, 5)
        time.sleep(0.6)
        return original(self, prompt, tell)

    monkeypatch.setattr(type(desk.studio), "draw", slowly)
    bars = [v[page.PARTS.index("bar")] for v in desk.drawn(session, False)]
    assert any('max="5" value="1"' in bar for bar in bars if isinstance(bar, str))


def test_a_page_that_is_closed_stops_the_work(desk, monkeypatch):
    session = Session()
    desk.typed(session, KNOWN)
    ended = []

    def forever(self, prompt, tell):
        try:
            for i in range(10_000):
                tell(i, 10_000)
                time.sleep(0.01)
        finally:
            ended.append(prompt)

    monkeypatch.setattr(type(desk.studio), "draw", forever)
    work = desk.drawn(session, False)
    next(work)
    work.close()
    assert ended == [KNOWN]


def test_a_session_is_exported_and_opened_again(desk):
    session = Session()
    desk.typed(session, KNOWN)
    desk.act(session, event(do="write", index="0", text="a"))
    *_, last = desk.written(session)
    shown = part(last, "exported")
    folder = re.search(r"mnemoscope report (\S+)", shown)
    assert folder is not None
    assert 'href="packet/key" download' in shown
    rows = (desk.studio.out / folder[1].rpartition("/")[2] / "samples.jsonl").read_bytes()
    fresh = Session()
    opened = desk.act(fresh, event(do="open", name="samples.jsonl", data=base64.b64encode(rows).decode()))
    assert part(opened, "prompt") == "a mona lisa"
    assert [(s.prompt, s.edit, s.origin) for s in fresh.states] == [
        (KNOWN, "as typed", None),
        ("a mona lisa", "replace 'the' by 'a'", 1),
    ]
    assert fresh.current is not None
    assert session.current is not None
    assert fresh.current.look.score == pytest.approx(session.current.look.score, rel=1e-12)


def test_a_link_shows_the_same(desk):
    session = Session()
    desk.typed(session, KNOWN)
    desk.act(session, event(do="write", index="0", text="a"))
    link = re.search(r'href="\?([^"]+)"', fragments.history(desk.studio, session))
    assert link is not None
    query = dict(parse_qsl(unescape(link[1])))
    assert query == {"prompt": KNOWN, "edited": "a mona lisa", "seeds": "3", "steps": "5", "guidance": "1.5"}
    other = Session()
    came = desk.arrive(other, gradio.Request(query_params=query))
    assert part(came, "result") == fragments.result(desk.studio, session)
    assert part(came, "status").strip() == ""
    changed = desk.arrive(Session(), gradio.Request(query_params={**query, "seeds": "8"}))
    assert "seeds 8, here 3" in part(changed, "status")


@pytest.mark.parametrize(
    "given",
    [
        {}, {"do": "word"}, {"do": "word", "index": "-1"}, {"do": "word", "index": "9"}, {"do": "word", "index": "²"},
        {"do": "apply", "index": "1e3"}, {"do": "open", "data": "*", "name": 3}, {"do": "example", "index": None}, {"do": "nothing"},
        {"do": "open"}, {"do": "large"},
    ],
)  # fmt: skip
def test_whatever_a_browser_sends_is_answered_in_a_sentence(desk, given):
    session = Session()
    desk.typed(session, KNOWN)
    values = desk.act(session, event(**given))
    assert values == answer() or "alert" in part(values, "status")
    assert "the studio failed" not in str(values)
    assert desk.back(session, False, event(**given))


def test_a_fault_is_a_sentence_and_the_rest_goes_to_the_log(desk, monkeypatch, caplog):
    monkeypatch.setattr(type(desk.studio), "look", lambda self, prompts: 1 / 0)
    seen = part(desk.typed(Session(), KNOWN), "status")
    assert "the studio failed (ZeroDivisionError)" in seen
    assert "division" not in seen
    assert "division by zero" in caplog.text


def test_hostile_text_stays_text(desk, tmp_path):
    session = Session()
    shown = desk.typed(session, HOSTILE)
    desk.act(session, event(do="write", index="0", text=HOSTILE))
    *_, drawn = desk.drawn(session, True)
    parts = [
        *shown,
        *drawn,
        *desk.act(session, event(do="word", index="0")),
        fragments.alert(HOSTILE),
        fragments.said(HOSTILE),
    ]
    text = "".join(v for v in parts if isinstance(v, str) and v != HOSTILE and not v.startswith(HOSTILE[:4]))
    assert "&lt;img src=x" in text
    assert "<img src=x" not in text
    assert "<b>\u202e" not in text
    assert "\u202e" not in text  # and it is seen
    assert not re.search(r"""<[^>]*\sonclick=""", text)


def test_an_uncalibrated_model_says_so(tmp_path):
    desk = Desk(small_studio(tmp_path, calibrated=False), lambda folder: "key")
    assert "no threshold yet" in fragments.intro(desk.studio)
    seen = desk.typed(Session(), KNOWN)
    assert "Scores are uncalibrated for this model" in part(seen, "result")
    assert "above" not in part(seen, "history")


def test_the_intro_says_what_is_asked_and_offers_examples(desk):
    shown = fragments.intro(desk.studio)
    assert "threshold from 40 ordinary prompts" in shown
    assert "6 training pictures to compare with" in shown
    session = Session()
    assert part(desk.act(session, event(do="example", index="0")), "prompt") == KNOWN
    assert desk.studio.examples == (Example(KNOWN, "one picture"),)


def test_the_empty_prompt_scores_nothing(desk):
    session = Session()
    seen = desk.typed(session, "")
    assert "(the empty prompt)" in part(seen, "result")
    assert "There are no words in it." in part(seen, "words")
    assert desk.typed(session, None)  # as Gradio calls an empty field


def test_ordinary_prompts_are_calm(desk):
    assert "no harder than ordinary ones" in part(desk.typed(Session(), ORDINARY[0]), "result")


# The command --------------------------------------------------------------------------------------------------------------


def test_help_needs_neither_gradio_nor_torch():
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(studio)
    shown = CliRunner().invoke(app, ["--help"]).output
    for word in (
        "Example: mnemoscope studio",
        "--calibration",
        "--reference",
        "--seeds",
        "--port",
        "--host",
        "--token",
    ):
        assert word in shown


def test_a_missing_gradio_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UsageError, match=r"needs gradio, .*pip install 'mnemoscope\[studio\]'"):
        studio()


def test_others_are_let_in_with_a_token_only():
    with pytest.raises(UsageError, match=TOKEN):
        studio(host="0.0.0.0", port=0, token=None)
