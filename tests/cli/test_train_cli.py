"""``mnemoscope train``: what a person types, and what comes out."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three pictures with captions, and one that is too small; the model beside them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, side in enumerate((16, 16, 20, 8)):
        image = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture
def model(build_pipe, tmp_path):
    build_pipe("sd").save_pretrained(tmp_path / "model")
    return "model"


def test_a_dry_run_trains_nothing(run, pictures, model, tmp_path):
    words = ["train", model, "pictures", "--steps", 6, "--batch-size", 2, "--filter", 2, "--dry-run"]
    code, out, _ = run(*words)
    assert code == 0
    assert "3.png\ttoo small: 8 × 8 pixels" in out
    assert "3 pictures, 2 per step, each visited 4.0 times" in out
    assert "24 forwards (F) and 12 backward passes (B)" in out
    found = json.loads(run(*words, "--lora", 2, "--json")[1])
    assert found["settings"]["filter"] == 2
    assert found["settings"]["lr"] == 1e-4
    assert found["settings"]["resolution"] == 16
    assert [p["id"] for p in found["problems"]] == ["3.png"]
    assert 0 < found["parameters"] < 10_000
    assert not (tmp_path / "runs").exists()


def test_a_training_tells_what_it_made(run, pictures, model):
    words = ["train", model, "pictures", "--out", "made", "--steps", 2, "--batch-size", 2, "--device", "cpu"]
    words += ["--filter", "1e9"]
    code, out, err = run(*words)
    assert code == 0
    assert "Left out: 1 too small" in err
    assert "2/2 steps, loss " in err
    assert ", 100 % kept" in err
    assert "3.png\ttoo small" in out
    assert "2 steps on 3 pictures; loss " in out
    assert "Result: made/pipeline   Card: made/README.md" in out
    found = json.loads(run(*words, "--json")[1])  # the same command finds everything done
    assert (found["steps"], found["pictures"], found["left_out"], found["kept"]) == (2, 3, 1, 1)
    code, _, err = run(*words, "--seed", 1)
    assert code == 2
    assert "seed: was 0, now 1" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", 0], "'--steps': it is '0', and must be a whole number from 1 to 1,000,000,000"),
        (["--augment", "shuffle"], "augment is 'shuffle', and must be one of random-tokens"),
        (["--canaries", "3"], "canaries is '3', and must be copies:number pairs"),
        (["--dedupe", "all"], "dedupe is 'all'"),
    ],
)
def test_bad_settings_are_one_sentence(run, words, sentence):
    code, out, err = run("train", "demo", "pictures", *words)
    assert code == 2
    assert sentence in err
    assert out == ""


@pytest.mark.parametrize(("package", "words"), [("accelerate", []), ("peft", ["--lora", 2])])
def test_a_missing_package_is_named_with_its_cure(run, monkeypatch, package, words):
    import importlib.util

    found = importlib.util.find_spec
    for name in [m for m in sys.modules if m.startswith("mnemoscope.train")]:
        monkeypatch.delitem(sys.modules, name)
    if package == "accelerate":
        monkeypatch.setitem(sys.modules, package, None)
    else:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
        )
    code, _, err = run("train", "demo", "pictures", *words)
    assert code == 2
    assert f"needs {package}, which is not installed" in err
    assert "pip install 'mnemoscope[train]'" in err


def test_help_has_an_example_and_every_option_is_a_setting(run):
    from mnemoscope.train.config import TrainConfig

    code, out, _ = run("train", "--help")
    assert code == 0
    assert "Example: mnemoscope train MODEL pictures" in out
    renamed = {"validation_prompts": "--validation-prompt ", "model_options": "--model-option "}
    silent = {
        "model",
        "data",
        "weight_decay",
        "clip",
        "ema_decay",
        "filter_ranges",
    }  # arguments; settings of Python alone
    names = {name: renamed.get(name, "--" + name.replace("_", "-")) for name in set(TrainConfig.model_fields) - silent}
    assert [name for name, option in names.items() if option.strip() not in out] == []


def test_settings_bring_no_torch():
    code = "import sys; from mnemoscope.train import TrainConfig; import mnemoscope.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
