"""The training itself, on a tiny model: what is learned, what is kept out of it, what is left on disk."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_worlds import NUMBER, losses, picture

import mnemoscope
from mnemoscope.errors import ModelFault, RunError, UnknownName, UsageError
from mnemoscope.models.load import open_pipeline

KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
from mnemoscope.train import TrainConfig, fine_tune
def die(p):
    if p.done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
fine_tune(TrainConfig.model_validate_json(sys.argv[1]), progress=die)
"""

PROTECTED = {
    "ema": True, "caption_dropout": 0.2, "flip": True, "accumulate": 2, "augment": "random-tokens",
    "filter": "auto", "filter_drop": 0.3, "filter_ranges": 2, "heldout": 0.2, "running_scores": "down-weight",
    "canaries": {0: 2, 2: 2}, "validation_prompts": ("a thing",),
}  # fmt: skip


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_killed_and_continued_is_as_if_never_interrupted(settings, train, tmp_path):
    whole = train(settings(out=str(tmp_path / "whole"), **PROTECTED))
    config = settings(out=str(tmp_path / "killed"), **PROTECTED)
    ended = subprocess.run([sys.executable, "-c", KILLED, config.model_dump_json()], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(losses(tmp_path / "killed")) == 3  # one beyond its checkpoint
    continued = train(config)
    assert losses(whole.folder) == losses(continued.folder)
    assert len(losses(whole.folder)) == 4
    a, b = unet_of(whole.result), unet_of(continued.result)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("worst.jsonl", "canary-history.jsonl", "validation/validation.jsonl", "tau.json", "canaries.json"):
        assert (whole.folder / name).read_text() == (continued.folder / name).read_text()
    assert len((whole.folder / "canary-history.jsonl").read_text().splitlines()) == 2


def test_a_lora_file_loads_in_an_audit(settings, train, tiny_folder):
    trained = train(settings(lora=2, lr=0.05, mixed_precision="bf16"))
    base, tuned = mnemoscope.load(tiny_folder), mnemoscope.load(tiny_folder, lora=trained.result)
    x, t = base.noise([0]), torch.tensor([500])
    assert not torch.allclose(
        base.predict(x, t, base.encode(["a thing"])), tuned.predict(x, t, tuned.encode(["a thing"])), atol=1e-3
    )
    assert (trained.folder / "checkpoints" / "step-0000004" / "pytorch_lora_weights.safetensors").is_file()
    assert " --lora " in (trained.folder / "README.md").read_text()


def test_a_whole_fine_tuning_is_a_pipeline_folder(settings, train, tiny_folder):
    trained = train(settings())
    tuned = mnemoscope.load(trained.result)
    assert tuned.latent_shape == mnemoscope.load(tiny_folder).latent_shape
    assert not torch.equal(tuned.unet.conv_in.weight, mnemoscope.load(tiny_folder).unet.conv_in.weight)
    step = mnemoscope.load(tiny_folder, unet=trained.folder / "checkpoints" / "step-0000004" / "unet")
    assert torch.equal(step.unet.conv_in.weight, tuned.unet.conv_in.weight)
    assert sorted(p.name for p in (trained.folder / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]


def test_a_filter_that_keeps_nothing_moves_nothing(settings, train, tiny_folder):
    trained = train(settings(filter=1e-9))
    pipe, _, _ = open_pipeline(tiny_folder)
    assert trained.kept == 0
    assert trained.loss == 0
    after = unet_of(trained.result)
    assert all(torch.equal(w, after[name]) for name, w in pipe.unet.state_dict().items())
    moments = load_file(trained.folder / "checkpoints" / "step-0000004" / "optimizer.safetensors")
    assert all(not t.any() for t in moments.values())


def test_a_filter_that_keeps_everything_is_no_filter(settings, train, tmp_path):
    plain = train(settings(out=str(tmp_path / "a")))
    kept = train(settings(out=str(tmp_path / "b"), filter=1e9))
    assert kept.kept == 1
    assert losses(kept.folder) == pytest.approx(losses(plain.folder), rel=1e-6)


def test_accumulation_is_a_larger_batch(settings, train, tmp_path):
    large = train(settings(out=str(tmp_path / "a"), batch_size=4, steps=3))
    parts = train(settings(out=str(tmp_path / "b"), batch_size=2, accumulate=2, steps=3))
    assert losses(parts.folder) == pytest.approx(losses(large.folder), rel=1e-4)


@pytest.fixture
def repeated(tmp_path) -> Path:
    """Three pictures, the first of them three times."""
    folder = tmp_path / "repeated"
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 0), ("e", 2)):
        picture(seed, 64, 64).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}")
    return folder


@pytest.mark.parametrize("action", ["drop", "merge"])
def test_near_duplicates(settings, train, repeated, action):
    trained = train(settings(data=str(repeated), dedupe=action, descriptor="pixels", dedupe_threshold=0.99, steps=1))
    assert trained.pictures == 3
    listed = json.loads((trained.folder / "duplicates.json").read_text())
    assert listed["clusters"] == [{"kept": "a.png", "dropped": ["b.png", "d.png"]}]
    lines = (trained.folder / "captions.jsonl").read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    assert texts == [*(f"caption {c}" for c in ("abd" if action == "merge" else "a")), "caption c", "caption e"]
    assert "2 were dropped" in (trained.folder / "README.md").read_text()


