"""Ctrl-C and SIGTERM, whenever they come: the documented exit code, one line, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mnemoscope
from mnemoscope import interrupts

SENDS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
except BaseException as e:
    raise ImportError("this module is broken") from e
"""
"""A module that gets a signal while it is imported, and turns it into an error of its own."""

START = """
import signal
signal.signal(signal.SIGINT, signal.{handler})  # whoever starts this in the background has it ignored
from mnemoscope.__main__ import main
main()
"""


def start(folder: Path, *words: str, handler: str = "default_int_handler") -> tuple[int, str, str]:
    """A command that finds the modules of a folder first."""
    paths = [str(folder), str(Path(mnemoscope.__file__).parents[1])]
    process = subprocess.run(
        [sys.executable, "-c", START.format(handler=handler), *words], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=folder, check=False,
    )  # fmt: skip
    return process.returncode, process.stdout, process.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
@pytest.mark.parametrize(
    ("module", "words"), [("typer", ["--help"]), ("torch", ["doctor"]), ("yaml", ["gate", "none", "--policy", "p"])]
)
def test_ctrl_c_while_modules_load_is_one_line(tmp_path, module, words):
    (tmp_path / f"{module}.py").write_text(SENDS.format(name="SIGINT"))
    (tmp_path / "p").write_text("version: 1\nrules: []\n")
    code, out, err = start(tmp_path, *words)
    assert (code, out, err) == (130, "", "mnemoscope: stopped\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_where_ctrl_c_is_ignored_it_stays_ignored(tmp_path):
    (tmp_path / "typer.py").write_text(SENDS.format(name="SIGINT") + "raise SystemExit(7)\n")
    assert start(tmp_path, "--help", handler="SIG_IGN") == (7, "", "")


@pytest.mark.parametrize("error", [RuntimeError("a broken model"), ImportError("a broken module"), KeyboardInterrupt()])
def test_whatever_error_follows_ctrl_c_comes_of_it(run, monkeypatch, error):
    def fail() -> None:
        monkeypatch.setattr(interrupts, "_came", True)
        raise error

    monkeypatch.setattr("mnemoscope.cli.doctor.examine", fail)
    assert run("doctor") == (130, "", "mnemoscope: stopped\n")


@pytest.fixture
def taken(monkeypatch):
    """Ctrl-C as a command has it, and what the process would end with."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(os, "write", lambda *_: 0)
    monkeypatch.setattr(interrupts, "_loads", False)
    monkeypatch.setattr(interrupts, "_came", False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.take()
    interrupts.take_terminate()
    yield codes
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_a_process_that_loads_ends_at_once_and_one_that_works_is_told(taken):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # ends at once first, which the test prevents
    assert taken == [130]
    interrupts.end_loading()
    with interrupts.loading(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert taken == [130, 130]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert taken == [130, 130]
    assert interrupts.came()


def test_sigterm_ends_a_server_with_0(taken):
    for loads, ends in ((interrupts.begin_loading, [0]), (interrupts.end_loading, [])):
        taken.clear()
        loads()
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGTERM)
        assert (end.value.code, taken) == (0, ends)


def test_whoever_ends_already_is_not_ended_otherwise(taken):
    interrupts.ignore()
    interrupts.begin_loading()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    assert taken == []
    signal.signal(signal.SIGINT, before := signal.default_int_handler)
    interrupts.ignore()  # as in a program that uses mnemoscope as a library
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_is_opened_within_a_span_that_ends_at_once(monkeypatch):
    from mnemoscope.models import sources
    from mnemoscope.models.load import open_pipeline

    seen = []

    class End(Exception):
        pass

    def look(*_: object) -> None:
        seen.append(interrupts._loads)
        raise End

    monkeypatch.setattr(interrupts, "_loads", False)
    monkeypatch.setattr(sources, "locate", look)
    with pytest.raises(End):
        open_pipeline("demo", device="cpu")
    assert (seen, interrupts._loads) == ([True], False)
