"""The outermost gate: whatever is sent, and whatever fails behind it, there is an answer, and none leads elsewhere."""

from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from mnemoscope.serve.schema import error_response
from mnemoscope.web.access import Gate, KeyGate

HERE = "http://127.0.0.1:7347"
SECRET = "a-long-random-word"


async def page(request):
    if request.url.path == "/fails":
        raise RuntimeError(f"no page for {request.query_params.get('q')}")
    if request.url.path == "/leads":
        return RedirectResponse(request.query_params["to"])
    return PlainTextResponse("a page")


PAGES = Starlette(routes=[Route(path, page, methods=["GET", "POST"]) for path in ("/", "/page", "/fails", "/leads")])


def gate_before(app, kind, token=None):
    if kind == "key":
        return KeyGate(app, "127.0.0.1", token, refusal=error_response, variable="KEY")
    return Gate(app, token=token)


@pytest.fixture(params=["view", "key"])
def kind(request):
    return request.param


def visitor(app, **options):
    return TestClient(app, base_url=HERE, **options)


def raw(headers):
    """Headers as they are sent, byte by byte and as often as they stand there."""
    return [(name, value.encode("latin-1") if isinstance(value, str) else value) for name, value in headers]


# Headers ------------------------------------------------------------------------------------------------------------------


STRANGE = [
    *(
        "http://[",
        "http://[::1",
        "http://a]b",
        "http://",
        "://",
        "null",
        "",
        "\xff\xfe",
        "http://127.0.0.1:7347@evil.example",
    ),
    *(
        "http://127.0.0.1:99999999999",
        "http://127.0.0.1:7347/x",
        "ftp://127.0.0.1:7347",
        "127.0.0.1:7347",
        "%",
        "http://127.0.0.1",
    ),
]


@pytest.mark.parametrize("origin", STRANGE)
def test_a_strange_origin_is_a_foreign_one(kind, origin):
    answer = visitor(gate_before(PAGES, kind)).get("/", headers=raw([("origin", origin)]))
    assert answer.status_code == 403


@pytest.mark.parametrize("origins", [(HERE, "http://evil.example"), ("http://evil.example", HERE), (HERE, HERE)])
def test_of_several_origins_none_is_believed(kind, origins):
    answer = visitor(gate_before(PAGES, kind)).get("/", headers=raw([("origin", origin) for origin in origins]))
    assert answer.status_code == 403


@pytest.mark.parametrize("origin", [HERE, HERE.upper(), "https://127.0.0.1:7347"])
def test_our_own_origin_is_let_in(kind, origin):
    assert visitor(gate_before(PAGES, kind)).get("/", headers={"origin": origin}).status_code == 200


STRANGE_HOSTS = ["[", "[::1", "]", "\xff", "127.0.0.1:x", "", "a,b", "127.0.0.1:7347@evil.example", "[127.0.0.1", "::1"]


@pytest.mark.parametrize("host", STRANGE_HOSTS)
def test_a_strange_host_is_not_ours(kind, host):
    answer = visitor(gate_before(PAGES, kind)).get("/", headers=raw([("host", host)]))
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer \xff")],
        [("authorization", "\xff\xfe")],
        [("authorization", f"Bearer {SECRET}"), ("authorization", "Bearer wrong")],
        [("authorization", "Bearer wrong"), ("authorization", f"Bearer {SECRET}")],
        [("cookie", "\xff=\xfe; =; ;;==\x01")],
        [("cookie", 'mnemoscope-view="\\\xff')],
        [("content-length", "0"), ("content-type", "\xff"), ("sec-fetch-site", "\xff")],
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/", "/?token=%ff", "/?token", "/?%", "/%ff?=&&", "/[?token=[", "//[x"])
def test_whatever_is_shown_instead_of_a_token_is_none(kind, headers, path):
    answer = visitor(gate_before(PAGES, kind, SECRET)).get(path, headers=raw(headers))
    assert answer.status_code == 401


@pytest.mark.parametrize("path", ["/[", "//[x", "/%ff", "//evil.example/x"])
def test_the_token_leads_in_at_every_path(path):
    answer = visitor(Gate(PAGES, token=SECRET)).get(f"{HERE}{path}?token={SECRET}&q=[", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/")
    assert not answer.headers["location"].startswith("//")
    assert SECRET not in answer.headers["location"]


# Answers ------------------------------------------------------------------------------------------------------------------


def test_a_failure_is_an_answer(kind, caplog):
    with visitor(gate_before(PAGES, kind)) as client:
        answer = client.get("/fails?q=secret")
    assert answer.status_code == 500
    assert "failed" in answer.text or "Internal" in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text + answer.text


def test_a_failure_before_any_framework_is_an_answer(kind, caplog):
    async def fails(scope, receive, send):
        raise ValueError(scope["query_string"])

    answer = visitor(gate_before(fails, kind)).get("/?secret")
    assert answer.status_code == 500
    assert "he server failed at this request." in answer.text
    assert (answer.headers["content-type"] == "application/json") == (kind == "key")
    assert caplog.text.count("a request failed with ValueError") == 1
    assert "secret" not in caplog.text


def test_half_an_answer_is_seen_to_be_one(kind):
    async def breaks(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - which makes a server end the connection
        visitor(gate_before(breaks, kind)).get("/")


@pytest.mark.parametrize(
    "to",
    ["http://evil.example/page?x=1", "https://[::1/page?x=1", "//evil.example/page?x=1", "///page?x=1", "/page?x=1"],
)
def test_no_answer_leads_to_another_host(kind, to):
    answer = visitor(gate_before(PAGES, kind)).get("/leads", params={"to": to}, follow_redirects=False)
    assert answer.headers["location"] == "/page?x=1"


@pytest.mark.parametrize("to", ["?x=1", "page", "#there", "page?to=http://127.0.0.1/"])
def test_a_relative_address_stays_as_it_is(kind, to):
    answer = visitor(gate_before(PAGES, kind)).get("/leads", params={"to": to}, follow_redirects=False)
    assert answer.headers["location"] == to


def test_a_slash_too_many_leads_to_the_page(kind):
    assert visitor(gate_before(PAGES, kind)).get("/page/").text == "a page"


def test_there_is_nothing_but_http(kind):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    asyncio.run(gate_before(PAGES, kind)({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_whoever_goes_away_is_no_failure(kind, caplog):
    from starlette.requests import ClientDisconnect

    async def gone(scope, receive, send):
        raise ClientDisconnect

    async def nothing(*_):
        return {}

    caplog.set_level(logging.INFO)
    headers = [(b"host", b"127.0.0.1")]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
    asyncio.run(gate_before(gone, kind)(scope, nothing, nothing))
    assert not caplog.records
