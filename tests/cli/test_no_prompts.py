"""What a served model leaves behind: nothing of what strangers send is in any output, whether it is drawn, cut off or fails."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

MARKER = "zanzibar"
"""Part of everything that is sent."""

KEY = "a-key-that-is-not-printed"

LONG = " ".join(f"{MARKER}{i}" for i in range(150))
"""More tokens than any text encoder takes, which diffusers remarks on."""

ODD = [
    f"{MARKER} \u0000 \u001b[31m \u202e \ud7ff \U0001f600\u200d\U0001f469 {MARKER}",
    MARKER + "́" * 500,
    f"{MARKER} " + "\\" * 300 + "%s %d {0} %(x)s",
]

BROKEN = [
    f'{{"prompt": "{MARKER}'.encode(),
    f'{{"prompt": "{MARKER} \\ud800"}}'.encode(),
    MARKER.encode() + b"\xff\xfe",
    json.dumps({"prompt": MARKER * 100_000}).encode(),
]
"""What is no JSON, no text, or far too large."""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@contextmanager
def command(*words: str, out: Path, **variables: str) -> Iterator[tuple[str, int]]:
    """Run a command that serves, with its output in a file; hands out host and port, and ends it."""
    code = "from mnemoscope.cli.main import main; main()"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default", **variables}
    with (
        (out / "stderr").open("wb") as err,
        subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=err, cwd=out, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 120)[0], (out / "stderr").read_text()
            place = urlsplit(process.stdout.readline().decode().strip())
            assert place.hostname, (out / "stderr").read_text()
            assert place.port
            yield place.hostname, place.port
        finally:
            process.send_signal(signal.SIGINT)
            (out / "stdout").write_bytes(process.stdout.read())
        assert process.wait(60) == 0, (out / "stderr").read_text()


def sent(place: tuple[str, int], head: str, body: bytes = b"", *, wait: bool = True) -> bytes:
    """One request as it stands; the answer."""
    with socket.create_connection(place, timeout=120) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + body)
        if not wait:
            return b""
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def posted(
    place: tuple[str, int],
    path: str,
    body: bytes,
    *,
    kind: str = "application/json",
    method: str = "POST",
    wait: bool = True,
) -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\nHost: {place[0]}:{place[1]}\nContent-Type: {kind}\nContent-Length: {len(body)}\n"
        f"Authorization: Bearer {KEY}\nX-Note: {MARKER}\nConnection: close\n\n"
    )
    return sent(place, head, body, wait=wait)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def prints(folder: Path) -> str:
    """Everything that was written."""
    return "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in folder.rglob("*") if p.is_file())


def test_serve_prints_nothing_that_is_sent(tmp_path: Path) -> None:
    words = "-vv serve demo --port 0 --steps 2 --max-steps 5 --thresholds 0.01 --on-hit mitigate --device cpu --log guard.jsonl"
    path = "/v1/images/generations"
    with command(*words.split(), out=tmp_path, MNEMOSCOPE_API_KEY=KEY) as place:
        for prompt in [LONG, *ODD]:
            body = {"prompt": prompt, "steps": 2, "negative_prompt": prompt}
            assert status(posted(place, path, json.dumps(body).encode())) == 200
        wrong = [
            {"prompt": [MARKER]},
            {"prompt": MARKER, "n": MARKER},
            {"prompt": MARKER, MARKER: 1},
            {"prompt": MARKER, "model": MARKER},
            {"prompt": MARKER * 1000},
            [MARKER],
        ]
        bodies = [*(json.dumps(body).encode() for body in wrong), *BROKEN, b"[" * 10_000 + MARKER.encode()]
        for body in bodies:
            assert status(posted(place, path, body)) >= 400, body[:80]
        assert status(posted(place, path, MARKER.encode(), kind=MARKER)) == 415
        assert status(posted(place, f"/{MARKER}?q={MARKER}", b"{}")) == 404
        assert status(sent(place, f"GET /{MARKER} HTTP/1.1\n{MARKER}\n\n")) == 400
        # Whoever goes away in the middle of a body, and in the middle of a picture.
        posted(place, path, BROKEN[0], wait=False)
        posted(place, path, json.dumps({"prompt": MARKER, "steps": 5}).encode(), wait=False)
        time.sleep(0.5)
    said = prints(tmp_path)
    assert "a message of diffusers" in said
    assert '"action"' in said
    assert not re.search(f"{MARKER}|{KEY}", said, re.IGNORECASE)


def test_studio_prints_nothing_that_is_sent(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    words = "studio --port 0 --steps 3 --seeds 1 --device cpu --host 127.0.0.1"
    join, run = "/gradio_api/queue/join", "/gradio_api/run/predict"
    with command(*words.split(), out=tmp_path, MNEMOSCOPE_STUDIO_TOKEN=KEY) as place:
        config = posted(place, "/config", b"", method="GET")
        handlers = json.loads(config.partition(b"\r\n\r\n")[2])["dependencies"]
        for handler in handlers:
            number, count = handler["id"], len(handler["inputs"])
            for data in ([LONG] * count, [{MARKER: MARKER}] * count, [MARKER]):
                event = {"index": MARKER, MARKER: MARKER}
                body = {"data": data, "fn_index": number, "session_hash": f"{MARKER}{number}", "event_data": event}
                posted(place, join, json.dumps(body).encode())
                posted(place, f"/gradio_api/queue/data?session_hash={MARKER}{number}", b"", method="GET")
                posted(place, run, json.dumps(body).encode())
        for body in [*BROKEN, b'{"data": ["%s"], "fn_index": 999}' % MARKER.encode(), b'["%s"]' % MARKER.encode()]:
            for path in (join, run):
                assert status(posted(place, path, body)) >= 400
        assert status(posted(place, f"/{MARKER}?q={MARKER}", b"{}")) == 404
        posted(place, join, BROKEN[0], wait=False)
    said = prints(tmp_path)
    assert not re.search(f"{MARKER}|{KEY}", said, re.IGNORECASE), said
    assert "Loading demo" in said
