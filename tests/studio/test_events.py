"""What visitors send to the page's server: judged before Gradio sees it, kept by nobody, and no reason to go on when all ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from desk import KNOWN, small_studio
from starlette.testclient import TestClient

from mnemoscope.cli.studio import TOKEN
from mnemoscope.web.access import HEADERS, Gate

pytest.importorskip("gradio", reason="gradio is not installed")

from mnemoscope.studio.events import is_session
from mnemoscope.studio.server import LARGEST_REQUEST, METHODS, POLICY, Doors, create_app

LOOPBACK = "http://127.0.0.1:7348"
JOIN, PREDICT, DATA = "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/queue/data"

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def doors(tmp_path_factory) -> Doors:
    return create_app(small_studio(tmp_path_factory.mktemp("studio")))


@pytest.fixture(scope="module")
def served(doors):
    app = Gate(doors, variable=TOKEN, methods=METHODS, headers={**HEADERS, "Content-Security-Policy": POLICY})
    with TestClient(app, base_url=LOOPBACK) as client:
        yield client


@pytest.fixture(scope="module")
def queue(doors) -> Any:
    """Gradio's own."""
    (gradio_app,) = [route.app for route in doors.app.routes if hasattr(getattr(route, "app", None), "get_blocks")]
    return gradio_app.get_blocks()._queue


def number_of(doors: Doors, queued: bool, inputs: int) -> int:
    return next(
        n for n, handler in doors.handlers.items() if handler.queued == queued and len(handler.inputs) == inputs
    )


@pytest.fixture(scope="module")
def typed(doors) -> dict[str, Any]:
    """The event of a prompt that was typed, as the page sends it."""
    return {
        "session_hash": "abc123", "fn_index": number_of(doors, True, 2), "data": [None, KNOWN], "trigger_id": 5, "event_data": None,
    }  # fmt: skip


def draw(served: TestClient, event: dict[str, Any]) -> str:
    """Everything that the server says about an event."""
    assert served.post(JOIN, json=event).status_code == 200
    return served.get(DATA, params={"session_hash": event["session_hash"]}).text


def test_an_event_of_the_page_is_answered_and_nothing_of_it_is_kept(served, typed, queue):
    for n in range(3):
        assert "pulls unusually hard" in draw(served, {**typed, "session_hash": f"visit{n}"})
    deadline = time.monotonic() + 20
    while queue.event_ids_to_events and time.monotonic() < deadline:
        time.sleep(0.02)
    assert queue.event_ids_to_events == {}
    assert not queue.event_analytics


STRANGE_SESSIONS = ["", "a" * 65, "a b", "a\x00", "a\nb", "é", "\ud800", "../x", "a/b", 7, True, None, ["a"], {"a": 1}]


