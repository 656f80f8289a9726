"""The image endpoint: OpenAI's shapes, every limit, every error, who may come in, and nothing that remembers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading

import httpx2
import pytest
import schemathesis
from fake_guard import LIMITS, FakeGuard, opened, seed_of, served
from hypothesis import HealthCheck, settings
from starlette.testclient import TestClient

from mnemoscope.cli import serve as command
from mnemoscope.cli.serve import KEY, api_key, gated
from mnemoscope.cli.view import bound
from mnemoscope.demo.world import ASSETS
from mnemoscope.detect.calibrate import Calibration, setting_of
from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.models.host import Origin
from mnemoscope.models.load import build, open_pipeline
from mnemoscope.models.steer import target_around
from mnemoscope.serve.app import Endpoint
from mnemoscope.serve.guard import guard
from mnemoscope.serve.schema import LARGEST_SEED, Limits, calibrated, limits_of

PATH = "/v1/images/generations"
LOOPBACK = "http://127.0.0.1:7349"
SECRET = "a-long-random-word"


@pytest.fixture
def fake() -> FakeGuard:
    return FakeGuard()


@pytest.fixture
def client(fake):
    with TestClient(gated(Endpoint(fake, LIMITS), "127.0.0.1", None), base_url=LOOPBACK) as client:
        yield client


@pytest.fixture
def keyed(fake):
    app = gated(Endpoint(fake, LIMITS, keyed=True), "0.0.0.0", SECRET)
    with TestClient(app, base_url="http://192.168.0.7:7349") as client:
        yield client


def error(answer, status: int, code: str) -> dict:
    """The error object of an answer, whose shape clients rely on."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) <= {"error", "mnemoscope"}
    found = body["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["code"] == code
    assert found["message"].endswith(".")
    assert found["type"] == (
        "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    )
    return found


# Answers ------------------------------------------------------------------------------------------------------------------


def test_an_answer_has_the_shape_that_clients_know(client):
    answer = client.post(PATH, json={"model": "fake", "prompt": "a cat", "n": 2, "seed": 5, "size": "24x32"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"created", "data", "mnemoscope"}
    assert isinstance(body["created"], int)
    assert [set(picture) for picture in body["data"]] == [{"b64_json"}] * 2
    assert [opened(picture["b64_json"]).size for picture in body["data"]] == [(24, 32)] * 2
    assert [seed_of(picture["b64_json"]) for picture in body["data"]] == [5, 6]
    assert body["mnemoscope"]["decisions"] == [
        {"index": i, "seed": 5 + i, "score": (5 + i) / 4, "threshold": 1.0, "p": None, "hit": True, "action": "passed",
         "mitigation": None} for i in range(2)
    ]  # fmt: skip


def test_everything_that_was_asked_reaches_the_pipeline(client, fake):
    client.post(
        PATH,
        json={
            "prompt": "a cat", "n": 2, "size": "8x32", "seed": 3, "steps": 7, "guidance_scale": 4, "negative_prompt": "dogs",
            "user": "someone", "response_format": "b64_json",
        },
    )  # fmt: skip
    assert fake.asked == [
        {
            "prompt": "a cat", "seeds": [3, 4], "num_images_per_prompt": 2, "width": 8, "height": 32, "num_inference_steps": 7,
            "guidance_scale": 4.0, "negative_prompt": "dogs", "output_type": "pil",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    "given", [{}, dict.fromkeys(["model", "n", "size", "response_format", "user", "seed", "steps"])]
)
def test_what_is_left_out_or_null_has_its_default(client, fake, given):
    for _ in range(2):
        assert client.post(PATH, json={"prompt": "a cat", **given}).status_code == 200
    first, second = fake.asked
    assert (first["width"], first["height"], first["num_inference_steps"], first["guidance_scale"]) == (16, 16, 3, 7.5)
    assert "negative_prompt" not in first
    assert len(first["seeds"]) == 1
    assert first["seeds"] != second["seeds"]


def test_a_number_without_a_fraction_is_whole(client, fake):
    body = b'{"prompt": "a cat", "n": 2.0, "seed": 3e0}'
    assert (
        client.post(PATH, content=body, headers={"content-type": "application/json; charset=utf-8"}).status_code == 200
    )
    assert fake.asked[0]["seeds"] == [3, 4]


def test_models_and_probes(client):
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(m["id"], m["object"], m["owned_by"]) for m in models["data"]] == [("fake", "model", "mnemoscope")]
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_metrics_count_what_became_of_requests(client, fake):
    for prompt in ("a cat", "a dog", "refuse", "break", ""):
        client.post(PATH, json={"prompt": prompt})
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    assert answer.text.startswith(fake.metrics.text())
    for outcome, n in {"drawn": 2, "refused": 1, "failed": 1, "invalid": 1, "full": 0}.items():
        assert f'mnemoscope_serve_requests_total{{outcome="{outcome}"}} {n}' in lines
    assert {"mnemoscope_serve_queue_waiting 0", "mnemoscope_serve_queue_limit 16", "mnemoscope_serve_running 0"} <= set(
        lines
    )
    named = [line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")]
    typed = {line.split(" ")[2] for line in lines if line.startswith("# TYPE")}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in named} <= typed
    assert len({line.split(" ")[2] for line in lines if line.startswith("# HELP")}) == len(typed)


# Limits -------------------------------------------------------------------------------------------------------------------

WRONG = {
    "no prompt": ({"prompt": None}, "prompt", "invalid_value"),
    "empty prompt": ({"prompt": ""}, "prompt", "invalid_value"),
    "prompt of numbers": ({"prompt": 3}, "prompt", "invalid_value"),
    "list of prompts": ({"prompt": ["a", "b"]}, "prompt", "invalid_value"),
    "long prompt": ({"prompt": "x" * 201}, "prompt", "invalid_value"),
    "long negative prompt": ({"negative_prompt": "x" * 201}, "negative_prompt", "invalid_value"),
    "no pictures": ({"n": 0}, "n", "invalid_value"),
    "many pictures": ({"n": 5}, "n", "invalid_value"),
    "half a picture": ({"n": 1.5}, "n", "invalid_value"),
    "true pictures": ({"n": True}, "n", "invalid_value"),
    "pictures in words": ({"n": "2"}, "n", "invalid_value"),
    "no steps": ({"steps": 0}, "steps", "invalid_value"),
    "many steps": ({"steps": 11}, "steps", "invalid_value"),
    "negative seed": ({"seed": -1}, "seed", "invalid_value"),
    "large seed": ({"seed": LARGEST_SEED - LIMITS.most_pictures + 2}, "seed", "invalid_value"),
    "guidance off": ({"guidance_scale": 1}, "guidance_scale", "invalid_value"),
    "much guidance": ({"guidance_scale": 31}, "guidance_scale", "invalid_value"),
    "odd size": ({"size": "15x16"}, "size", "invalid_value"),
    "large size": ({"size": "32x16"}, "size", "invalid_value"),
    "no size": ({"size": "large"}, "size", "invalid_value"),
    "size with a tail": ({"size": "16x16\n"}, "size", "invalid_value"),
    "address": ({"response_format": "url"}, "response_format", "invalid_value"),
    "other format": ({"response_format": "tiff"}, "response_format", "invalid_value"),
    "long user": ({"user": "x" * 513}, "user", "invalid_value"),
    "unknown": ({"quality": "hd"}, "quality", "unknown_parameter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_beyond_a_limit_is_refused(client, fake, case):
    change, param, code = WRONG[case]
    found = error(client.post(PATH, json={"prompt": "a cat", **change}), 400, code)
    assert found["param"] == param
    assert param in found["message"]
    assert not fake.asked


def test_limits_themselves_are_allowed(client):
    most = {"prompt": "\U0001f431" * 200, "negative_prompt": "\U0001f431" * 200, "n": 4, "steps": 10, "size": "24x32"}
    most |= {"seed": LARGEST_SEED - 3, "guidance_scale": 30, "user": "\U0001f431" * 512}
    body = json.dumps(most, ensure_ascii=True).encode()
    assert len(body) > 10_000
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    # A reader whose numbers are all floating-point keeps them.
    assert [d["seed"] for d in json.loads(answer.text, parse_int=float)["mnemoscope"]["decisions"]] == [
        LARGEST_SEED - 3 + i for i in range(4)
    ]


def test_why_there_are_no_addresses_is_said(client):
    found = error(client.post(PATH, json={"prompt": "a cat", "response_format": "url"}), 400, "invalid_value")
    assert "no picture is kept here" in found["message"]
    assert "b64_json" in found["message"]


def test_a_missing_prompt_and_another_model_are_named(client):
    assert error(client.post(PATH, json={}), 400, "missing_required_parameter")["param"] == "prompt"
    found = error(client.post(PATH, json={"prompt": "a cat", "model": "dall-e-3"}), 404, "model_not_found")
    assert found["param"] == "model"
    assert "'fake'" in found["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nothing", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": NaN', b"[" * 5000, b'{"n": ' * 500],
)
def test_what_is_no_json_is_refused(client, body):
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert error(answer, 400, "invalid_json")["param"] is None


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"a cat"'])
def test_json_that_is_no_object_is_refused(client, body):
    error(client.post(PATH, content=body, headers={"content-type": "application/json"}), 400, "invalid_type")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_could_send_is_no_json(client, fake, kind):
    error(
        client.post(PATH, content=b'{"prompt": "a cat"}', headers={"content-type": kind}),
        415,
        "unsupported_content_type",
    )
    assert not fake.asked


JSON = ("content-type", "application/json")


@pytest.mark.parametrize(
    "headers",
    [
        *(
            [JSON, ("content-encoding", coding)]
            for coding in ("gzip", "br", "deflate", "zstd", "identity, gzip", "\xff")
        ),
        [JSON, ("content-encoding", "identity"), ("content-encoding", "gzip")],
        *(
            [("content-type", f"application/json; charset={name}")]
            for name in ("latin-1", "utf-16", '"UTF-16LE"', "", "\xff")
        ),
        [("content-type", "application/json; charset=utf-8; charset=utf-16")],
        [JSON, ("content-type", "text/plain")],
        [JSON, JSON],
    ],
    ids=str,
)
def test_what_is_declared_unreadable_is_not_read(client, fake, headers):
    answer = client.post(PATH, content=b'{"prompt": "a cat"}', headers=[(k, v.encode("latin-1")) for k, v in headers])
    assert "JSON in UTF-8" in error(answer, 415, "unsupported_content_type")["message"]
    assert not fake.asked


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": 'Application/JSON;  Charset="UTF-8"'},
        {"content-type": "application/json; charset=us-ascii"},
        {"content-type": "application/json; profile=x"},
        {"content-type": "application/json", "content-encoding": "identity"},
    ],
    ids=str,
)
def test_what_clients_declare_is_read(client, headers):
    assert client.post(PATH, content=b'{"prompt": "a cat"}', headers=headers).status_code == 200


def test_unknown_addresses_and_methods(client):
    error(client.get("/nowhere"), 404, "not_found")
    answer = client.get(PATH)
    error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    error(client.options(PATH), 405, "method_not_allowed")
    for path in ("/v1/models", "/health", "/metrics", "/openapi.json"):
        answer = client.post(path)
        error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/metrics", "/openapi.json", "/nowhere", PATH])
def test_a_head_is_what_get_has_without_its_body(client, path):
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    changing = {"date", "content-length"} if path == "/metrics" else {"date"}
    assert {k: v for k, v in head.headers.items() if k not in changing} == {
        k: v for k, v in whole.headers.items() if k not in changing
    }


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7349", "[::1", "evil.example/@"])
@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/?x=//evil.example", PATH + "/"])
def test_no_answer_leads_to_another_host(keyed, path, host):
    headers = {"host": host, "authorization": f"Bearer {SECRET}"}
    method = "POST" if path.startswith(PATH) else "GET"
    answer = keyed.request(method, path, headers=headers, follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"] == path.replace("/?", "?").removesuffix("/")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [20_000, 3_000_000])
def test_a_body_ends_where_it_gets_too_large(fake, chunked, size):
    def pieces():
        for _ in range(size // 1000):
            yield b"x" * 1000

    with served(Endpoint(fake, LIMITS)) as here, httpx2.Client(trust_env=False, timeout=30) as client:
        content = pieces() if chunked else b"x" * size
        try:
            answer = client.post(here.address + PATH, content=content, headers={"content-type": "application/json"})
        except httpx2.TransportError:
            assert size > 1_000_000  # beyond what is read and thrown away, the connection may end first
        else:
            error(answer, 413, "request_too_large")
        assert client.get(here.address + "/health").status_code == 200
    assert not fake.asked


def test_a_body_that_trickles_is_not_waited_for(fake, monkeypatch):
    monkeypatch.setattr("mnemoscope.serve.app.BODY_SECONDS", 0.2)
    with served(Endpoint(fake, LIMITS)) as here:
        host, port = here.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:
            head = (
                f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
            )
            line.sendall(head.encode() + b'{"prompt"')
            assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_the_models_own_limits(target_of):
    target = target_of("sd2")
    limits = limits_of(target, most_steps=20)
    assert (limits.height, limits.width) == (64, 64)
    assert limits.heights == limits.widths == tuple(range(32, 129, 8))
    assert (limits.model, limits.guidance, limits.steps) == ("tiny", target.guidance, 20)
    assert limits_of(target, largest=64).widths == (32, 40, 48, 56, 64)
    with pytest.raises(UsageError, match="allow at least 64"):
        limits_of(target, largest=56)
    with pytest.raises(UsageError, match="trained on 1000 timesteps"):
        limits_of(target, most_steps=2000)
    with pytest.raises(UsageError, match="60 steps where a request says nothing, and 1 to 20"):
        limits_of(target, most_steps=20, steps=60)
    with pytest.raises(UsageError, match="guidance 1: the guard"):
        limits_of(target, guidance=1.0)
    with pytest.raises(UsageError, match="takes no text"):
        limits_of(target_of("pixel"))


# What the guard does ------------------------------------------------------------------------------------------------------


def test_a_refused_generation_is_what_clients_know_as_one(client):
    answer = client.post(PATH, json={"prompt": "refuse", "n": 2, "seed": 7})
    assert error(answer, 400, "content_policy_violation")["param"] == "prompt"
    decisions = answer.json()["mnemoscope"]["decisions"]
    assert [(d["seed"], d["score"], d["action"], d["hit"]) for d in decisions] == [
        (7, 9.0, "refused", True),
        (8, 9.0, "refused", True),
    ]
    assert client.post(PATH, json={"prompt": "a cat"}).status_code == 200


def test_a_guard_that_fails_closed_draws_nothing(client):
    error(client.post(PATH, json={"prompt": "closed"}), 500, "guard_failed")


def test_a_failure_tells_nobody_the_prompt(client, caplog):
    found = error(client.post(PATH, json={"prompt": "break my secret"}), 500, "generation_failed")
    assert "RuntimeError" in found["message"]
    assert "RuntimeError" in caplog.text
    assert "fake_guard.py" in caplog.text
    assert "secret" not in found["message"] + caplog.text
    assert client.post(PATH, json={"prompt": "a cat"}).status_code == 200


@pytest.fixture
def tiny(build_pipe):
    """A pipeline, and a calibration that fits it."""
    pipe = build_pipe("sd")
    setting = setting_of(
        target_around(pipe, sampler="ddim").identity(),
        guidance=7.5,
        steps=50,
        window=(0, 1),
        seeds=1,
        seed_mode="per-prompt",
    )
    return pipe, setting


def around(pipe, scores, setting, **options) -> tuple[Endpoint, Limits]:
    guarded = guard(pipe, Calibration.fit(scores, setting, detector="magnitude", fpr=0.05), **options)
    limits = limits_of(build(pipe, Origin(name="tiny")))
    narrowed = calibrated(limits, guarded)
    return Endpoint(guarded, narrowed), narrowed


def test_behind_a_calibration_nobody_chooses_to_pass_unguarded(tiny):
    endpoint, limits = around(tiny[0], range(99), tiny[1])
    assert (limits.heights, limits.widths, limits.steps) == ((16,), (16,), 50)
    starts = {n: limits_start(tiny[0], n) for n in range(1, 101)}
    assert limits.counts == tuple(n for n in starts if starts[n] == starts[50])
    with TestClient(gated(endpoint, "127.0.0.1", None), base_url=LOOPBACK) as client:
        error(client.post(PATH, json={"prompt": "a cat", "steps": 49}), 400, "invalid_value")
        error(client.post(PATH, json={"prompt": "a cat", "size": "24x24"}), 400, "invalid_value")
        answer = client.post(PATH, json={"prompt": "a cat", "steps": 50})
        assert answer.status_code == 200
        (decision,) = answer.json()["mnemoscope"]["decisions"]
        assert decision["action"] == "passed"
        assert decision["score"] > 0
        assert 0 < decision["p"] <= 1


def limits_start(pipe, steps: int) -> float:
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return float(scheduler.timesteps[0])


def test_a_hit_is_refused_over_http(tiny):
    endpoint, _ = around(tiny[0], [0.0] * 99, tiny[1], on_hit="refuse")
    with TestClient(gated(endpoint, "127.0.0.1", None), base_url=LOOPBACK) as client:
        answer = client.post(PATH, json={"prompt": "a cat", "n": 2})
        error(answer, 400, "content_policy_violation")
        assert [d["action"] for d in answer.json()["mnemoscope"]["decisions"]] == ["refused", "refused"]
        assert all(d["score"] > d["threshold"] for d in answer.json()["mnemoscope"]["decisions"])


def test_a_bare_number_and_an_accepted_calibration_narrow_nothing(tiny):
    pipe, setting = tiny
    limits = limits_of(build(pipe, Origin(name="tiny")))
    other = Calibration.fit(range(99), {**setting, "seeds": 4}, detector="magnitude", fpr=0.05)
    assert calibrated(limits, guard(pipe, 1.0)) is limits
    assert calibrated(limits, guard(pipe, other, accept=True)) is limits
    few = limits_of(build(pipe, Origin(name="tiny")), most_steps=20)
    with pytest.raises(UsageError, match="was made with 50 steps at 16x16"):
        calibrated(few, guard(pipe, Calibration.fit(range(99), setting, detector="magnitude", fpr=0.05)))


# Who may come in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [None, "", SECRET, "Bearer", "Bearer ", "Bearer wrong", f"Basic {SECRET}", f"Bearer {SECRET}x"]
)
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/metrics", "/openapi.json", "/nowhere"])
def test_without_the_key_nothing_is_answered(keyed, fake, header, path):
    headers = {} if header is None else {"authorization": header}
    answer = keyed.request("POST" if path == PATH else "GET", path, headers=headers)
    error(answer, 401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert SECRET not in answer.text
    assert not fake.asked


def test_the_key_is_a_bearer_and_nothing_else(keyed):
    assert keyed.post(PATH, json={"prompt": "a cat"}, headers={"authorization": f"Bearer {SECRET}"}).status_code == 200
    error(keyed.get("/v1/models", params={"token": SECRET}), 401, "invalid_api_key")
    error(keyed.get("/v1/models", headers={"cookie": f"mnemoscope-view={SECRET}"}), 401, "invalid_api_key")
    assert not keyed.cookies


def test_whoever_looks_after_the_server_needs_no_key(keyed):
    assert keyed.get("/health").status_code == keyed.get("/ready").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", ""])
def test_without_a_key_a_name_that_is_not_ours_is_refused(client, fake, host):
    error(client.post(PATH, json={"prompt": "a cat"}, headers={"host": host}), 421, "unknown_host")
    assert not fake.asked


def test_with_a_key_a_proxy_may_keep_its_name(keyed):
    headers = {"host": "images.example", "authorization": f"Bearer {SECRET}"}
    assert keyed.get("/v1/models", headers=headers).status_code == 200
    error(keyed.get("/v1/models", headers={"host": "images.example"}), 401, "invalid_api_key")


def test_pages_of_others_are_refused(client, fake):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        error(client.post(PATH, json={"prompt": "a cat"}, headers={"origin": origin}), 403, "foreign_origin")
    assert not fake.asked
    answer = client.get("/v1/models")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


# The document -------------------------------------------------------------------------------------------------------------


def test_the_document_states_the_limits(client):
    document = client.get("/openapi.json").json()
    operation = document["paths"][PATH]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    of = {
        name: next(kind for kind in p.get("anyOf", [p]) if kind.get("type") != "null")
        for name, p in schema["properties"].items()
    }
    assert (of["prompt"]["minLength"], of["prompt"]["maxLength"]) == (1, 200)
    assert (of["n"]["minimum"], of["n"]["maximum"]) == (1, 4)
    assert (of["steps"]["minimum"], of["steps"]["maximum"]) == (1, 10)
    allowed = re.compile(of["size"]["pattern"])
    assert all(allowed.search(size) for size in ("auto", "8x8", "24x32", "16x24"))
    assert not any(allowed.search(size) for size in ("32x32", "24x40", "116x16", "16x160", "15x16", "x", "8x8x8"))
    assert set(operation["responses"]) == {
        "200", "400", "403", "404", "408", "413", "415", "421", "429", "500", "503", "504",
    }  # fmt: skip
    assert "Retry-After" in operation["responses"]["429"]["headers"]
    assert not any("422" in methods[m]["responses"] for methods in document["paths"].values() for m in methods)


def test_the_document_says_what_asks_for_the_key(keyed):
    document = keyed.get("/openapi.json", headers={"authorization": f"Bearer {SECRET}"}).json()
    secured = {path for path, methods in document["paths"].items() for m in methods.values() if m.get("security")}
    assert secured == {PATH, "/v1/models", "/metrics"}
    assert all("401" in m["responses"] for path in secured for m in document["paths"][path].values())


def test_steps_with_gaps_are_a_list():
    limits = Limits("fake", (16,), (16,), 16, 16, 7.5, steps=4, counts=(2, 4, 7))
    with TestClient(gated(Endpoint(FakeGuard(), limits), "127.0.0.1", None), base_url=LOOPBACK) as client:
        schema = client.get("/openapi.json").json()["paths"][PATH]["post"]["requestBody"]["content"][
            "application/json"
        ]["schema"]
        assert schema["properties"]["steps"]["anyOf"][0] == {"type": "integer", "enum": [2, 4, 7]}
        assert (
            "2, 4, 7 are possible"
            in error(client.post(PATH, json={"prompt": "a", "steps": 3}), 400, "invalid_value")["message"]
        )
        assert client.post(PATH, json={"prompt": "a", "steps": 7}).status_code == 200


described = schemathesis.openapi.from_dict(Endpoint(None, LIMITS, keyed=True).app.openapi())


@pytest.fixture(scope="module")
def address():
    with served(Endpoint(FakeGuard(), LIMITS, keyed=True), key=SECRET) as here:
        yield here.address


@described.parametrize()
@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_server_is_as_its_document_says(case, address):
    case.call_and_validate(base_url=address, headers={"Authorization": f"Bearer {SECRET}"})


# The command --------------------------------------------------------------------------------------------------------------


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    assert api_key(None) is None
    monkeypatch.setenv(KEY, "from-the-environment")
    assert api_key(None) == "from-the-environment"
    file = tmp_path / "key"
    file.write_text("from-a-file\n")
    assert api_key(file) == "from-a-file"
    for bad in ("", "\n", "two words", "clé", "two\nlines"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(UsageError, match="is empty or has other than ASCII"):
            api_key(file)
    with pytest.raises(UsageError, match="cannot be read"):
        api_key(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot be read"):
        api_key(tmp_path)
    file.write_text("x" * 5000)
    with pytest.raises(UsageError, match="has more than 4,096 characters"):
        api_key(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_key_may_come_through_a_pipe_that_somebody_writes(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="is empty"):
        api_key(pipe)
    number = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    os.write(number, b"from-a-pipe\n")
    threading.Timer(0.2, os.close, [number]).start()
    assert api_key(pipe) == "from-a-pipe"


REFUSED = {
    "no key": (["--host", "0.0.0.0"], "set MNEMOSCOPE_API_KEY"),
    "no policy": (["--on-hit", "refuze"], "no --on-hit value named 'refuze'. Did you mean 'refuse'?"),
    "no way to fail": (["--on-error", "ajar"], "no --on-error value named 'ajar'"),
    "no folder for the log": (["--log", "/nowhere/at/all"], "cannot be written (No such file or directory)"),
    "no log": (["--log-prompts"], "--log-prompts needs --log"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_sentence(case, monkeypatch, capsys):
    from mnemoscope.cli import main as cli

    options, sentence = REFUSED[case]
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "serve", "demo", "--port", "0", *options])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 2
    talk = capsys.readouterr().err
    assert sentence in talk
    assert "Loading" not in talk


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, capsys, missing):
    from mnemoscope.cli import main as cli

    found = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else found(name))
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "serve", "demo"])
    with pytest.raises(SystemExit):
        cli.main()
    assert (
        f"needs {missing}, which is not installed; install it with: pip install 'mnemoscope[serve]'"
        in capsys.readouterr().err
    )


def test_a_pipeline_is_opened_for_whoever_runs_it():
    pipe, origin, recommended = open_pipeline("demo", device="cpu")
    assert callable(pipe)
    assert origin.name == "demo"
    assert recommended == {"guidance": 3.0}
    with pytest.raises(UnknownName, match="no option of open_pipeline named 'guidence'"):
        open_pipeline("demo", guidence=3)


def test_the_bundled_model_is_served(monkeypatch, capsys):
    loading = {"dtype": "float32", "device": "cpu"}
    guarding = {"on_hit": "observe"}
    folder = str(ASSETS / "text-to-image")  # a model that nobody has thresholds of
    endpoint = command._open(folder, None, guarding, {"steps": 2, "name": "demo"}, loading, {"queue": 1})
    talk = capsys.readouterr().err
    assert "scores are uncalibrated" in talk
    assert f"mnemoscope calibrate {folder}" in talk
    asked = {"model": "demo", "prompt": "a red apple", "n": 2, "seed": 11, "steps": 3}
    with TestClient(gated(endpoint, "127.0.0.1", None), base_url=LOOPBACK) as client:
        first, again = client.post(PATH, json=asked).json(), client.post(PATH, json=asked).json()
        other = client.post(PATH, json={**asked, "seed": 12, "n": 1}).json()
    pictures = [opened(picture["b64_json"]) for picture in first["data"]]
    assert [p.size for p in pictures] == [(64, 64)] * 2
    assert first["data"] == again["data"]
    assert first["data"][0] != first["data"][1]
    assert first["mnemoscope"] == again["mnemoscope"]
    assert [(d["hit"], d["action"], d["threshold"]) for d in first["mnemoscope"]["decisions"]] == [
        (False, "passed", None)
    ] * 2
    # A picture depends on its seed and not on what is drawn beside it.
    score = other["mnemoscope"]["decisions"][0]["score"]
    assert score == pytest.approx(first["mnemoscope"]["decisions"][1]["score"], rel=1e-4)


def test_the_bundled_model_brings_its_thresholds(capsys):
    """So that it can refuse out of the box: a planted caption is refused, an ordinary one is drawn."""
    loading, guarding = {"dtype": "float32", "device": "cpu"}, {"on_hit": "refuse", "on_error": "closed"}
    endpoint = command._open("demo", None, guarding, {"steps": 50}, loading, {"queue": 1})
    assert "uncalibrated" not in capsys.readouterr().err
    with TestClient(gated(endpoint, "127.0.0.1", None), base_url=LOOPBACK) as client:
        answers = [
            client.post(PATH, json={"prompt": prompt, "seed": 1}) for prompt in ("oncoming police car", "a red apple")
        ]
    assert [a.status_code for a in answers] == [400, 200]
    assert answers[0].json()["error"]["code"] == "content_policy_violation"


def test_other_models_need_thresholds_to_refuse(monkeypatch, capsys):
    from mnemoscope.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["mnemoscope", "serve", "somebody/model", "--port", "0", "--on-hit", "refuse"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "--on-hit refuse needs --thresholds" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_command_serves_until_it_is_ended(tmp_path, monkeypatch, capsys):
    from mnemoscope.cli import main as cli

    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    words = f"serve demo --port {port} --steps 2 --max-steps 5 --thresholds 0.01 --device cpu --log {tmp_path / 'log'}"
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(sys, "argv", ["mnemoscope", *words.split()])
    answers = []

    def visit():
        """Ask for a picture, then end the command as a service manager does."""
        headers = {"authorization": f"Bearer {SECRET}"}
        try:
            with httpx2.Client(
                base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60, headers=headers
            ) as client:
                answers.append(client.post(PATH, json={"prompt": "three green bottles"}))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    visitor, before = threading.Thread(target=visit), signal.getsignal(signal.SIGTERM)
    # It listens before the model is loaded, so whoever comes early waits.
    monkeypatch.setattr(command, "bound", lambda *given: listening_for(visitor, *given))
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
        visitor.join(60)
    assert end.value.code == 0
    (answer,) = answers
    assert answer.status_code == 200
    assert answer.json()["mnemoscope"]["decisions"][0]["action"] == "observed"
    assert "server" not in answer.headers
    out, talk = capsys.readouterr()
    assert out == f"http://127.0.0.1:{port}/\n"
    assert talk.startswith("Loading demo …\n")
    assert "uncalibrated" not in talk
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["action"] == "observed"
    assert not re.search(f"bottles|{SECRET}|Traceback", line + out + talk)


def listening_for(visitor, *given):
    """The command's socket; the visitor comes as soon as it is there."""
    listening = bound(*given)
    visitor.start()
    return listening
