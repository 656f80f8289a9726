"""The arithmetic of a training: what is drawn, the loss, the average, the checkpoint."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError

from mnemoscope.errors import RunError
from mnemoscope.mitigate.base import key_of
from mnemoscope.train.cache import _reserve
from mnemoscope.train.checkpoint import Checkpoints, StepLog, optimizer_tensors, read_state, restore_optimizer
from mnemoscope.train.config import TrainConfig
from mnemoscope.train.draws import Draws
from mnemoscope.train.loop import rate_at
from mnemoscope.train.trainee import Average, Objective

SHAPE = (2, 3, 3)


def draws(**changes):
    options = {"horizon": 1000, "seed": 3, "flip": True, "dropout": 0.25, **changes}
    return Draws(list(range(7)), SHAPE, **options)


def test_what_is_drawn_depends_on_the_place_alone():
    whole = draws().visits(0, 12)
    parts = [draws().visits(start, 3) for start in (0, 3, 6, 9)]
    for name in ("rows", "mirrored", "posterior", "noise", "t", "blank"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert not torch.equal(whole.noise, draws(seed=4).visits(0, 12).noise)


def test_every_picture_comes_once_in_an_epoch_and_shares_are_kept():
    many = draws().visits(0, 2100)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in many.rows.split(7))
    assert many.rows[:7].tolist() != many.rows[7:14].tolist()
    assert abs(float(many.blank.float().mean()) - 0.25) < 0.05
    assert abs(float(many.mirrored.float().mean()) - 0.5) < 0.05
    assert 0 <= int(many.t.min()) < 20
    assert 980 < int(many.t.max()) <= 999
    assert not draws(flip=False, dropout=0.0).visits(0, 50).mirrored.any()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_exact_prediction_has_no_loss_and_weights_are_those_of_min_snr(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction)
    x0, noise = (torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    t = torch.tensor([0, 200, 600, 999])
    bar = scheduler.alphas_cumprod[t]
    a, s = bar.sqrt().view(-1, 1, 1, 1), (1 - bar).sqrt().view(-1, 1, 1, 1)
    exact = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction]
    plain, weighted = Objective(scheduler), Objective(scheduler, gamma=5.0)
    assert torch.allclose(plain.noised(x0, noise, t), a * x0 + s * noise, atol=1e-6)
    assert plain.losses(exact, x0, noise, t).max() < 1e-12
    # An error of 1 in x₀, seen through each prediction, is weighed by min(SNR, γ).
    snr = bar / (1 - bar)
    through = {"epsilon": a / s, "v_prediction": 1 / s, "sample": torch.ones_like(a)}[prediction]
    assert torch.allclose(weighted.losses(exact + through, x0, noise, t), snr.clamp(max=5), rtol=2e-3)


def test_an_average_starts_quickly_and_gives_the_weights_back():
    w = torch.nn.Parameter(torch.zeros(3))
    average = Average({"w": w}, 0.9)
    expected = torch.zeros(3)
    for step in range(5):
        w.data += 1
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * w.data
    assert torch.allclose(average.shadow["w"], expected)
    with average.inside():
        assert torch.allclose(w.data, expected)
    assert w.tolist() == [5, 5, 5]


def test_the_learning_rate_rises_and_falls():
    def rates(**changes):
        config = TrainConfig(model="m", data="d", out="o", steps=10, lr=1.0, **changes)
        return [rate_at(config, step) for step in range(10)]

    assert rates() == [1.0] * 10
    assert rates(warmup=4)[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rates(schedule="linear")[5] == pytest.approx(0.5)
    assert rates(schedule="cosine")[5] == pytest.approx(0.5)
    assert TrainConfig(model="m", data="d", out="o", lora=4).learning_rate == 1e-4


def stepped(optimizer, w, times):
    for i in range(times):
        w.grad = torch.full_like(w, 1.0 + i)
        optimizer.step()


def test_an_optimizer_goes_on_from_tensors():
    one, two = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    first, second = (torch.optim.AdamW([w], fused=True) for w in (one, two))
    stepped(first, one, 3)
    two.data.copy_(one.data)
    restore_optimizer(second, {name: t.clone() for name, t in optimizer_tensors(first).items()})
    stepped(first, one, 2)
    stepped(second, two, 2)
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "is full; everything written so far is kept"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "is full; everything written",
        ),
        (PermissionError(13, "Permission denied"), r"cannot be written \(Permission denied\)"),
    ],
)
def test_a_full_disk_leaves_earlier_checkpoints_and_no_half_one(tmp_path, error, says):
    places = Checkpoints(tmp_path, keep=2)

    def fill(folder):
        (folder / "x").write_text("x")
        return {}

    def fails(folder):
        fill(folder)
        raise error

    places.write(1, fill)
    with pytest.raises(RunError, match=says):
        places.write(2, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]
    assert places.latest()[0] == 1
    with pytest.raises(SafetensorError):  # not of the disk
        places.write(2, lambda folder: (_ for _ in ()).throw(SafetensorError("a tensor is not contiguous")))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call on this system")
def test_room_for_latents_is_reserved_before_they_are_written(tmp_path):
    _reserve(str(tmp_path / "latents"), 1000)
    assert (tmp_path / "latents").stat().st_size == 1000
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            _reserve(str(tmp_path / "latents"), 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_checkpoints_appear_whole_and_old_ones_go(tmp_path):
    places = Checkpoints(tmp_path, keep=2)
    (tmp_path / ".step-0000009.1").mkdir(parents=True)  # of a process that was killed while it wrote
    assert places.latest() is None

    def fill(folder):
        (folder / "x").write_text("x")
        return {"stopped": False}

    for step in (1, 2, 10):
        places.write(step, fill)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000002", "step-0000010"]
    assert places.latest() == (10, tmp_path / "step-0000010")
    assert read_state(tmp_path / "step-0000010") == {"step": 10, "stopped": False}

    def fails(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        places.write(11, fails)
    assert places.latest()[0] == 10
    (tmp_path / "step-0000010" / "state.json").write_text("{")
    with pytest.raises(RunError, match="goes on without"):
        read_state(tmp_path / "step-0000010")


def test_a_log_forgets_what_came_after_a_step_and_a_torn_line(tmp_path):
    log = StepLog(tmp_path / "losses.jsonl")
    log.append([{"step": i} for i in (1, 2, 3)])
    log.path.write_bytes(log.path.read_bytes() + b'{"ste')
    log.cut(2)
    assert log.read() == [{"step": 1}, {"step": 2}]


def test_keys_of_visits_differ_from_keys_of_orders():
    assert len({key_of(what, n, seed) for what in ("visit", "order") for n in range(50) for seed in range(3)}) == 300
