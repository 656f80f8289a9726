"""``mnemoscope explain``: what a person types and reads."""

from __future__ import annotations

import io
import json
import sys

import pytest
from PIL import Image

import mnemoscope
from mnemoscope.cli import main as cli
from mnemoscope.cli import screen
from mnemoscope.cli.explain import bar, read_steps
from mnemoscope.errors import UsageError

PROMPT = "oncoming police car"


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command in this process; gives exit code, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mnemoscope", "explain", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    monkeypatch.setattr(screen, "QUIET", False)
    return call


@pytest.fixture
def tiny(monkeypatch, target_of):
    """Any name loads a tiny random model."""
    monkeypatch.setattr("mnemoscope.models.load.load", lambda *_, **__: target_of("sd"))


def test_words_with_bars_and_a_threshold(run):
    code, out, err = run("demo", PROMPT, "--suggest")
    assert code == 0
    lines = out.splitlines()
    assert "FPR (p = " in lines[0]
    assert lines[1].split("\t") == ["word", "edit", "of the largest", "positions"]
    cells = [line.split("\t") for line in lines[2:5]]
    assert [c[0] for c in cells] == PROMPT.split()
    longest = max(cells, key=lambda c: float(c[1]))
    assert longest[2] == "█" * 24
    assert all(len(c[2]) <= 24 for c in cells)
    assert "→" in out or "nothing to edit" in out
    assert "8 forwards, 4 backward passes" in err


def test_json_holds_everything(run, tmp_path):
    picture = tmp_path / "where.webp"
    options = ["--method", "wen", "--seeds", 2, "--suggest", "--threshold", 0.2, "--regions", picture, "--steps", 4]
    code, out, _ = run("demo", PROMPT, *options, "--json")
    assert code == 0
    found = json.loads(out)
    target = mnemoscope.load("demo")
    again = mnemoscope.explain_prompt(target, PROMPT, method="wen", seeds=2, steps=4)
    assert [w["value"] for w in found["words"]] == pytest.approx([w.value for w in again.words], rel=1e-4)
    assert found["method"] == "wen"
    assert found["p"] is None
    assert found["suggestion"]["threshold"] == 0.2
    assert found["regions"]["file"] == str(picture)
    assert Image.open(io.BytesIO(picture.read_bytes())).format == "WEBP"
    assert "seed 1: strongest at" in found["regions"]["alt"]


@pytest.mark.usefixtures("tiny")
def test_end_and_padding_are_shown_on_request(run):
    assert "end and padding" not in run("any", "a cat")[1]
    assert "end and padding" in run("any", "a cat", "--special")[1]


@pytest.mark.usefixtures("tiny")
def test_the_empty_prompt_has_no_words(run):
    code, out, _ = run("any", "")
    assert code == 0
    assert "no words: the empty prompt is the null prompt" in out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "wenn"], "Did you mean 'wen'?"),
        (["--at", "first"], "write 0, 0-9 or 0,10,49"),
        (["--at", "9-0"], "empty range"),
        (["--at", "50"], "0 to 49"),
        (["--seeds", "0"], "must be a whole number from 1"),
        (["--suggest"], "needs a threshold"),
        (["--regions", "x.webp", "--kind", "scor"], "Did you mean 'score'?"),
        (["--model-option", "revision"], "write name=value"),
    ],
)
def test_one_sentence_for_each_mistake(run, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("any", "a cat", *words)
    assert code == 2
    assert sentence in err.splitlines()[-1]
    assert not (tmp_path / "x.webp").exists()


def test_steps_are_read():
    assert read_steps("0") == (0,)
    assert read_steps("0-3, 10") == (0, 1, 2, 3, 10)
    assert read_steps("5,5,1") == (1, 5)
    with pytest.raises(UsageError):
        read_steps("")


def test_bars_say_which_way(monkeypatch):
    assert (bar(1.0), bar(0.5), bar(-0.25), bar(0.0)) == ("█" * 24, "█" * 12, "░" * 6, "")
    monkeypatch.setattr("mnemoscope.cli.explain._speaks_unicode", lambda: False)
    assert (bar(1.0), bar(-0.25)) == ("#" * 24, "-" * 6)
