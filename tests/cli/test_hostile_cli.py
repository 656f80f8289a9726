"""What strangers send is printed: no text of theirs drives the terminal or begins a line of ours."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnemoscope.cli import screen
from mnemoscope.detect.calibrate import Calibration
from mnemoscope.records.schema import Manifest, Nearest, Row, Score
from mnemoscope.records.store import Run, Writer, sample_id

ATTACK = (
    "\x1b]0;title\x07\x1b]8;;http://evil\x1b\\\x1b[2J\x9b2J\u202e\u200b\rmnemoscope: sound\nmnemoscope: sound\u2028"
)
SETTING = {"steps": 50, "guidance": 7.5, "target": {"name": ATTACK, ATTACK: ATTACK}, ATTACK: ATTACK}


@pytest.fixture
def clean(run):
    """``clean(*words)``: exit code, stdout and stderr of a command; both must be clean."""

    def call(*words: object) -> tuple[int, str, str]:
        code, out, err = run(*words)
        for text in (out, err):
            hidden = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n", "\t"}
            assert not hidden, (words, text)
            if not logging.root.isEnabledFor(logging.DEBUG):  # tracebacks keep the lines of a message
                assert not any(line.startswith("mnemoscope: sound") for line in text.splitlines())
        return code, out, err

    return call


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Path:
    """A run in which every text is an attack."""
    monkeypatch.chdir(tmp_path)
    facts = {"command": ATTACK, "notes": [ATTACK], "accepted": [ATTACK], "target": {"name": ATTACK}, "asked": 5}
    more = {"config": {"model": ATTACK, "seeds": 1, ATTACK: ATTACK}, "setting": SETTING, "versions": {ATTACK: ATTACK}}
    kept = Run.open(Path("runs/hostile"), Manifest(status="done", machine={ATTACK: ATTACK}, **facts, **more))
    rows = []
    for i in range(5):
        prompt = f"{ATTACK} {i}"
        head = {"id": sample_id(prompt, 0, SETTING), "prompt_id": prompt, "prompt": prompt, "seed": 0, "group": ATTACK}
        if i == 4:
            rows.append(Row(**head, status="error", error=ATTACK, note=ATTACK))
            continue
        near = Nearest(reference=ATTACK, similarity=0.95, descriptor=ATTACK, threshold=0.9, copy_found=True)
        score = Score(value=float(i), space="eps", per_step=[float(i)])
        rows.append(Row(**head, status="ok", scores={"magnitude": score, ATTACK: score}, nearest=near, note=ATTACK))
    with Writer(kept) as writer:
        writer.append(rows)
    made = Calibration.fit([1.0, 2.0], SETTING, detector="magnitude", fpr=0.5, source=ATTACK)
    made.save(kept.folder / "thresholds.json")
    return kept.folder


def test_a_run_and_its_packet(clean, hostile):
    code, out, err = clean("report", hostile)
    assert (code, out) == (0, f"{hostile}/report.html\n"), err
    assert clean("pack", hostile)[0] == 0
    for words in (["verify", "runs/hostile.packet.zip"], ["replay", hostile], ["replay", "runs/hostile.packet.zip"]):
        for how in ([], ["--json"]):
            clean(*words, *how)
    with open(hostile / "samples.jsonl", "a") as file:
        file.write(json.dumps({"id": ATTACK, ATTACK: ATTACK}) + "\n")
    for words in (["report"], ["pack"], ["replay"], ["-vv", "report"]):
        code, _, err = clean(*words, hostile)
        assert code in (0, 2), err


def test_a_summary_on_every_terminal(hostile, capsys, monkeypatch):
    """What ``mnemoscope audit`` and ``demo`` end with, piped and drawn."""
    from mnemoscope.report.summary import read_summary

    monkeypatch.setattr(screen, "QUIET", False)
    summary = read_summary(hostile)
    screen.show_summary(summary)
    out, err = capsys.readouterr()
    assert "␛]0;title␇␛]8;;http://evil␛\\␛[2J⟨U+009B⟩2J⟨U+202E⟩⟨U+200B⟩ mnemoscope: sound mnemoscope: sound" in out
    screen.show_json(summary.to_dict())
    document = capsys.readouterr().out
    assert json.loads(document) == summary.to_dict()
    for text in (out, err, document):
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\n\t" for c in text)
        assert not any(line.startswith("mnemoscope: sound") for line in text.splitlines())


def test_a_gate(clean, hostile):
    rules = [
        {"name": ATTACK, "metric": "copies.share", "max": 0.05},
        {"name": "above", "metric": "detect.magnitude.share", "max": 0},
    ]
    Path("p.yaml").write_text(json.dumps({"version": 1, "rules": rules}))
    for how in ([], ["--json"], ["--dry-run"]):
        code, out, err = clean("gate", hostile, "--policy", "p.yaml", *how)
        assert code in (0, 1, 3), err
        assert "sound" in out
    Path("p.yaml").write_text(json.dumps({"version": 1, ATTACK: ATTACK}))
    assert clean("gate", hostile, "--policy", "p.yaml")[0] == 2


def test_an_index(clean, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        name = ATTACK.replace("/", "") + f"{i // 2}{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR).save(folder / name)
    (folder / f"{ATTACK.replace('/', '')}.png").write_bytes(b"no picture")
    assert clean("index", "build", "pictures", "--out", "refs", "--descriptor", "pixels")[0] == 0
    for how in ([], ["--json"]):
        code, out, err = clean("index", "query", "refs", "pictures", *how)
        assert (code, "title" in out) == (0, True), err
        assert clean("index", "info", "refs", *how)[0] == 0
        assert clean("duplicates", "refs", "--out", "dup", "--threshold", "0.2", *how)[0] == 0


def test_words_of_a_command(clean, tmp_path, monkeypatch):
    """What is typed may have been copied from somewhere, and errors repeat it."""
    monkeypatch.chdir(tmp_path)
    for words in ([ATTACK], ["ls", ATTACK], ["ls", "prompts", "--group", ATTACK], ["report", ATTACK], ["check", ATTACK, "x"],
                  ["verify", ATTACK], ["view", ATTACK, "--host", ATTACK], ["audit", "demo", f"--{ATTACK}"], ["index", "info", ATTACK],
                  ["explain", "demo", "x", "--at", ATTACK], ["audit", "--config", ATTACK]):  # fmt: skip
        assert clean(*words)[0] == 2
        assert clean("-vv", *words)[0] == 2
    assert clean("check", "demo", ATTACK, "--seeds", "1")[0] == 0
