"""What reaches a terminal: texts written out, streams that are guarded, and no writer that goes past them."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tqdm
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.cli import screen
from mnemoscope.terminal import Guarded, json_safe, one_line, visible

SRC = Path(__file__).parents[1] / "src" / "mnemoscope"
DIRECTION = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ATTACK = "\x1b]0;title\x07\x1b]52;c;AAAA\x07\x1b]8;;http://evil\x1b\\\x1b[2J\x9b2J\x90\x08\x7f\u202e\u200b\u2028\ufff9\U000e0041\ud800"


def dangerous(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in DIRECTION


@given(st.text(st.characters(categories=None)) | st.text(st.sampled_from(ATTACK + "a\u200c\u200d\n\t\r👩🏽é")))
def test_written_out_text_has_no_hidden_characters(text):
    shown = visible(text)
    assert not any(dangerous(c) for c in shown if c not in "\n\t")
    assert visible(shown) == shown
    line = one_line(text)
    assert not any(dangerous(c) for c in line)
    assert one_line(line) == line
    shown.encode()


# Letters and marks that nobody sees: fillers, and selectors in which a text can be hidden.
UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0" + "".join(
    map(chr, [*range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0)])
)


def test_letters_and_marks_that_nobody_sees_are_written_out():
    for character in UNSEEN:
        assert visible(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"], exclude_characters=UNSEEN)))
def test_ordinary_text_stays_as_it_is(text):
    assert visible(text) == text
    assert json_safe(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",
        "क्\u200dष",
        "👩🏽\u200d🚀",
        "🏳️\u200d🌈",
        "مرحبا שלום",
        "Ấ e\u0301",
        "日本語　全角",
        "1\u202f234 \u00a0€",
        "١٢\u06dd",
    ],
)
def test_scripts_and_emoji_stay_whole(text):
    assert one_line(text) == text


def test_what_is_written_out_can_be_read():
    assert visible("a\x1b[2J\x7f\x9b\u202e\ud800\U000e0041\r\n\t") == "a␛[2J␡⟨U+009B⟩⟨U+202E⟩⟨U+D800⟩⟨U+E0041⟩␍\n\t"
    assert one_line("a\r\nmnemoscope: fine\u2028b\tc\x0bd") == "a mnemoscope: fine b c d"
    assert visible("\u200da \u200d!\u200c") == "⟨U+200D⟩a ⟨U+200D⟩!⟨U+200C⟩"  # nothing there to join


@given(st.text(st.characters(categories=None)))
def test_json_is_the_same_document(text):
    document = json_safe(json.dumps({text: [text]}, ensure_ascii=False))
    assert not any(dangerous(c) for c in document)
    assert json.loads(document) == {text: [text]}


# Streams ------------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [io.StringIO, Terminal])
def test_every_writer_is_cleaned(monkeypatch, terminal):
    """Whoever writes: print, logging, a traceback."""
    out = terminal()
    monkeypatch.setattr(sys, "stderr", Guarded(out))
    print(ATTACK, "\rb", file=sys.stderr)
    logging.StreamHandler().emit(logging.LogRecord("x", 50, "x", 1, ATTACK, (), None))
    try:
        raise ValueError(ATTACK)
    except ValueError:
        sys.excepthook(*sys.exc_info())
    said = out.getvalue()
    assert said.count("␛]0;title␇") == 3
    assert not any(dangerous(c) for c in said if c != "\n")


def test_no_bytes_pass_by():
    stream = Guarded(io.TextIOWrapper(io.BytesIO()))
    assert not hasattr(stream, "buffer")
    with pytest.raises(TypeError):
        stream.write(b"\x1b")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "a?? ?"), ("latin-1", "aé? ?"), ("utf-8", "aé… ⟨U+DC80⟩")])
def test_what_the_encoding_lacks_is_replaced(encoding, shown):
    under = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    Guarded(under).write("aé… \udc80")
    assert under.buffer.getvalue().decode(encoding) == shown.replace(" ?", " ?U+DC80?")


def test_progress_bars_are_drawn_over_themselves():
    """Byte for byte what tqdm draws, nested bars and all."""

    def draw(stream):
        for _ in tqdm.tqdm(range(3), file=stream, desc="files", mininterval=0, bar_format="{desc} {n}"):
            for _ in tqdm.tqdm(
                range(2), file=stream, desc="bytes", mininterval=0, leave=False, bar_format="{desc} {n}"
            ):
                pass
        return stream

    assert draw(Guarded(Terminal())).getvalue() == draw(Terminal()).getvalue()
    assert "\x1b[A" in draw(Terminal()).getvalue()
    hostile = Guarded(Terminal())
    tqdm.tqdm(total=1, file=hostile, desc="\x1b[2J", bar_format="{desc}").close()
    assert "\x1b" not in hostile.getvalue()


def test_nothing_but_a_bar_is_overwritten():
    stream = Guarded(Terminal())
    for part in (
        "fault: 1\n",
        "\x1b[A",
        "sound\n",
        "fault: 2",
        "\rsound",
        "\n",
        "\x1b[A",
        "\n\n",
        "\x1b[A" * 3,
        "\x1b[2J",
    ):
        stream.write(part)
    assert stream.getvalue() == "fault: 1\n␛[Asound\nfault: 2␍sound\n␛[A\n\n␛[A␛[A␛[A␛[2J"


@pytest.mark.parametrize("text", ["[red]a[/red]", "[link=http://evil]a[/link]", ":smile:", ATTACK])
def test_a_table_and_a_bar_mean_nothing_but_their_text(monkeypatch, text):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(screen, "QUIET", False)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Guarded(Terminal()))
    screen.table([text], [[text]])
    with screen.progress(text) as update:
        update(_Done(text))
        print(text, file=sys.stderr)
        print(text, end="", file=sys.stderr, flush=True)
    for stream, times in ((sys.stdout, 2), (sys.stderr, 4)):
        drawn = re.sub(
            r"\x1b\[[\d;]*[mAK]|\x1b\[\?25[lh]|\r", "", stream.getvalue()
        )  # rich's own: styles, and the bar's moves
        assert drawn.count(one_line(text)) >= times
        assert not any(dangerous(c) for c in drawn if c != "\n")


class _Done:
    done, asked, hits, errors, eta = 1, 2, 0, 0, None

    def __init__(self, text):
        self.note = self.talk = text


# Nobody goes past -----------------------------------------------------------------------------------------------------------

PROGRAMS = {"lab", "demo/build.py", "demo/train.py", "demo/train_judges.py"}
"""Programs of their own, whose main functions guard the streams first."""


@pytest.mark.parametrize("file", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_only_screen_prints(file):
    """Elsewhere a value could begin a line of ours, and a writer of bytes or of escape sequences could go past the guard."""
    name = file.relative_to(SRC).as_posix()
    if name in ("cli/screen.py", "cli/output.py", "terminal.py") or PROGRAMS & {name, name.split("/")[0]}:
        return
    used = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id=called)):
                used.add(called)
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute):
                used.add(f"{owner}.{attribute}")
            case ast.ImportFrom(module=module):
                used.add(module)
    allowed = {"sys.stdout"} if name == "cli/main.py" else set()  # whose number is needed where a pipe broke
    forbidden = {"print", "input", "typer.echo", "typer.secho", "click.echo", "sys.stdout", "sys.stderr", "sys.__stdout__",
                 "sys.__stderr__", "traceback.print_exc", "rich.console", "pprint"}  # fmt: skip
    assert not used & (forbidden - allowed)


def test_programs_guard_their_streams():
    files = ["lab/__main__.py", "cli/main.py", *(p for p in PROGRAMS if p.endswith(".py"))]
    for name in files:
        main = next(n for n in ast.parse((SRC / name).read_text("utf-8")).body if getattr(n, "name", "") == "main")
        assert ast.unparse(main.body[1]) == "guard()", name


def test_the_whole_command_on_a_narrow_stdout(tmp_path):
    """An argument that is no UTF-8, and a stdout that is ASCII: one sentence, and a document that is the same."""
    name = b"\x1b[2J\xff\xe2\x80\xae.zip"
    command = [sys.executable, "-m", "mnemoscope", "verify", "--json", name]
    for encoding in ("ascii", "utf-8"):
        env = {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONPATH": str(SRC.parent), "PATH": "", "PYTHONUTF8": "1"}
        ended = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env)
        assert ended.returncode == 2
        assert b"Traceback" not in ended.stderr
        assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xff|\xe2\x80\xae", ended.stderr)