@pytest.mark.parametrize("session", STRANGE_SESSIONS, ids=repr)
@pytest.mark.parametrize("place", [JOIN, PREDICT])
def test_a_strange_visit_is_refused_and_every_other_goes_on(served, typed, queue, caplog, capfd, session, place):
    body = json.dumps({**typed, "session_hash": session}).encode()
    answer = served.post(place, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert re.fullmatch(
        r"this is no event of the page \([^\n]{1,250}\); load the page again\.", answer.json()["detail"]
    )
    assert "process_completed" in draw(served, typed)
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "changes",
    [
        {"fn_index": -1}, {"fn_index": 9999}, {"fn_index": 10**30}, {"fn_index": "1"}, {"fn_index": 1.5}, {"fn_index": None},
        {"fn_index": True}, {"data": None}, {"data": {}}, {"data": []}, {"data": [None]}, {"data": [None, "a", "b"]},
        {"data": [None] * 1000}, {"data": [None, 7]}, {"data": [None, ["a"]]}, {"data": [None, {"path": "/etc/passwd"}]},
        {"data": ["a", "b"]}, {"data": [None, True]}, {"trigger_id": "x"}, {"trigger_id": -1}, {"event_data": ["x"]},
        {"event_data": {"a": {"b": 1}}}, {"event_data": {"a": [1]}}, {"event_data": {f"k{i}": 1 for i in range(100)}},
    ],
    ids=repr,
)  # fmt: skip
def test_an_event_of_another_shape_is_refused(served, typed, queue, changes):
    answer = served.post(JOIN, json={**typed, **changes})
    assert answer.status_code == 422
    assert answer.json()["detail"].endswith("load the page again.")
    assert len(queue) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b"[" * 100_000, b'{"session_hash":"a","fn_index":NaN,"data":[]}',
        b'{"session_hash":"a","fn_index":1e999,"data":[]}', b"9" * 10_000,
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
@pytest.mark.parametrize("place", [JOIN, PREDICT])
def test_a_body_that_is_no_event_is_refused(served, body, place):
    answer = served.post(place, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["detail"].endswith("load the page again.")


def test_a_body_that_is_too_large_is_refused(served, typed):
    answer = served.post(JOIN, json={**typed, "data": [None, "x" * LARGEST_REQUEST]})
    assert answer.status_code == 422
    assert "too large" in answer.json()["detail"]


def test_an_event_goes_only_where_the_page_sends_it(served, typed, doors):
    at_once = {**typed, "fn_index": number_of(doors, False, 1), "data": [None]}
    assert served.post(PREDICT, json=at_once).status_code == 200
    assert served.post(JOIN, json=at_once).status_code == 422
    assert served.post(PREDICT, json=typed).status_code == 422


def test_what_the_page_does_not_send_does_not_reach_gradio(served, typed, doors, monkeypatch):
    seen: list[Any] = []

    async def watch(scope: Any, receive: Any, send: Any) -> None:
        seen.append((json.loads((await receive())["body"]), dict(scope["headers"])))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    client = TestClient(Doors(watch, doors.handlers), base_url=LOOPBACK)
    more = {"oauth_token": "x", "event_id": "y", "simple_format": True, "batched": True, "request": {}, "else": 1}
    headers = {"Content-Type": "text/html; charset=utf-16", "Content-Encoding": "x"}
    client.post(JOIN, content=json.dumps({**typed, **more}), headers=headers)
    body, sent = seen[0]
    assert body == typed
    assert sent[b"content-type"] == b"application/json"
    assert int(sent[b"content-length"]) == len(json.dumps(typed, separators=(",", ":")))
    assert b"content-encoding" not in sent


@pytest.mark.parametrize(
    "address",
    [
        DATA, DATA + "?session_hash=", DATA + "?session_hash=%ED%A0%80", DATA + "?session_hash=a&session_hash=b",
        DATA + "?session_hash=" + "a" * 100, "/gradio_api/heartbeat/", "/gradio_api/heartbeat/a%2Fb", "/gradio_api/heartbeat/%00",
        "/gradio_api/heartbeat/" + "a" * 100, "/config?session_hash=a%20b",
    ],
)  # fmt: skip
def test_a_stream_of_a_strange_visit_is_refused(served, address):
    answer = served.get(address)
    assert answer.status_code == 422
    assert "session_hash" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["k3j9x0q1zp", "a", "A_b-9", "0" * 64])
def test_names_that_browsers_give_are_names(name):
    assert is_session(name)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/call/x", "/gradio_api/call/v2/x", "/gradio_api/call/x/1", "/gradio_api/api/predict", "/gradio_api/run/typed",
        "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/component_server", "/gradio_api/stream/1", "/gradio_api/queue/status",
        "/gradio_api/queue/join/", "/gradio_api/queue/", "/gradio_api/process_recording", "/gradio_api/vibe-edit",
        "/gradio_api/custom_component/1/2/3/4", "/gradio_api/deep_link?session_hash=a", "/gradio_api/app_id", "/gradio_api/token",
        "/gradio_api/user", "/gradio_api/dev/reload", "/gradio_api/profiling/traces", "/gradio_api/run-history/records", "/pwa_icon",
        "/monitoring/summary", "/monitoring/key", "/config/", "/logout", "/svelte/x", "/robots.txt", "/gradio_api/theme.css",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_addresses_of_gradio_are_not_there(served, path, method):
    assert served.request(method, path).status_code == 404


