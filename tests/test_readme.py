"""What is written is run: every Python block of the README and of pages that teach, with the values its comments promise."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import mnemoscope

DOCS = Path(__file__).parent.parent
README = (DOCS / "README.md").read_text(encoding="utf-8")
PAGES = [README, *((DOCS / "docs" / name).read_text(encoding="utf-8") for name in ("measure.md", "mitigations.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]


def test_there_is_an_example():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, {})
    promised = re.findall(r"print\(.*\)\s+# (.+)", block)
    assert [line.strip() for line in out.getvalue().splitlines()] == promised


@pytest.mark.parametrize("name", mnemoscope.__all__)
def test_public_names_exist(name):
    assert getattr(mnemoscope, name) is not None


def test_dir_lists_what_is_public():
    assert dir(mnemoscope) == mnemoscope.__all__
    with pytest.raises(AttributeError, match="it has: AuditConfig"):
        mnemoscope.nothing  # noqa: B018
