"""What the tests of the commands share."""

import logging
import sys

import pytest

from mnemoscope.cli import main as cli
from mnemoscope.cli import screen


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command in this process; gives exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnemoscope", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    monkeypatch.setattr(screen, "QUIET", False)
    level, handlers = logging.root.level, logging.root.handlers[:]
    yield call
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers
