"""The audit loop: exact work, same rows whatever happens, one bad prompt is one bad row."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnemoscope.audit.batch import own_base
from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.plan import measure_speed, plan
from mnemoscope.audit.run import Progress, audit, calibrate
from mnemoscope.detect.magnitude import Magnitude
from mnemoscope.errors import CannotAudit, RunError, UnknownName, UsageError
from mnemoscope.models.base import Condition
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.sampling import denoise
from mnemoscope.records.schema import Row
from mnemoscope.records.store import Run, digest
from mnemoscope.records.table import prompt_scores
from mnemoscope.report.html import write_report
from mnemoscope.report.summary import read_summary
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.similarity.reference import ReferenceSet
from mnemoscope.types import Latents

PROMPTS = ["a cat", "the mona lisa", "two dogs on a beach", "", "a bad one"]


class World(Gaussian):
    """A closed-form world in which things go wrong on request."""

    nan_at: tuple[str, int] | None = None
    unreadable: str | None = None
    room: int | None = None

    def encode(self, prompts: list[str]) -> Condition:
        self.encoded = [*getattr(self, "encoded", []), list(prompts)]
        if self.unreadable in prompts:
            raise ValueError(f"cannot encode {self.unreadable!r}")
        return super().encode(prompts)

    def output(self, x: Latents, t: torch.Tensor, cond: Condition | None) -> Latents:
        if self.room is not None and len(x) > self.room:
            raise torch.OutOfMemoryError(f"{len(x)} samples do not fit")
        out = super().output(x, t, cond)
        if self.nan_at is not None and cond is not None:
            prompt, step = self.nan_at
            if t == self.schedule(50).timesteps[step]:
                out[cond.same_as(super().encode([prompt]))] = float("nan")
        return out


@pytest.fixture
def world() -> World:
    return World.tiny(latent_shape=(3, 4, 4))


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., AuditConfig]:
    def make(**settings: Any) -> AuditConfig:
        return AuditConfig(**({"prompts": PROMPTS, "out": str(tmp_path / "run")} | settings))

    return make


def values(run: Run, name: str = "magnitude") -> dict[str, tuple[float, ...]]:
    """Score and per-step values by id."""
    return {r.id: (r.scores[name].value, *r.scores[name].per_step) for r in run.rows()}


def same(a: dict[str, tuple[float, ...]], b: dict[str, tuple[float, ...]]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6)


def steps(k: int, name: str = "magnitude") -> dict[str, Any]:
    return {"name": "magnitude", "steps": k, "as": name}


# Scores


def test_scores_are_those_of_the_method(world: World, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(seeds=3, detectors=[steps(4)], guidance=3.0), target=world)
    for row in run.rows():
        detector = Magnitude(4)
        noise = world.noise([row.seed])
        for step in denoise(world, noise, world.encode([row.prompt]), world.encode([""]), guidance=3.0):
            detector.update(step)
            if step.index == 3:
                break
        assert row.scores["magnitude"].value == pytest.approx(float(detector.compute()), rel=1e-5)
        assert row.scores["magnitude"].per_step == pytest.approx(detector.per_step()[0].tolist(), rel=1e-5)
        assert row.scores["magnitude"].space == "eps"
    by_prompt = {p.prompt: p.score for p in prompt_scores(run.rows(), "magnitude")}
    assert max(by_prompt, key=by_prompt.__getitem__) == "the mona lisa"


def test_the_empty_prompt_scores_exactly_zero(world: World, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(detectors=[steps(3)], batch_size=7), target=world)
    assert [r.scores["magnitude"].per_step for r in run.rows() if r.prompt == ""] == [[0.0] * 3] * 4


def test_a_truncated_prompt_is_said_in_row_and_run(world: World, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(prompts=["word " * 30, "short"], seeds=1), target=world)
    long, short = run.rows()
    assert (long.tokens_dropped, long.note) == (6, "prompt truncated: the model never saw its last 6 tokens")
    assert (short.tokens_dropped, short.note) == (0, None)
    assert "1 of 2 prompts were truncated by the text encoder" in run.manifest.notes


# Work


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_first_step_detection_costs_one_forward_per_sample_and_one_per_seed(
    world: World, ask: Callable[..., AuditConfig], batch_size: int
) -> None:
    run = audit(ask(seeds=4, batch_size=batch_size), target=world)
    assert world.forwards == len(PROMPTS) * 4 + 4
    assert run.manifest.forwards == world.forwards
    assert [r.forwards for r in run.rows()] == [1] * 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"detectors": [steps(10)]}, 5 * 2 * 19 + 2),
        ({"detectors": [steps(1), steps(10, "ten")]}, 5 * 2 * 19 + 2),  # the union of what detectors need, not the sum
        ({"steps": 6, "images": True}, 5 * 2 * 11 + 2),
        ({"seed_mode": "per-prompt"}, 5 * 2 * 2),
        ({"limit": 2}, 2 * 2 + 2),
    ],
)
def test_work_is_exact_and_planned(
    world: World, ask: Callable[..., AuditConfig], settings: dict[str, Any], expected: int
) -> None:
    config = ask(seeds=2, batch_size=3, **settings)
    cost = plan(config, world, seconds_per_forward=0.5)
    assert world.forwards == 0
    audit(config, target=world)
    assert (world.forwards, cost.forwards, cost.seconds) == (expected, expected, expected / 2)
    assert (cost.samples, cost.pictures) == (2 * cost.prompts, 2 * cost.prompts if config.images else 0)


def test_the_plan_knows_the_size_of_rows(world: World, ask: Callable[..., AuditConfig]) -> None:
    config = ask(prompts=[f"{i} " * 50 for i in range(20)], detectors=[steps(20)])
    run = audit(config, target=world)
    written = sum(p.stat().st_size for p in run.files())
    assert written / 2 < plan(config, world).bytes < written * 2


def test_time_per_forward_is_measured(world: World, ask: Callable[..., AuditConfig]) -> None:
    assert measure_speed(ask(batch_size=4), world) > 0
    assert world.forwards == 8


def test_each_prompt_is_encoded_once_and_in_batches(world: World, ask: Callable[..., AuditConfig]) -> None:
    prompts = [f"prompt {i}" for i in range(70)]
    audit(ask(prompts=prompts, seeds=3, batch_size=7), target=world)
    null, *blocks = world.encoded
    assert null == [""]
    assert sorted(chain.from_iterable(blocks)) == sorted(prompts)
    assert len(blocks) <= 4


def test_scores_leave_the_device_once_per_batch(
    world: World, ask: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, count = torch.Tensor.tolist, 0

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        return plain(tensor)

    batches: list[Progress] = []
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("a transfer inside the loop"))
    audit(ask(seeds=4, batch_size=5, detectors=[steps(6), steps(2, "two")]), target=world, progress=batches.append)
    assert count == len(batches) == 4


# The same rows, whatever the order, the batch, the shard, the number of seeds


def test_rows_do_not_depend_on_batch_order_or_shards(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    expected = values(audit(ask(detectors=[steps(3)]), target=world))
    assert len(expected) == 20
    for i, settings in enumerate([{"batch_size": 1}, {"batch_size": 7}, {"prompts": PROMPTS[::-1]}]):
        again = audit(ask(out=str(tmp_path / f"{i}"), detectors=[steps(3)], **settings), target=world)
        same(values(again), expected)
    for k in (2, 0, 1):
        sharded = audit(ask(out=str(tmp_path / "sharded"), detectors=[steps(3)], shard=f"{k}/3"), target=world)
        assert sharded.manifest.status == ("done" if k == 1 else "incomplete")
    assert [p.name for p in sharded.files()] == ["samples-0.jsonl", "samples-1.jsonl", "samples-2.jsonl"]
    assert all(p.stat().st_size for p in sharded.files())
    assert sharded.manifest.notes == []
    same(values(sharded), expected)


def test_launchers_set_the_shard(
    world: World, ask: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        run = audit(ask(shard="env"), target=world)
    assert [p.name for p in run.files()] == ["samples-0.jsonl", "samples-1.jsonl"]
    assert run.manifest.status == "done"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert audit(ask(shard="env", out=str(run.folder) + "-1"), target=world).files()[0].name == "samples.jsonl"


def test_one_seed_is_the_first_of_four_and_growing_costs_the_difference(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    one = values(audit(ask(seeds=1), target=world))
    four = audit(ask(seeds=4, out=str(tmp_path / "four")), target=world)
    same(one, {r.id: values(four)[r.id] for r in four.rows() if r.seed == 0})
    before = world.forwards
    grown = audit(ask(seeds=4), target=world)
    assert world.forwards - before == 5 * 3 + 3
    same(values(grown), values(four))
    assert grown.manifest.asked == 20


def test_two_windows_of_one_run_equal_separate_runs(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    both = audit(ask(detectors=[steps(2, "two"), steps(7, "seven")]), target=world)
    alone = {k: audit(ask(out=str(tmp_path / f"{k}"), detectors=[steps(k)]), target=world) for k in (2, 7)}

    def by_sample(run: Run, name: str, k: int) -> dict[str, tuple[float, ...]]:
        return {f"{r.prompt}/{r.seed}": (r.scores[name].value, *r.scores[name].per_step[:k]) for r in run.rows()}

    same(by_sample(both, "two", 2), by_sample(alone[2], "magnitude", 2))
    same(by_sample(both, "seven", 7), by_sample(alone[7], "magnitude", 7))
    # One trajectory: both kept every step of it.
    assert {len(r.scores["two"].per_step) for r in both.rows()} == {7}
    sliced = {p.prompt: p.score for p in prompt_scores(both.rows(), "seven", window=(0, 2))}
    assert sliced == pytest.approx({p.prompt: p.score for p in prompt_scores(alone[2].rows(), "magnitude")}, rel=1e-5)


def test_prompts_have_noises_of_their_own_on_request(world: World, ask: Callable[..., AuditConfig]) -> None:
    run = audit(
        ask(prompts=["a cat", "two dogs on a beach"], seeds=2, seed_mode="per-prompt", base_seed=5), target=world
    )
    for row in run.rows():
        noise = world.noise([row.seed], own_base(5, row.prompt))
        step = next(denoise(world, noise, world.encode([row.prompt]), world.encode([""])))
        assert row.scores["magnitude"].value == pytest.approx(float((step.cond - step.uncond).norm()), rel=1e-5)
    assert own_base(5, "a cat") != own_base(5, "a cat ") != own_base(6, "a cat ")


def test_another_base_seed_is_another_sample(world: World, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    first = values(audit(ask(), target=world))
    other = values(audit(ask(base_seed=1, out=str(tmp_path / "other")), target=world))
    assert not first.keys() & other.keys()


@pytest.mark.parametrize("kind", ["sd", "sd-v"])
def test_a_network_keeps_the_same_promises(
    kind: str, target_of: Callable[[str], Any], ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    target = target_of(kind)
    before = target.forwards
    expected = audit(ask(seeds=2), target=target)
    assert target.forwards - before == 5 * 2 + 2
    assert [r.scores["magnitude"].value for r in expected.rows() if r.prompt == ""] == [0.0, 0.0]
    assert all(v[0] > 0 for v in values(expected).values() if v != (0.0, 0.0))
    for i, settings in enumerate([{"batch_size": 3}, {"prompts": PROMPTS[::-1]}]):
        same(values(audit(ask(seeds=2, out=str(tmp_path / f"{i}"), **settings), target=target)), values(expected))
    pictured = audit(ask(seeds=2, steps=4, images=True, out=str(tmp_path / "pictured")), target=target)
    assert all((pictured.folder / str(r.image)).is_file() for r in pictured.rows())
    assert target.forwards - before == 12 * 3 + 5 * 2 * 7 + 2


# Stopping and going on


def test_a_finished_run_costs_nothing(world: World, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=world)
    content, before = run.files()[0].read_bytes(), world.forwards
    again = audit(ask(), target=world)
    assert (again.files()[0].read_bytes(), world.forwards) == (content, before)
    assert (again.manifest.status, again.manifest.forwards) == ("done", before)


def test_ctrl_c_says_what_is_saved_and_the_same_command_continues(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    expected = values(audit(ask(out=str(tmp_path / "whole")), target=world))

    def impatient(progress: Progress) -> None:
        if progress.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as e:
        audit(ask(batch_size=3), target=world, progress=impatient)
    assert str(e.value) == "stopped; 6 of 20 samples are saved; the same command continues"
    stopped = Run(tmp_path / "run")
    assert stopped.manifest.status == "interrupted"
    assert stopped.manifest.notes == ["14 of 20 samples have not been run yet; the same command continues"]
    before = world.forwards
    run = audit(ask(batch_size=3), target=world)
    assert world.forwards - before == 14 + 4
    assert (run.manifest.status, run.manifest.notes) == ("done", [])
    same(values(run), expected)


KILLED = """
import os, sys, time
from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.run import audit
from mnemoscope.models.gaussian import Gaussian