def test_another_training_in_the_folder_is_refused_by_name(settings, train, tmp_path):
    trained = train(settings(steps=1))
    with pytest.raises(RunError, match=r"caption_dropout: was 0\.0, now 0\.5"):
        train(settings(steps=1, caption_dropout=0.5))
    assert train(settings(steps=2, save_every=1)).steps == 2  # a constant learning rate can be prolonged
    with pytest.raises(RunError, match="schedule"):
        train(settings(schedule="cosine"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match=r"letter\.txt"):
        train(settings(out=str(tmp_path / "full")))
    (trained.folder / "train.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        train(settings())


def test_changed_pictures_are_refused(settings, train, repeated):
    train(settings(data=str(repeated), steps=1))
    (repeated / "c.txt").write_text("something else")
    with pytest.raises(RunError, match="pictures: was"):
        train(settings(data=str(repeated), steps=1))


def test_canaries_that_are_copied_end_the_training(settings, train):
    told = []
    config = settings(
        canaries="0:4,3:12",
        canary_threshold=-0.999,
        descriptor="pixels",
        canaries_every=1,
        canary_screen="denoising-loss",
    )
    trained = train(config, progress=told.append)
    assert trained.stopped
    assert trained.steps == 1
    assert re.search(r"3 copies magnitude [\d.]+, 12/12 copied, stored \d", told[-1].note)
    assert "| mean denoising-loss |" in (trained.folder / "README.md").read_text()
    assert train(config).steps == 1  # and it stays ended
    assert trained.pictures == NUMBER - 4
    assert "12 of 12" in (trained.folder / "README.md").read_text()


def test_latents_in_a_file_are_those_in_memory(settings, train, tmp_path):
    inside = train(settings(out=str(tmp_path / "a"), steps=2, flip=True))
    outside = train(settings(out=str(tmp_path / "b"), steps=2, flip=True, cache_gigabytes=0))
    assert (outside.folder / "latents.bin").is_file()
    assert losses(outside.folder) == pytest.approx(losses(inside.folder), rel=1e-5)


def test_a_loss_that_is_not_finite_is_said(settings, train):
    with pytest.raises(ModelFault, match="smaller lr"):
        train(settings(lr=1e9))


def test_faults_of_the_data(settings, train, repeated, tmp_path):
    (repeated / "c.txt").unlink()
    with pytest.raises(UsageError, match="1 no caption"):
        train(settings(data=str(repeated), strict=True, out=str(tmp_path / "strict")))
    assert train(settings(data=str(repeated), steps=1)).left_out == 1
    with pytest.raises(UsageError, match="no picture that can be trained on"):
        train(settings(data=str(repeated), min_side=100, out=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"filter": 0}, "filter is 0"),
        ({"filter": "nowhere.json"}, r"nowhere\.json cannot be read"),
        ({"filter": "auto"}, "clean pictures, and dropping at most 5 %"),
        ({"clean": "x"}, "are for a filter 'auto'"),
        ({"canaries": "none"}, "canaries is 'none'"),
        ({"canary_threshold": 0.9}, "no canaries"),
        ({"canaries": "0:100"}, "100 canaries of 24"),
        ({"mixed_precision": "fp8"}, "mixed-precision is 'fp8'"),
        ({"model_options": {"lora": "x"}}, "merge it into the model first"),
        ({"model": "demo-unconditional"}, "takes no text"),
    ],
)
def test_what_cannot_be_is_one_sentence(settings, train, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        train(settings(**changes))


def test_unknown_names_are_met_with_the_nearest(settings, train):
    with pytest.raises(UnknownName, match="Did you mean 'batch_size'"):
        settings(batchsize=3)
    with pytest.raises(UnknownName, match="tensorboard"):
        train(settings(tracker="tensorbord"))


def test_two_processes_train_as_one(settings, train, tmp_path, ranks):
    """With the filter and running scores, whose visits and counts are exchanged."""
    protection = {
        "filter": "auto", "filter_drop": 0.3, "filter_ranges": 1, "heldout": 0.2, "running_scores": "flag", "dedupe": "drop",
        "canaries": {0: 2, 2: 2}, "descriptor": "pixels", "dedupe_threshold": 0.99, "steps": 3,
    }  # fmt: skip
    config = settings(out=str(tmp_path / "two"), **protection)
    code = "import sys; from mnemoscope.train import *; fine_tune(TrainConfig.model_validate_json(sys.argv[1]))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, config.model_dump_json()],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for env in ranks
    ]  # fmt: skip
    try:
        ends = [process.communicate(timeout=400)[1] for process in running]  # a deadlock would wait for ever
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ends
    one = train(settings(out=str(tmp_path / "one"), **{**protection, "batch_size": 4}))
    assert losses(tmp_path / "two") == pytest.approx(losses(one.folder), rel=1e-4)
    alone, both = unet_of(one.result), unet_of(tmp_path / "two" / "pipeline")
    assert all(torch.allclose(alone[name], both[name], atol=1e-4) for name in alone)
