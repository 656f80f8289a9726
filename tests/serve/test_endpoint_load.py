"""Many at once on a real server: nothing is lost, nothing is crossed, the queue ends where it should, and so does the server."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import pytest
from fake_guard import LIMITS, FakeGuard, seed_of, served, until

from mnemoscope.errors import UsageError
from mnemoscope.serve.app import Endpoint
from mnemoscope.serve.worker import Drawn, Full, Leaving, Order, Worker

PATH = "/v1/images/generations"
MANY = 50


def order(seed: int = 0) -> Order:
    return Order("a cat", (seed,), 16, 16, 3, 7.5)


@pytest.fixture(scope="module")
def client():
    """As many lines as there are callers; a client is slow to make, and threads may share it."""
    with httpx2.Client(trust_env=False, timeout=60, limits=httpx2.Limits(max_connections=MANY)) as client:
        yield client


@pytest.fixture
def asking(client):
    """``asking(address)``: a function that asks for the picture of one seed."""

    def to(address: str, **changes: object) -> Callable[[int], httpx2.Response]:
        return lambda seed: client.post(address + PATH, json={"prompt": f"picture {seed}", "seed": seed, **changes})

    return to


def test_of_many_at_once_none_is_lost_and_none_is_crossed(asking):
    fake = FakeGuard(seconds=0.001)
    with served(Endpoint(fake, LIMITS, queue=MANY)) as here, ThreadPoolExecutor(MANY) as pool:
        seeds = [1000 * i for i in range(MANY)]
        answers = list(pool.map(asking(here.address, n=2), seeds))
    assert [a.status_code for a in answers] == [200] * MANY
    for seed, answer in zip(seeds, answers, strict=True):
        body = answer.json()
        assert [seed_of(p["b64_json"]) for p in body["data"]] == [seed, seed + 1]
        assert [d["seed"] for d in body["mnemoscope"]["decisions"]] == [seed, seed + 1]
        assert [d["score"] for d in body["mnemoscope"]["decisions"]] == [seed / 4, (seed + 1) / 4]
    assert sorted(a["seeds"][0] for a in fake.asked) == seeds
    assert all(a["prompt"] == f"picture {a['seeds'][0]}" for a in fake.asked)
    assert len(fake.threads) == 1
    assert threading.get_ident() not in fake.threads


def test_more_than_the_queue_holds_are_told_to_come_back(client, asking):
    fake, queue = FakeGuard(), 8
    endpoint = Endpoint(fake, LIMITS, queue=queue)
    fake.go.clear()
    with served(endpoint) as here, ThreadPoolExecutor(MANY) as pool:
        asked = [pool.submit(asking(here.address), seed) for seed in range(MANY)]
        until(lambda: sum(f.done() for f in asked) == MANY - queue - 1)
        lines = client.get(here.address + "/metrics").text.splitlines()
        assert {f"mnemoscope_serve_queue_waiting {queue}", "mnemoscope_serve_running 1"} <= set(lines)
        fake.go.set()
        answers = [f.result() for f in asked]
    assert Counter(a.status_code for a in answers) == {200: queue + 1, 429: MANY - queue - 1}
    for seed, answer in enumerate(answers):
        if answer.status_code == 200:
            assert seed_of(answer.json()["data"][0]["b64_json"]) == seed
        else:
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after"]) >= 1
    assert len(fake.asked) == queue + 1
    assert endpoint.outcomes["full"] == MANY - queue - 1


def test_whoever_goes_away_gives_up_their_place(client, asking):
    fake = FakeGuard()
    endpoint = Endpoint(fake, LIMITS, queue=1)
    fake.go.clear()
    with served(endpoint) as here, ThreadPoolExecutor(2) as pool:
        first = pool.submit(asking(here.address), 1)
        until(lambda: endpoint.worker.running == 1)
        with pytest.raises(httpx2.TimeoutException):
            client.post(here.address + PATH, json={"prompt": "queued", "seed": 2}, timeout=0.5)
        until(lambda: endpoint.worker.waiting == 0)
        third = pool.submit(asking(here.address), 3)
        until(lambda: endpoint.worker.waiting == 1)
        fake.go.set()
        assert [first.result().status_code, third.result().status_code] == [200, 200]
    assert [a["seeds"] for a in fake.asked] == [[1], [3]]
    assert endpoint.outcomes["gone"] == 1


def test_what_nobody_waits_for_ends_after_its_step(client, asking):
    fake = FakeGuard()
    endpoint = Endpoint(fake, LIMITS)
    fake.go.clear()
    with served(endpoint) as here:
        with pytest.raises(httpx2.TimeoutException):
            client.post(here.address + PATH, json={"prompt": "a cat", "steps": 10}, timeout=0.5)
        until(lambda: endpoint.outcomes["gone"] == 1)
        fake.go.set()
        until(lambda: endpoint.worker.running == 0)
        assert fake.steps == 1
        assert asking(here.address)(5).status_code == 200


def test_a_request_takes_no_longer_than_it_may(asking):
    fake = FakeGuard()
    endpoint = Endpoint(fake, LIMITS, seconds=0.3)
    fake.go.clear()
    with served(endpoint) as here:
        answer = asking(here.address, steps=10)(1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        fake.go.set()
        until(lambda: endpoint.worker.running == 0)
        assert fake.steps == 1
        assert asking(here.address)(2).status_code == 200
    assert endpoint.outcomes["timeout"] == 1


def test_an_end_under_load_finishes_what_runs_and_refuses_the_rest(asking):
    fake = FakeGuard()
    endpoint = Endpoint(fake, LIMITS, queue=20)
    fake.go.clear()
    with served(endpoint) as here, ThreadPoolExecutor(10) as pool:
        asked = {0: pool.submit(asking(here.address), 0)}
        until(lambda: endpoint.worker.running == 1)
        asked |= {seed: pool.submit(asking(here.address), seed) for seed in range(1, 10)}
        until(lambda: endpoint.worker.waiting == 9)
        here.end()
        answers = {seed: asked[seed].result() for seed in range(1, 10)}
        assert not asked[0].done()
        fake.go.set()
        here.thread.join(10)
        assert not here.thread.is_alive()
        assert seed_of(asked[0].result().json()["data"][0]["b64_json"]) == 0
    for answer in answers.values():
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert int(answer.headers["retry-after"]) >= 1
    assert len(fake.asked) == 1
    assert not endpoint.worker.alive


def test_what_runs_past_the_deadline_is_ended(asking):
    fake = FakeGuard(seconds=0.05)
    endpoint = Endpoint(fake, replace(LIMITS, counts=range(1, 1001)))
    with served(endpoint, grace=0.3) as here, ThreadPoolExecutor(1) as pool:
        running = pool.submit(asking(here.address, steps=1000), 1)
        until(lambda: fake.steps > 0)
        here.end()
        assert running.result().status_code == 503
        here.thread.join(10)
        assert not here.thread.is_alive()
    assert fake.steps < 100


def test_while_it_ends_nothing_new_is_taken(client):
    endpoint = Endpoint(FakeGuard(), LIMITS)
    with served(endpoint) as here:
        assert client.get(here.address + "/ready").json() == {"status": "ready"}
        endpoint.leave(1.0)
        for answer in (client.get(here.address + "/ready"), client.post(here.address + PATH, json={"prompt": "a cat"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert client.get(here.address + "/health").status_code == 200


# The worker alone ---------------------------------------------------------------------------------------------------------


def test_a_worker_draws_in_order():
    drawn: list[int] = []
    worker = Worker(lambda o, unwanted: drawn.append(o.seeds[0]) or Drawn([], []), queue=20)
    futures = [worker.submit(order(seed)) for seed in range(20)]
    worker.start()
    for future in futures:
        future.result(10)
    assert drawn == list(range(20))
    worker.leave(1.0)
    worker.join(10.0)
    assert not worker.alive


def test_a_queue_of_none_lets_one_in():
    worker = Worker(lambda o, unwanted: Drawn([], []), queue=0)
    first = worker.submit(order())
    with pytest.raises(Full) as full:
        worker.submit(order())
    assert full.value.seconds == 1
    first.cancel()
    worker.submit(order())
    with pytest.raises(UsageError, match="queue is -1, and must be a whole number from 0"):
        Worker(lambda o, unwanted: Drawn([], []), queue=-1)


def test_the_next_try_is_as_far_off_as_a_generation_takes():
    worker = Worker(lambda o, unwanted: time.sleep(1.1) or Drawn([], []), queue=0)
    worker.start()
    worker.submit(order()).result(20)
    until(lambda: worker.running == 0)
    worker.leave(1.0)
    assert worker._until_room() == 2


@pytest.mark.parametrize(
    ("waiting", "seconds", "told"), [(0, None, 1), (1, 0.001, 1), (3, 2.0, 6), (16, 0.3, 5), (3, None, 3)]
)
def test_the_next_try_is_as_far_off_as_the_queue_is_long(waiting, seconds, told):
    worker = Worker(lambda o, unwanted: Drawn([], []), queue=waiting)
    worker._seconds = seconds
    kept = [worker.submit(order(seed)) for seed in range(waiting)]
    given_up = worker.submit(order())
    given_up.cancel()
    assert worker._until_room() == told
    assert len(kept) == waiting


def test_a_failure_belongs_to_its_order():
    def draw(o: Order, unwanted: object) -> Drawn:
        if o.seeds == (1,):
            raise SystemExit("nobody but this order")
        return Drawn([], [])

    worker = Worker(draw, queue=3)
    worker.start()
    futures = [worker.submit(order(seed)) for seed in range(3)]
    assert futures[0].result(10)
    with pytest.raises(SystemExit):
        futures[1].result(10)
    assert futures[2].result(10)
    worker.leave(1.0)
    with pytest.raises(Leaving):
        worker.submit(order())
