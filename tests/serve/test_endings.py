"""How `mnemoscope serve` ends, and goes on after SIGHUP, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from fake_guard import LIMITS, FakeGuard, until

from mnemoscope.cli import main
from mnemoscope.cli import serve as command
from mnemoscope.cli.serve import LogFile
from mnemoscope.cli.view import bound
from mnemoscope.errors import UsageError
from mnemoscope.serve.app import Endpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

PATH = "/v1/images/generations"
CODE = """
import sys, torch
from fake_guard import LIMITS, FakeGuard
from mnemoscope.cli import main, serve
from mnemoscope.serve.app import Endpoint

class Computing(FakeGuard):
    '''Its step lasts longer than anybody waits, inside native code; it logs what it is asked for.'''

    def draw(self, prompt, *given):
        self.log.write(prompt + chr(10))
        if prompt == "long":
            a = torch.rand(1500, 1500)
            while True:
                a = a @ a
        return super().draw(prompt, *given)

def opened(model, thresholds, guarding, limiting, loading, serving):
    fake = Computing()
    fake.log = guarding["log"]
    return Endpoint(fake, LIMITS, **serving)

serve._open = opened
sys.argv = ["mnemoscope", "serve", "demo", "--port", "0", *sys.argv[1:]]
main.main()
"""


@contextmanager
def serving(folder, *words):
    """The command with a guard that may take for ever; gives the process and its address."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", CODE, "--log", str(folder / "log"), *words]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment, cwd=folder) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip().removesuffix("/")
        finally:
            process.kill()


class Visitor(threading.Thread):
    """Asks for a picture that takes for ever."""

    def __init__(self, address: str):
        super().__init__()
        self.address = address
        self.start()

    def run(self) -> None:
        with httpx2.Client(trust_env=False, timeout=60) as client:
            self.answer = client.post(self.address + PATH, json={"prompt": "long"})


def ended_well(process: subprocess.Popen[str], visitor: Visitor) -> None:
    assert process.wait(60) == 0
    visitor.join(10)
    assert visitor.answer.status_code == 503
    assert json.loads(visitor.answer.text)["error"]["code"] == "shutting_down"
    talk = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in talk
    assert "terminate" not in talk


def test_after_sighup_the_log_is_a_new_file_and_a_second_interrupt_ends_it_at_once(tmp_path):
    log, moved = tmp_path / "log", tmp_path / "log.1"
    with serving(tmp_path, "--grace", "60") as (process, address), httpx2.Client(trust_env=False, timeout=60) as client:
        assert client.post(address + PATH, json={"prompt": "before"}).status_code == 200
        log.rename(moved)
        assert client.post(address + PATH, json={"prompt": "between"}).status_code == 200
        process.send_signal(signal.SIGHUP)
        until(log.exists)
        visitor = Visitor(address)
        until(lambda: log.read_text() == "long\n")
        assert moved.read_text() == "before\nbetween\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)  # two that come together would be one
        ended_well(process, visitor)


def test_a_step_that_outlasts_the_grace_is_left_behind(monkeypatch, capsys):
    """In this process, so that ending it is only noted."""
    fake, codes, visitors = FakeGuard(), [], []
    fake.go.clear()
    monkeypatch.setattr(command, "_open", lambda *given: Endpoint(fake, LIMITS, **given[-1]))
    monkeypatch.setattr(command.output, "end_process", codes.append)
    listening = bound("127.0.0.1", 0)
    monkeypatch.setattr(command, "bound", lambda *_: listening)
    monkeypatch.setattr(sys, "argv", ["mnemoscope", "serve", "demo", "--grace", "0"])

    def visit() -> None:
        visitors.append(Visitor(f"http://127.0.0.1:{listening.getsockname()[1]}"))
        until(lambda: fake.inside)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=visit).start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main.main()
    finally:
        signal.signal(signal.SIGTERM, before)
        fake.go.set()
    assert (end.value.code, codes) == (0, [0])
    visitors[0].join(20)
    assert visitors[0].answer.status_code == 503
    assert "Traceback" not in capsys.readouterr().err


def test_a_log_that_cannot_be_opened_again_goes_on_where_it_was(tmp_path, caplog):
    folder = tmp_path / "logs"
    folder.mkdir()
    with LogFile(folder / "log") as log:
        folder.rename(tmp_path / "moved")
        log.open_again(1, None)
        log.write("a line\n")
    assert (tmp_path / "moved" / "log").read_text() == "a line\n"
    assert "the log was not opened again: No such file or directory" in caplog.text
    with pytest.raises(UsageError, match=r"--log .* cannot be written"):
        LogFile(folder / "log")