@pytest.mark.parametrize("folder", ["/assets/", "/static/"])
@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2fetc%2fpasswd",
        "..%5c..%5cx",
        "%00",
        "a" * 240,
        "a" * 300,
        "a" * 5000,
        "%C3%A9" * 100,
    ],
)
def test_folders_of_the_page_hold_its_own_files_only(served, folder, path):
    answer = TestClient(served.app, base_url=LOOPBACK, raise_server_exceptions=False).get(folder + path)
    assert answer.status_code in (400, 403, 404), answer.text[:200]
    assert "root:" not in answer.text


@pytest.mark.parametrize("query", ["page=x", "deep_link=x", "deep_link=..%2fx", "page=..&deep_link=" + "a" * 500])
def test_an_address_opens_no_other_page_and_nothing_stored(served, query):
    assert served.get("/?" + query).text == served.get("/").text
    assert served.get("/config?" + query).status_code == 200


def test_what_the_page_says_about_itself_names_no_place_of_this_machine(served, tmp_path):
    told = served.get("/config").text + served.get("/").text + served.get("/gradio_api/startup-events").text
    for place in (str(Path.home()), str(HERE.parents[1]), str(tmp_path.parent.parent), sys.prefix):
        assert place not in told


# As a process -------------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv.pop())
import typer
from desk import small_studio
from mnemoscope.cli import studio as command
from mnemoscope.studio.model import Studio

def draw(self, prompt, tell):
    tell(1, 5)
    time.sleep(600)  # a step of a large model: it hears of nothing

Studio.draw = draw
command.PATIENCE = 0.5
folder = Path(sys.argv.pop())
command._open = lambda *given, **options: small_studio(folder)
typer.run(command.studio)
"""


class Visit:
    """A visitor of a studio in another process."""

    def __init__(self, address: str):
        self.address = address
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.events = json.loads(self.ask("config").read())["dependencies"]

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return self.opener.open(urllib.request.Request(self.address + path, data), timeout=60)

    def send(self, number: int, *values: Any) -> Any:
        """Send an event; what the server says about it, line by line."""
        self.ask(JOIN[1:], {"session_hash": "abc", "fn_index": number, "data": [None, *values]}).read()
        return self.ask(DATA[1:] + "?session_hash=abc")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_while_pictures_are_drawn(tmp_path, times):
    command = [sys.executable, "-c", SLOW, "--port", "0", str(tmp_path), str(HERE)]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            visit = Visit(process.stdout.readline().strip())
            typed = next(
                e["id"] for e in visit.events if len(e["inputs"]) == 2 and e["queue"] and not e["types"]["generator"]
            )
            drawn = next(e["id"] for e in visit.events if len(e["inputs"]) == 2 and e["types"]["generator"])
            assert b"process_completed" in visit.send(typed, KNOWN).read()
            answer = visit.send(drawn, False)
            assert next(line for line in answer if b"process_generating" in line)
            heartbeat = visit.ask("gradio_api/heartbeat/abc")
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert process.wait(60) == 0
            heartbeat.close()
        finally:
            process.kill()
        said = process.stderr.read()
    assert "Traceback" not in said
    assert "Error" not in said


def test_no_connection_is_made_to_anybody(tmp_path):
    code = f"""
import sys
strangers = []
def watch(event, given):
    if event == "socket.getaddrinfo" or event == "socket.connect" and given[1][0] != "127.0.0.1":
        strangers.append((event, given))
sys.addaudithook(watch)
sys.path.insert(0, {str(HERE)!r})
import threading
from pathlib import Path
from desk import small_studio
from mnemoscope.studio.server import create_app
from starlette.testclient import TestClient
with TestClient(create_app(small_studio(Path({str(tmp_path)!r}))), base_url="http://127.0.0.1") as client:
    assert client.get("/").status_code == 200
    assert client.get("/config").json()["analytics_enabled"] is False
sys.exit(f"{{strangers}}" if strangers else 0)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO", "HF_"))}
    asked = {**environment, "GRADIO_ANALYTICS_ENABLED": "True"}
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