class Slow(Gaussian):
    def output(self, x, t, cond):
        time.sleep(0.01)
        return super().output(x, t, cond)

for out in sys.stdin:  # one process to kill per line, without importing torch each time
    if (pid := os.fork()) == 0:
        prompts = [f"prompt {i}" for i in range(25)]
        audit(AuditConfig(prompts=prompts, out=out.strip(), batch_size=2), target=Slow.tiny(latent_shape=(3, 4, 4)))
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


def test_kill_9_at_any_instant_loses_nothing_but_the_running_batch(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(25)]
    world = Gaussian.tiny(latent_shape=(3, 4, 4))
    expected = values(audit(AuditConfig(prompts=prompts, out=str(tmp_path / "whole")), target=world))
    saved_at_kill = []
    with subprocess.Popen([sys.executable, "-c", KILLED], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for rows, jitter in ((0, 0.0), (0, 0.02), (20, 0.004), (60, 0.009)):
            out = tmp_path / f"{rows}-{jitter}"
            print(out, file=parent.stdin, flush=True)
            pid = int(parent.stdout.readline())
            wait_for(rows, out / "samples.jsonl")
            time.sleep(jitter)
            os.kill(pid, signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            saved = Run(out).finished() if Run.exists(out) else set()
            saved_at_kill.append(len(saved))
            before = world.forwards
            run = audit(AuditConfig(prompts=prompts, out=str(out), batch_size=8), target=world)
            assert world.forwards - before == 100 - len(saved) + 4
            assert run.manifest.status == "done"
            assert len(run.files()[0].read_text().splitlines()) == 100
            same(values(run), expected)
    assert saved_at_kill[-1] >= 60


def wait_for(rows: int, file: Path) -> None:
    deadline = time.monotonic() + 60
    while rows and (not file.exists() or file.read_bytes().count(b"\n") < rows):
        assert time.monotonic() < deadline, "the process to kill does not work"
        time.sleep(0.002)


def test_a_full_disk_in_the_middle(
    world: World, ask: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, batches = os.write, iter(range(100))

    def full(file: int, data: bytes) -> int:
        if b'"prompt_id"' in bytes(data) and next(batches) == 2:
            raise OSError(28, "No space left on device")
        return plain(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(
            RunError, match=r"is full; everything written so far is kept: .* the same command continues"
        ):
            audit(ask(batch_size=4), target=world)
    config = ask(batch_size=4)
    stopped = Run(str(config.out))
    assert (stopped.manifest.status, len(stopped.finished())) == ("incomplete", 8)
    assert "stopped by an error (RunError: the disk" in stopped.manifest.notes[0]
    assert audit(config, target=world).manifest.status == "done"


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"guidance": 3.0}, "guidance: was 7.5, now 3.0"),
        ({"steps": 25}, "steps: was 50, now 25"),
        ({"base_seed": 1}, "base_seed: was 0, now 1"),
        ({"detectors": [steps(2)]}, "detectors.magnitude.options.window: was [0, 1], now [0, 2]"),
        ({"images": True, "steps": 50}, "images: was false, now true"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    world: World, ask: Callable[..., AuditConfig], settings: dict[str, Any], difference: str
) -> None:
    run = audit(ask(), target=world)
    before = (run.folder / "run.json").read_bytes()
    with pytest.raises(RunError) as e:
        audit(ask(**settings), target=world)
    assert str(e.value) == (
        f"{run.folder} was made under other settings ({difference}); ask for the same ones to continue it, or use a new folder (--fresh)."
    )
    assert (run.folder / "run.json").read_bytes() == before


def test_a_folder_of_another_model_is_refused(world: World, ask: Callable[..., AuditConfig]) -> None:
    audit(ask(), target=world)
    with pytest.raises(RunError, match=r"target\.parameters: was"):
        audit(ask(), target=World.world(["a cat"], ["two dogs"], latent_shape=(3, 4, 4)))


def test_asking_for_less_than_there_is_is_refused(world: World, ask: Callable[..., AuditConfig]) -> None:
    audit(ask(), target=world)
    with pytest.raises(RunError, match="holds 8 samples that are not asked for now"):
        audit(ask(limit=3), target=world)
    with pytest.raises(RunError, match="holds 15 samples that are not asked for now"):
        audit(ask(seeds=1), target=world)


def test_a_renamed_model_is_the_same_model(world: World, ask: Callable[..., AuditConfig]) -> None:
    identity = world.identity()
    world.identity = lambda: identity | {"name": "here", "source": "/one/place"}  # type: ignore[method-assign]
    audit(ask(), target=world)
    world.identity = lambda: identity | {"name": "there", "source": "/another"}  # type: ignore[method-assign]
    before = world.forwards
    run = audit(ask(), target=world)
    assert world.forwards == before
    assert run.manifest.target["source"] == "/another"


def test_without_a_folder_the_same_request_gets_the_same_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = audit(AuditConfig(prompts=["a cat"]), target=world).folder
    again = audit(AuditConfig(prompts=["a cat"], batch_size=1), target=world).folder
    other = audit(AuditConfig(prompts=["a dog"]), target=world).folder
    assert first == again != other
    assert re.fullmatch(r"runs/gaussian-[0-9a-f]{8}", first.as_posix())


# Things go wrong


def test_nan_is_a_row_that_names_the_step(world: World, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    good = values(audit(ask(out=str(tmp_path / "good"), detectors=[steps(5)]), target=world))
    world.nan_at = ("a bad one", 3)
    run = audit(ask(detectors=[steps(5)], batch_size=20), target=world)
    bad = [r for r in run.rows() if r.status == "error"]
    assert [r.prompt for r in bad] == ["a bad one"] * 4
    assert bad[0].error == (
        "ModelFault: gaussian predicted NaN or infinity at step 3 (t = 921) for 'a bad one' with seed 0; load the model in "
        "float32 or bfloat16, or check the checkpoint."
    )
    assert not bad[0].scores
    rest = {
        r.id: (r.scores["magnitude"].value, *r.scores["magnitude"].per_step) for r in run.rows() if r.status == "ok"
    }
    same(rest, {k: v for k, v in good.items() if k in rest})
    assert len(rest) == 16
    assert run.manifest.status == "incomplete"
    assert "4 of 20 samples failed; the same command tries them again" in run.manifest.notes


def test_one_prompt_that_raises_is_one_bad_prompt(world: World, ask: Callable[..., AuditConfig]) -> None:
    world.unreadable = "a bad one"
    seen: list[Progress] = []
    run = audit(ask(batch_size=8), target=world, progress=seen.append)
    failed = {r.prompt: r.error for r in run.rows() if r.status == "error"}
    assert failed == {"a bad one": "ValueError: cannot encode 'a bad one'"}
    assert len(run.finished()) == 16
    assert seen[-1].errors == 4

    world.unreadable = None
    before = world.forwards
    repaired = audit(ask(batch_size=8), target=world)
    assert (repaired.manifest.status, len(repaired.finished())) == ("done", 20)
    assert world.forwards - before == 4 + 4


def test_too_many_errors_stop_the_run(world: World, ask: Callable[..., AuditConfig]) -> None:
    world.unreadable = "a bad one"
    prompts = ["a cat", "a bad one", "two dogs", "three"]
    run = audit(ask(prompts=prompts, batch_size=2, max_errors=1), target=world)
    assert run.manifest.status == "incomplete"
    assert [r.prompt for r in run.rows()] == ["a cat"] * 4 + ["a bad one"] * 2
    assert run.manifest.notes == [
        "stopped after 2 failed samples (max_errors allows 1)",
        "2 of 16 samples failed; the same command tries them again",
        "10 of 16 samples have not been run yet; the same command continues",
    ]


def test_out_of_memory_halves_the_batch(world: World, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    expected = values(audit(ask(out=str(tmp_path / "good")), target=world))
    world.room = 3
    seen: list[Progress] = []
    run = audit(ask(batch_size=16), target=world, progress=seen.append)
    same(values(run), expected)
    notes = ["out of memory at batch 16; continuing with 8", "out of memory at batch 8; continuing with 4"]
    assert run.manifest.notes == [*notes, "out of memory at batch 4; continuing with 2"]
    assert run.manifest.machine["batch_size"] == 2
    assert seen[0].note == "out of memory at batch 4; continuing with 2"
    assert [p.note for p in seen[1:]] == [None] * (len(seen) - 1)


def test_memory_for_not_even_one_sample(world: World, ask: Callable[..., AuditConfig]) -> None:
    world.room = 0
    run = audit(ask(prompts=["a cat"], seeds=2), target=world)
    assert [r.error for r in run.rows()] == ["OutOfMemoryError: 1 samples do not fit"] * 2


def test_progress_counts(world: World, ask: Callable[..., AuditConfig]) -> None:
    seen: list[Progress] = []
    audit(ask(batch_size=8), target=world, progress=seen.append)
    assert [(p.done, p.asked, p.errors, p.hits) for p in seen] == [(8, 20, 0, 0), (16, 20, 0, 0), (20, 20, 0, 0)]
    assert seen[0].eta > 0
    assert seen[-1].eta == 0


# What cannot be done is said before anything is computed


class Greedy(Magnitude):
    needs = frozenset({"uncond", "grad"})


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (
            {"guidance": 1.0},
            CannotAudit,
            "Guidance is off (1), so there is nothing to compare; set guidance above 1, for instance 7.5.",
        ),
        (
            {"detectors": [steps(60)]},
            UsageError,
            "magnitude looks at 60 steps and the schedule has 50; set steps to 60 or shorten its window.",
        ),
        ({"detectors": ["magnitud"]}, UnknownName, "no detector named 'magnitud'. Did you mean 'magnitude'?"),
        (
            {"detectors": [{"name": "magnitude", "step": 1}]},
            UnknownName,
            "no option of detector magnitude named 'step'. Did you mean 'steps'?",
        ),
        (
            {"detectors": [{"name": "magnitude", "steps": "one"}]},
            UsageError,
            "detector magnitude does not take {'steps': 'one'}",
        ),
        ({"prompts": None}, UsageError, "no prompts were given; name a file or give a list as prompts."),
        ({"shard": "4/4"}, UsageError, "shard is '4/4', and must be k/m with 0 ≤ k < m, such as 0/4."),
        (
            {"reference": "pictures/"},
            UsageError,
            "reference 'pictures/' was named but not opened; hand in the opened reference set.",
        ),
        ({"calibration": "nowhere.json"}, UsageError, "nowhere.json cannot be read"),
    ],
)
def test_requests_that_cannot_be_carried_out(
    world: World, ask: Callable[..., AuditConfig], settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    config = ask(**settings)
    with pytest.raises(error) as e:
        audit(config, target=world)
    assert str(e.value).startswith(says)
    assert world.forwards == 0
    assert not Path(str(config.out)).exists()


def test_objects_that_do_not_fit_together(world: World, ask: Callable[..., AuditConfig]) -> None:
    with pytest.raises(UsageError, match="no model was named"):
        audit(ask())
    with pytest.raises(CannotAudit, match="magnitude needs grad, which an audit does not offer"):
        audit(ask(), target=world, detectors=[Greedy()])
    with pytest.raises(UsageError, match="need different names"):
        audit(ask(), target=world, detectors=[Magnitude(), Magnitude(2)])
    with pytest.raises(UsageError, match="none are made; set images to true"):
        audit(ask(), target=world, reference=ReferenceSet.of(["a"], torch.rand(1, 3, 16, 16)))
    silent = World.tiny(latent_shape=(3, 4, 4), has_text=False)
    with pytest.raises(CannotAudit, match="takes no text; use a detector that needs none"):
        audit(ask(prompts=None), target=silent)
    with pytest.raises(CannotAudit, match="takes no text, so there are no prompts to audit"):
        audit(ask(), target=silent, detectors=[Size()])


class Size:
    """A detector of a test: the norm of the prediction at the first step."""

    name, needs, space, steps_needed = "size", frozenset(), None, 1

    def update(self, step: Any) -> None:
        self.space, self.seen = step.space, step.cond.flatten(1).norm(dim=1)

    def per_step(self) -> torch.Tensor:
        return self.seen[:, None]

    def compute(self) -> torch.Tensor:
        return self.seen


def test_a_model_without_text_is_audited_by_detectors_that_need_none(ask: Callable[..., AuditConfig]) -> None:
    silent = World.tiny(latent_shape=(3, 4, 4), has_text=False)
    run = audit(ask(prompts=None, seeds=3), target=silent, detectors=[Size()])
    assert silent.forwards == plan(ask(prompts=None, seeds=3), silent, [Size()]).forwards == 3
    noise = silent.noise([0, 1, 2])
    expected = next(denoise(silent, noise, None)).cond.flatten(1).norm(dim=1)
    assert [r.scores["size"].value for r in run.rows()] == pytest.approx(expected.tolist(), rel=1e-5)


def test_who_needs_no_null_prediction_does_not_pay_for_it(world: World, ask: Callable[..., AuditConfig]) -> None:
    config = ask(guidance=1.0, seeds=2)
    audit(config, target=world, detectors=[Size()])
    assert world.forwards == plan(config, world, [Size()]).forwards == 10


# Pictures


@pytest.fixture
def big() -> World:
    return World.tiny(latent_shape=(3, 16, 16))


def test_pictures_are_kept_and_compared(big: World, ask: Callable[..., AuditConfig]) -> None:
    mona = generate(big, "the mona lisa")
    pictures = torch.cat([mona, torch.rand(1, 3, 16, 16, generator=torch.manual_seed(0))])
    reference = Shown.of(["mona", "noise"], pictures, Pixels())
    reference.threshold = 0.6
    seen: list[Progress] = []
    config = ask(prompts=["a cat", "the mona lisa"], seeds=2, images=True, steps=10)
    run = audit(config, target=big, reference=reference, progress=seen.append)
    rows = list(run.rows())
    for row in rows:
        assert row.image == f"images/{row.id}.webp"
        picture = np.asarray(Image.open(run.folder / row.image))
        expected = (generate(big, row.prompt, row.seed)[0].permute(1, 2, 0) * 255).round().numpy()
        assert abs(picture.astype(int) - expected).max() <= 1
    found = [(r.prompt, r.nearest.reference, r.nearest.copy_found) for r in rows if r.nearest is not None]
    assert [f for f in found if f[2]] == [("the mona lisa", "mona", True)] * 2
    assert len(found) == 4
    assert seen[-1].hits == 1
    kept = [r.nearest.file for r in rows if r.nearest is not None and r.nearest.reference == "mona"]
    stored = np.asarray(Image.open(run.folder / str(kept[0])))
    assert abs(stored.astype(int) - (mona[0].permute(1, 2, 0) * 255).round().numpy()).max() <= 1
    assert run.manifest.config["reference"] == {"name": "pixels-16", "pictures": 2, "threshold": 0.6}
    assert json.loads((run.folder / "run.json").read_text())["machine"]["batch_size"] == 16


class Shown(ReferenceSet):
    """A reference set that can show its pictures."""

    def image(self, reference: str) -> torch.Tensor:
        return (
            generate(World.tiny(latent_shape=(3, 16, 16)), "the mona lisa")[0]
            if reference == "mona"
            else torch.ones(3, 16, 16)
        )


def generate(world: World, prompt: str, seed: int = 0) -> torch.Tensor:
    *_, last = denoise(world, world.noise([seed]), world.encode([prompt]), world.encode([""]), steps=10)
    return world.decode(last.x_next)


def test_no_row_without_its_picture(
    big: World, ask: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ask(prompts=["a cat"], seeds=2, images=True, steps=2)
    monkeypatch.setattr(World, "decode", lambda self, x: pytest.fail("decoded"))
    with pytest.raises(pytest.fail.Exception):  # not an Exception: like a kill between the steps and the rows
        audit(config, target=big)
    assert Run(str(config.out)).finished() == set()
    assert Run(str(config.out)).manifest.status == "incomplete"


def test_a_picture_that_is_not_finite_is_an_error_row(big: World, ask: Callable[..., AuditConfig]) -> None:
    class Broken(World):
        def decode(self, x: Latents) -> torch.Tensor:
            return super().decode(x) * torch.tensor([1.0, float("nan")])[:, None, None, None]

    target = Broken.tiny(latent_shape=(3, 16, 16))
    run = audit(ask(prompts=["a cat"], seeds=2, images=True, steps=2, batch_size=2), target=target)
    good, bad = run.rows()
    assert (good.status, bad.error) == (
        "ok",
        "ModelFault: the picture is not finite, though all 2 steps are, for 'a cat' with seed 1; load the model in float32 or "
        "bfloat16, or check the checkpoint.",
    )
    assert [p.name for p in (run.folder / "images").iterdir()] == [f"{good.id}.webp"]


# Calibration


def ordinary(n: int) -> list[str]:
    return [f"ordinary prompt number {i}" for i in range(n)]


def test_ordinary_prompts_become_a_threshold_that_an_audit_uses(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    run, found = calibrate(ask(prompts=ordinary(60), out=str(tmp_path / "ordinary")), target=world, fpr=0.05)
    scores = sorted(p.score for p in prompt_scores(run.rows(), "magnitude"))
    assert found["magnitude"].record.scores == scores
    assert found["magnitude"].record.source == "60 prompts from a list of 60"
    assert run.manifest.kind == "calibrate"

    seen: list[Progress] = []
    config = ask(calibration=str(run.folder / "thresholds.json"), batch_size=3)
    audited = audit(config, target=world, progress=seen.append)
    threshold = found["magnitude"].threshold
    above = [p.prompt for p in prompt_scores(audited.rows(), "magnitude") if p.score > threshold]
    assert "the mona lisa" in above
    assert seen[-1].hits == len(above)
    assert (audited.folder / "thresholds.json").read_bytes() == (run.folder / "thresholds.json").read_bytes()


def test_a_threshold_does_not_travel(world: World, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    run, _ = calibrate(ask(prompts=ordinary(30), out=str(tmp_path / "ordinary")), target=world, fpr=0.05)
    path = str(run.folder / "thresholds.json")
    with pytest.raises(UsageError, match=r"seeds: was 4, now 2.*recalibrate"):
        audit(ask(seeds=2, calibration=path), target=world)
    with pytest.raises(UnknownName, match="named 'magnitude'"):
        audit(ask(detectors=[steps(1, "first")], calibration=path), target=world)
    accepted = audit(ask(seeds=2, calibration=path, accept_threshold=True), target=world)
    assert accepted.manifest.accepted == ["seeds: was 4, now 2"]
    summary = read_summary(accepted.folder)
    assert (summary.above.n, summary.foreign, summary.seeds) == (5, ["seeds: was 4, now 2"], 2)
    assert "made under another setting (seeds: was 4, now 2)" in summary.headline
    # Asked again without it, nobody is judged and nothing is left of it.
    plain = read_summary(audit(ask(seeds=2), target=world).folder)
    assert (plain.above, plain.foreign) == (None, [])


def test_a_threshold_belongs_to_its_bank(world: World, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    for mode in ("shared", "per-prompt"):
        config = ask(prompts=ordinary(30), out=str(tmp_path / f"{mode}-ordinary"), seed_mode=mode, base_seed=1)
        run, _ = calibrate(config, target=world, fpr=0.05)
        same = {"calibration": str(run.folder / "thresholds.json"), "seed_mode": mode, "out": str(tmp_path / mode)}
        audited = audit(ask(**same, base_seed=1), target=world)
        assert read_summary(audited.folder).foreign == []
        if mode == "shared":  # the noises of one bank are common to all scores
            with pytest.raises(UsageError, match="base_seed: was 1, now 2"):
                audit(ask(**same | {"out": str(tmp_path / "other")}, base_seed=2), target=world)
        else:
            audit(ask(**same | {"out": str(tmp_path / "other")}, base_seed=2), target=world)


class Varied(Magnitude):
    def __init__(self, variant: str):
        super().__init__()
        self.variant = variant


def test_a_threshold_belongs_to_its_detector(world: World, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    config = ask(prompts=ordinary(30), out=str(tmp_path / "varied-ordinary"))
    run, _ = calibrate(config, target=world, fpr=0.05, detectors=[Varied("one")])
    path = str(run.folder / "thresholds.json")
    audited = audit(ask(calibration=path), target=world, detectors=[Varied("one")])
    assert read_summary(audited.folder).foreign == []
    with pytest.raises(UsageError, match=r'method\.options\.variant: was "one", now "two"'):
        audit(ask(calibration=path, out=str(tmp_path / "two")), target=world, detectors=[Varied("two")])
    with pytest.raises(UsageError, match=r'method\.class: was "Varied", now "Magnitude"'):
        audit(ask(calibration=path, out=str(tmp_path / "three")), target=world)
    # A file copied by hand is seen through as well.
    other = audit(ask(out=str(tmp_path / "four")), target=world, detectors=[Varied("two")])
    (other.folder / "thresholds.json").write_bytes(Path(path).read_bytes())
    assert read_summary(other.folder).foreign == ['method.options.variant: was "one", now "two"']


def test_each_detector_gets_its_threshold(world: World, ask: Callable[..., AuditConfig]) -> None:
    config = ask(prompts=ordinary(30), detectors=[steps(1, "first"), steps(5, "five")])
    run, found = calibrate(config, target=world, fpr=0.05)
    assert found.keys() == {"first", "five"}
    assert found["five"].record.setting["window"] == [0, 5]
    assert {p.name for p in run.folder.glob("*.json")} == {"run.json", "thresholds.json", "thresholds-five.json"}


def test_nothing_is_concluded_from_half_a_calibration(world: World, ask: Callable[..., AuditConfig]) -> None:
    world.unreadable = "ordinary prompt number 3"
    with pytest.raises(RunError, match="is incomplete, and a threshold needs every score"):
        calibrate(ask(prompts=ordinary(30)), target=world, fpr=0.05)
    world.unreadable = None
    with pytest.raises(UsageError, match="5"):
        calibrate(ask(prompts=ordinary(5), out=str(ask().out) + "-few"), target=world, fpr=0.05)


def test_rows_say_group_and_label(world: World, ask: Callable[..., AuditConfig]) -> None:
    prompts: Sequence[Any] = [{"id": "7", "prompt": "a cat", "group": "planted", "label": True}]
    rows: list[Row] = list(audit(ask(prompts=prompts, seeds=1), target=world).rows())
    assert [(r.prompt_id, r.group, r.label) for r in rows] == [("7", "planted", True)]


def test_labels_that_come_later_reach_the_rows_for_nothing(world: World, ask: Callable[..., AuditConfig]) -> None:
    words = [digest(i) for i in range(20)]  # no two of them alike
    scores = values(audit(ask(prompts=words, seeds=2), target=world))
    before = world.forwards
    columns = [{"id": f"n{i}", "prompt": w, "group": "new", "label": bool(i % 2)} for i, w in enumerate(words)]
    run = audit(ask(prompts=columns, seeds=2), target=world)
    assert world.forwards == before
    assert values(run) == scores
    assert {(r.prompt_id, r.label) for r in run.rows()} == {(f"n{i}", bool(i % 2)) for i in range(20)}
    summary = read_summary(run.folder)
    assert [g.name for g in summary.groups] == ["new"]
    assert summary.discrimination[0].name == "magnitude"
    assert (run.folder / "controls.json").exists()
    again = audit(ask(prompts=words, seeds=2), target=world)
    assert {(r.group, r.label) for r in again.rows()} == {(None, None)}
    assert not (again.folder / "controls.json").exists()


# Where it ran


def test_a_run_knows_the_commit_it_was_made_in(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis" / ".git").mkdir(parents=True)
    (tmp_path / "thesis" / ".git" / "HEAD").write_text("3f2a" * 10 + "\n")
    monkeypatch.chdir(tmp_path / "thesis")
    run = audit(ask(out="run"), target=world)
    assert run.manifest.git == {"commit": "3f2a" * 10, "dirty": None}
    assert f"{'3f2a' * 10}, whether with changes is not known" in write_report(run.folder).read_text()
