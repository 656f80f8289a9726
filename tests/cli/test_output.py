"""What passes the filter of all output: no secret ever, and no prompt while strangers' prompts are served."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import traceback
import warnings

import pytest

from mnemoscope.cli import output, screen
from mnemoscope.errors import UsageError

MARKER = "zanzibar"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The filter is of a process; other tests share this one."""
    for module, name in ((warnings, "formatwarning"), (sys, "excepthook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    factory, library = logging.getLogRecordFactory(), logging.getLogger("a_library")
    yield
    logging.setLogRecordFactory(factory)
    library.handlers, library.propagate = [], True


@pytest.fixture
def plain(monkeypatch):
    """Call it in a test: logs as they are without pytest, whose handlers come after fixtures."""
    return lambda *handlers: monkeypatch.setattr(logging.root, "handlers", list(handlers))


def fail() -> None:
    try:
        raise KeyError(MARKER)
    except KeyError as e:
        raise ValueError(f"cannot draw {MARKER}") from e


def says(logger: str) -> None:
    """Everything that code can say, in a logger's name."""
    log = logging.getLogger(logger)
    log.warning(f"cut off: {MARKER}")
    log.warning("cut off: %s", MARKER)
    log.warning("%d is no number", MARKER)
    log.info("%s", MARKER)
    try:
        fail()
    except ValueError:
        log.exception("it failed with %s", MARKER)
        traceback.print_exc()
        print(MARKER)
    print(MARKER, file=sys.stderr)
    print(warnings.formatwarning(UserWarning(MARKER), UserWarning, __file__, 1), file=sys.stderr)


async def forgets() -> None:
    task = asyncio.ensure_future(asyncio.to_thread(fail))
    await asyncio.wait([task])


def test_what_libraries_say_is_not_shown_while_prompts_are_served(capfd, plain):
    plain()
    library = logging.getLogger("a_library")  # as diffusers is, with a handler for the stream as it was
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    with output.without_prompts():
        says("a_library")
        says("another_library")
        asyncio.run(forgets())
        gc.collect()
        logging.getLogger("mnemoscope.serve").warning("drift: %s", "is shown")
        screen.say("so is this")
    out, err = capfd.readouterr()
    assert MARKER not in out + err
    assert "a message of a_library (test_output.py:" in err
    assert "fail\n" in err
    assert "ValueError, whose message is not shown" in err
    assert "WARNING mnemoscope.serve: drift: is shown" in err
    assert "so is this" in err
    print("shown again")
    assert capfd.readouterr().out == "shown again\n"


def test_a_place_that_prints_again_and_again_is_named_once(capfd, plain):
    plain()
    with output.without_prompts():
        for _ in range(3):
            print(MARKER)
    err = capfd.readouterr().err
    assert err.count("wrote to stdout") == 1
    assert MARKER not in err


def test_a_server_that_fails_says_where_and_not_on_what(capfd, plain):
    plain()
    with pytest.raises(SystemExit) as end, output.without_prompts():
        fail()
    assert end.value.code == 1
    err = capfd.readouterr().err
    assert "ValueError, whose message is not shown" in err
    assert MARKER not in err
    for error in (UsageError("a sentence"), SystemExit(0), KeyboardInterrupt()):
        with pytest.raises(type(error)), output.without_prompts():
            raise error
        assert not isinstance(sys.stderr, output._Unshown)


def test_no_secret_passes_logs_warnings_and_errors(capsys, monkeypatch, plain):
    plain(logging.StreamHandler(sys.stderr))
    monkeypatch.setenv("HF_TOKEN", "hf_a-word-of-the-hub")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    output.filtered()
    output.filtered()
    log = logging.getLogger("a_library")
    log.warning("GET https://me:pass@host with %s", "hf_a-word-of-the-hub")
    log.warning("100 % with {'token': 'abc'}")
    try:
        raise ValueError("token=hf_a-word-of-the-hub")
    except ValueError as e:
        log.exception("failed")
        sys.excepthook(type(e), e, e.__traceback__)
    print(warnings.formatwarning(UserWarning("token=abc"), UserWarning, "file.py", 3, ""), file=sys.stderr)
    screen.fail("https://me:pass@host cannot be reached")
    err = capsys.readouterr().err
    assert "me:pass" not in err
    assert "word-of-the-hub" not in err
    assert "abc" not in err
    assert err.count("Traceback (most recent call last)") == 2
