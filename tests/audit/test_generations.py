"""Scores that compare a prompt's pictures: the same rows however the audit was cut up, and sentences where there is nothing to compare."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mnemoscope.audit import generations
from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.generations import _picture
from mnemoscope.audit.plan import plan
from mnemoscope.audit.run import Progress, audit, calibrate
from mnemoscope.detect.base import PictureDetector
from mnemoscope.errors import CannotAudit, ModelFault, RunError, UsageError
from mnemoscope.models.base import Condition
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.records.store import Run
from mnemoscope.records.table import prompt_scores
from mnemoscope.report.html import write_report
from mnemoscope.report.summary import read_summary
from mnemoscope.similarity.density import DensityDetector, tiled_l2
from mnemoscope.types import Latents

PROMPTS = ["a cat", "the mona lisa", "two dogs on a beach", "a bad one"]
STEPS = 3


class World(Gaussian):
    """A closed-form world in which one prompt fails on request."""

    broken: tuple[str, int] | None = None

    def output(self, x: Latents, t: torch.Tensor, cond: Condition | None) -> Latents:
        out = super().output(x, t, cond)
        if self.broken is not None and cond is not None:
            prompt, row = self.broken
            out[cond.same_as(self.encode([prompt])).nonzero()[row : row + 1, 0]] = float("nan")
        return out


@pytest.fixture
def world() -> World:
    return World.world([], ["the mona lisa"], latent_shape=(3, 16, 16))


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., AuditConfig]:
    def make(**settings: Any) -> AuditConfig:
        common = {"prompts": PROMPTS, "detectors": ["density"], "images": True, "guidance": 1.0, "steps": STEPS}
        return AuditConfig(**({"seeds": 3, "out": str(tmp_path / "run")} | common | settings))

    return make


def values(run: Run, name: str = "density") -> dict[str, tuple[float, int | None]]:
    return {r.id: (r.scores[name].value, r.scores[name].generations) for r in run.rows() if name in r.scores}


def test_scores_are_those_of_the_kept_pictures(world: World, ask: Callable[..., AuditConfig]) -> None:
    config = ask()
    run = audit(config, target=world)
    rows = [r for r in run.rows() if r.prompt == "a cat"]
    kept = torch.stack([_picture(run, r.image) for r in rows])
    apart = tiled_l2(kept, kept)
    assert [r.scores["density"].value for r in rows] == pytest.approx([1 - float(d.sum()) / 2 for d in apart], rel=1e-5)
    assert {r.scores["density"].generations for r in rows} == {3}
    assert {(r.scores["density"].space, len(r.scores["density"].per_step)) for r in rows} == {("picture", 0)}
    by_prompt = {p.prompt: p.score for p in prompt_scores(run.rows(), "density")}
    assert by_prompt["the mona lisa"] == 1.0  # spread 0: every seed is the same picture, pixel by pixel
    assert max(v for k, v in by_prompt.items() if k != "the mona lisa") < 0.9
    assert (run.manifest.status, run.manifest.notes) == ("done", [])
    # No forward for the score, and none for a null prediction that nobody needs.
    assert world.forwards == plan(config, world).forwards == 4 * 3 * STEPS


def test_beside_other_detectors(world: World, ask: Callable[..., AuditConfig]) -> None:
    detectors = ["magnitude", "density", {"name": "density", "near": 0.05, "as": "pairs"}]
    run = audit(ask(detectors=detectors, guidance=3.0), target=world)
    assert {tuple(r.scores) for r in run.rows()} == {("magnitude", "density", "pairs")}
    assert all(len(r.scores["magnitude"].per_step) == STEPS for r in run.rows())
    assert set(values(run, "pairs").values()) <= {(0.0, 3), (0.5, 3), (1.0, 3)}
    content = run.files()[0].read_bytes()
    assert audit(ask(detectors=detectors, guidance=3.0), target=world).files()[0].read_bytes() == content


def test_a_model_without_text(ask: Callable[..., AuditConfig]) -> None:
    silent = World.world([], latent_shape=(3, 16, 16), has_text=False)
    run = audit(ask(prompts=None), target=silent)
    assert len(values(run)) == 3


# However it was cut up


def test_batches_order_and_growth_give_the_same_rows(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    expected = values(audit(ask(), target=world))
    for i, settings in enumerate([{"batch_size": 2}, {"batch_size": 1, "prompts": PROMPTS[::-1]}]):
        again = values(audit(ask(out=str(tmp_path / f"{i}"), **settings), target=world))
        assert {id: v for id, (v, _) in again.items()} == pytest.approx({id: v for id, (v, _) in expected.items()})
    audit(ask(seeds=2, out=str(tmp_path / "grown")), target=world)
    assert values(audit(ask(out=str(tmp_path / "grown")), target=world)) == expected


def test_shards_in_one_folder(world: World, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    expected = values(audit(ask(), target=world))
    for k in (2, 0):
        run = audit(ask(out=str(tmp_path / "shards"), shard=f"{k}/3"), target=world)
        assert (run.manifest.status, values(run)) == ("incomplete", {})
        assert "lack a score that compares a prompt's pictures" in run.manifest.notes[-1]
    run = audit(ask(out=str(tmp_path / "shards"), shard="1/3"), target=world)
    assert (run.manifest.status, run.manifest.notes, values(run)) == ("done", [], expected)
    assert len(run.files()) == 3


def test_shards_of_several_machines_are_merged_and_finished_by_the_same_command(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    expected = values(audit(ask(), target=world))
    parts = [audit(ask(out=str(tmp_path / f"part-{k}"), shard=f"{k}/2"), target=world) for k in range(2)]
    merged = Run.merge(tmp_path / "merged", parts)
    assert merged.manifest.status == "incomplete"
    before = world.forwards
    run = audit(ask(out=str(merged.folder)), target=world)
    assert (run.manifest.status, values(run), world.forwards) == ("done", expected, before)


@pytest.mark.parametrize("when", ["before", "between files"])
def test_a_kill_before_or_during_the_last_step(
    when: str, world: World, ask: Callable[..., AuditConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    expected = values(audit(ask(), target=world))
    out = str(tmp_path / "killed")
    audit(ask(out=out, shard="0/2"), target=world)
    plain, files = Run.amend, Run.files

    def amend(self: Run, facts: Any) -> int:
        if any("scores" in f for f in facts.values()):
            if when == "before":
                raise Killed
            # One file is amended, the other is not.
            monkeypatch.setattr(Run, "files", lambda self: files(self)[:1])
            plain(self, facts)
            monkeypatch.setattr(Run, "files", files)
            raise Killed
        return plain(self, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "amend", amend)
        with pytest.raises(Killed):
            audit(ask(out=out, shard="1/2"), target=world)
    stopped = Run(out)
    assert stopped.manifest.status == "incomplete"
    assert len(values(stopped)) < len(expected)
    run = audit(ask(out=out, shard="1/2"), target=world)
    assert (run.manifest.status, values(run)) == ("done", expected)


def test_ctrl_c_in_the_last_step(
    world: World, ask: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generations, "_picture", stop)
        with pytest.raises(KeyboardInterrupt, match="12 of 12 samples are saved; the same command continues"):
            audit(ask(), target=world)
    assert Run(str(ask().out)).manifest.status == "interrupted"
    assert audit(ask(), target=world).manifest.status == "done"


def test_failed_seeds_leave_fewer_generations_to_compare(world: World, ask: Callable[..., AuditConfig]) -> None:
    world.broken = ("a bad one", 1)
    run = audit(ask(batch_size=12), target=world)
    assert run.manifest.status == "incomplete"
    assert [r.seed for r in run.rows() if r.status == "error"] == [1]
    assert {n for r in run.rows() for n in [s.generations for s in r.scores.values()] if r.prompt == "a bad one"} == {2}
    before = values(run)
    world.broken = None
    whole = audit(ask(batch_size=12), target=world)
    after = values(whole)
    assert whole.manifest.status == "done"
    bad = {r.id for r in whole.rows() if r.prompt == "a bad one"}
    assert {after[id][1] for id in bad} == {3}
    assert {id: v for id, v in after.items() if id not in bad} == {id: v for id, v in before.items() if id not in bad}
    # The attempt that failed stays a failed attempt.
    assert b'"status":"error"' in whole.files()[0].read_bytes()


def test_a_shard_that_is_still_writing(
    world: World, ask: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows cannot be amended under a writer; the sentence says to wait, and the same command ends it."""
    from mnemoscope.records import store

    def busy(path: Path, wait: float) -> Any:
        raise store.in_use(path.parent)

    plain, locks = store._sole_writer, iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(store, "_sole_writer", lambda path, wait: (busy if next(locks) else plain)(path, wait))
        with pytest.raises(RunError, match="is being written by another process; wait for it to end"):
            audit(ask(), target=world)
    assert Run(str(ask().out)).manifest.status == "incomplete"
    assert audit(ask(), target=world).manifest.status == "done"


