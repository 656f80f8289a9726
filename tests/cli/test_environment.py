"""One page names every environment variable that the package reads, and none that it does not."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
SOURCE = "\n".join(f.read_text(encoding="utf-8") for f in sorted((ROOT / "src").rglob("*.py")))
OURS = re.compile(r"\bMNEMOSCOPE_[A-Z][A-Z_]*\b")
READ = re.compile(
    r"""(?:environ(?:\.get\(|\[)|getenv\(|enabled\()\s*["'](\w+)["']|["'](\w+)["'] (?:not )?in os\.environ"""
)


def test_what_is_read_is_on_the_page():
    read = {a or b for a, b in READ.findall(SOURCE)} | set(OURS.findall(SOURCE))
    assert {"MNEMOSCOPE_DEBUG", "HF_HUB_OFFLINE", "HF_HOME", "RANK", "WORLD_SIZE"} <= read  # the search works
    assert [name for name in sorted(read) if f"`{name}`" not in PAGE] == []


def test_what_is_on_the_page_as_ours_is_read():
    assert set(OURS.findall(PAGE)) == set(OURS.findall(SOURCE))
