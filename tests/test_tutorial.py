"""The tutorial on LoRAs: its Python block and its commands are run in order, as they stand, on a smaller budget."""

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from mnemoscope.cli import main as cli

PAGE = (Path(__file__).parent.parent / "docs" / "lora.md").read_text(encoding="utf-8")
SMALLER = {
    "mnemoscope train": ["--steps", "2"],
    "mnemoscope audit": ["--seeds", "1", "--steps", "3", "--limit", "4"],
    "mnemoscope report": [],
}
"""What each command is given besides, so that a test takes seconds; the later of two options counts."""


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    assert len(list(Path("pictures").glob("*.png"))) == 20
    commands = re.findall(r"^    (mnemoscope .*)$", PAGE, re.MULTILINE)
    assert [c.split()[1] for c in commands] == ["train", "audit", "audit", "report"]
    for command in commands:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [*words, *SMALLER[" ".join(words[:2])]])
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, command
    found = [json.loads(line) for line in Path("runs/lora-audit/samples.jsonl").read_text().splitlines()]
    assert len(found) == 4
    assert all(
        row["nearest"]["reference"].endswith(".png") and row["nearest"]["copy_found"] is not None for row in found
    )
    assert "Memorization audits, compared" in Path("runs/compared.html").read_text(encoding="utf-8")