# Judged like any other score


def ordinary(n: int) -> list[str]:
    return [f"ordinary prompt number {i}" for i in range(n)]


def test_thresholds_of_one_way_of_comparing_and_one_number_of_seeds(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    run, found = calibrate(ask(prompts=ordinary(25), out=str(tmp_path / "ordinary")), target=world, fpr=0.05)
    setting = found["density"].record.setting
    assert (setting["seeds"], setting["window"]) == (3, [0, 0])
    options = {"descriptor": "tiled", "count": "pairs", "identity": '{"tiles": 4}'}
    assert setting["method"] == {"name": "density", "class": "DensityDetector", "options": options}
    path = str(run.folder)
    summary = read_summary(audit(ask(calibration=path), target=world).folder)
    assert [f.prompt for f in summary.findings if f.above] == ["the mona lisa"]
    assert (summary.detector, summary.foreign) == ("density", [])
    page = write_report(tmp_path / "run").read_text()
    assert "score: density (picture-space)" in page
    for settings, difference in (
        ({"detectors": [{"name": "density", "near": 0.1}]}, "method.options.near: was null, now 0.1"),
        ({"detectors": [{"name": "density", "descriptor": "pixels"}]}, "method.options.descriptor"),
        ({"seeds": 4}, "seeds: was 3, now 4"),
    ):
        with pytest.raises(UsageError, match=difference):
            audit(ask(calibration=path, out=str(tmp_path / "other"), **settings), target=world)


def test_progress_does_not_trip_over_a_score_that_comes_last(
    world: World, ask: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    run, _ = calibrate(ask(prompts=ordinary(25), out=str(tmp_path / "ordinary")), target=world, fpr=0.05)
    seen: list[Progress] = []
    audit(ask(calibration=str(run.folder), batch_size=5), target=world, progress=seen.append)
    assert [p.done for p in seen] == [5, 10, 12]


# Where there is nothing to compare


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"images": False}, r"density compares generated pictures, and none are made; set images to true \(--images\)."),
        ({"seeds": 1}, "density compares the generations of a prompt with each other, and there is 1; set seeds to 2 or more."),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_before(
    world: World, ask: Callable[..., AuditConfig], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(CannotAudit, match=says):
        audit(ask(**settings), target=world)
    assert world.forwards == 0
    assert not os.path.exists(str(ask().out))


def test_a_picture_that_was_lost(world: World, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(prompts=["a cat"], seeds=2), target=world)
    lost, damaged = sorted((run.folder / "images").iterdir())
    damaged.write_bytes(b"RIFF")
    more = ask(prompts=["a cat"], seeds=3)
    with pytest.raises(RunError, match=r"is needed to compare generations and is no picture \(.*\); restore it"):
        audit(more, target=world)
    lost.unlink()
    damaged.unlink()
    with pytest.raises(RunError, match="is needed to compare generations and cannot be read"):
        audit(more, target=world)
    os.mkfifo(lost)
    damaged.symlink_to("/dev/zero")
    for name in (lost, damaged):
        with pytest.raises(RunError, match=r"cannot be read \(it (is no regular file|leads out of its folder)\)"):
            _picture(run, f"images/{name.name}")
    for path, side in ((lost, 8), (damaged, 16)):
        path.unlink()
        Image.new("RGB", (side, side)).save(path)
    with pytest.raises(RunError, match=r"the pictures of .a cat. in .* are of several sizes"):
        audit(more, target=world)
    assert Run(run.folder).manifest.status == "incomplete"


class Overflow(DensityDetector):
    def score(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().score(pictures) / 0


def test_a_comparison_that_is_not_finite(world: World, ask: Callable[..., AuditConfig]) -> None:
    assert isinstance(Overflow(), PictureDetector)
    with pytest.raises(ModelFault, match="density is not finite for 'a cat', though its pictures are"):
        audit(ask(), target=world, detectors=[Overflow()])
