"""Samples computed again: the same model gives the same, and whatever is not the same is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mnemoscope.audit.batch import webp
from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.replay import Evidence, Replayed, _Comparison, choose, config_of, other_reference, replay
from mnemoscope.audit.run import audit, calibrate
from mnemoscope.detect.calibrate import Calibration
from mnemoscope.errors import UsageError
from mnemoscope.models.base import Condition
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.mixture import Mixture
from mnemoscope.records.schema import Manifest, Row, Thresholds
from mnemoscope.records.store import Run
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.similarity.reference import ReferenceSet
from mnemoscope.types import Latents

PROMPTS = ["a cat", "the mona lisa", "two dogs on a beach", ""]
SHAPE = (3, 16, 16)


@pytest.fixture
def world() -> Gaussian:
    return Gaussian.tiny(latent_shape=SHAPE)


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., AuditConfig]:
    def make(**settings: Any) -> AuditConfig:
        return AuditConfig(**({"prompts": PROMPTS, "seeds": 3, "steps": 6, "out": str(tmp_path / "run")} | settings))

    return make


def of(run: Run, **changes: Any) -> Evidence:
    file = run.folder / "thresholds.json"
    found = Thresholds.model_validate_json(file.read_bytes()) if file.exists() else None

    def picture(name: str) -> bytes | None:
        return (run.folder / name).read_bytes() if (run.folder / name).exists() else None

    return Evidence(
        **(
            {"name": "run", "manifest": run.manifest, "rows": run.rows, "thresholds": found, "picture": picture}
            | changes
        )
    )


def again(run: Run, target: Any, *ids: str, **more: Any) -> Replayed:
    evidence = of(run)
    return replay(evidence, choose(evidence, ids, everything=not ids), target, **more)


def edit(run: Run, number: int, change: Callable[[dict[str, Any]], None]) -> str:
    file = run.folder / "samples.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[number])
    change(row)
    lines[number] = json.dumps(row)
    file.write_text("\n".join(lines) + "\n")
    return row["id"]


def judged_at(run: Run, threshold: float) -> None:
    """A threshold wherever a test wants it."""
    setting = {"seeds": run.manifest.config["seeds"], "target": run.manifest.setting["target"]}
    Calibration.fit([threshold] * 99, setting, detector="magnitude").save(run.folder / "thresholds.json")


# The same


@pytest.mark.parametrize("kind", [Gaussian, Mixture])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance": 3.0, "detectors": [{"name": "magnitude", "steps": 4}]},
        {"seed_mode": "per-prompt", "base_seed": 7},
        {"images": True},
    ],
)
def test_the_same_model_gives_the_same(kind: Any, ask: Callable[..., AuditConfig], settings: dict[str, Any]) -> None:
    run = audit(ask(**settings), target=kind.tiny(latent_shape=SHAPE))
    found = again(run, kind.tiny(latent_shape=SHAPE))
    assert [r.outcome for r in found.rows] == ["same"] * 12
    assert (found.exit_code, found.flipped, found.borderline, found.accepted) == (0, 0, [], ())
    assert found.headline == "12 samples of run replayed: 12 the same (tolerance 0.00035); calls: unchanged."


def test_another_batch_is_within_tolerance(ask: Callable[..., AuditConfig]) -> None:
    world = Gaussian.tiny(latent_shape=SHAPE, dtype=torch.float32)
    run = audit(ask(images=True, batch_size=12), target=world)
    evidence = of(run)
    found = replay(evidence, choose(evidence, sample=5), world, config_of(run.manifest, batch_size=1))
    assert {r.outcome for r in found.rows} <= {"same", "within tolerance"}
    assert found.exit_code == 0
    assert any("batch_size: was 12, now 1" in note for note in found.notes)


def test_nothing_is_written_in_the_run_folder(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(images=True), target=world)

    def files() -> dict[str, tuple[bytes, int]]:
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(run.folder.rglob("*")) if p.is_file()}

    before = files()
    again(run, world)
    assert files() == before


def test_it_costs_what_an_audit_of_these_costs(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=world)
    assert again(run, world, next(run.rows()).id).forwards == 2  # one, and the null prediction of its seed


# Which


def test_ids_of_samples_and_prompts(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(prompts=[{"prompt": p, "id": f"p{i}"} for i, p in enumerate(PROMPTS)]), target=world)
    rows, evidence = list(run.rows()), of(run)
    assert choose(evidence, [rows[4].id]) == [rows[4]]
    assert choose(evidence, ["p2"]) == [r for r in rows if r.prompt_id == "p2"]
    assert choose(evidence, ["p2", rows[0].id])[0] == rows[0]
    drawn = choose(evidence, sample=5, seed=3)
    assert len(drawn) == 5
    assert drawn == choose(evidence, sample=5, seed=3) != choose(evidence, sample=5, seed=4)
    assert choose(evidence, sample=99) == choose(evidence, everything=True) == rows
    with pytest.raises(
        UsageError, match=r"'p9' is no sample and no prompt of it; take an id from samples\.jsonl of run"
    ):
        choose(evidence, ["p9"])


def test_what_failed_then_cannot_be_compared(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=world)
    failed = edit(run, 2, lambda row: row.update(status="error", scores={}, error="ModelFault: NaN"))
    evidence = of(run)
    assert len(choose(evidence, everything=True)) == 11
    with pytest.raises(UsageError, match="failed in the run"):
        choose(evidence, [failed])
    (run.folder / "samples.jsonl").write_text("")
    with pytest.raises(UsageError, match="no sample with a result"):
        choose(evidence)


# Not the same


def test_an_edited_score_differs(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(detectors=[{"name": "magnitude", "steps": 3}]), target=world)
    value = edit(
        run, 1, lambda row: row["scores"]["magnitude"].update(value=row["scores"]["magnitude"]["value"] * 1.01)
    )
    step = edit(run, 2, lambda row: row["scores"]["magnitude"]["per_step"].__setitem__(1, 0.0))
    found = again(run, world)
    differing = {r.id: r for r in found.rows if r.outcome == "differs"}
    assert differing.keys() == {value, step}
    assert differing[value].changes[0].difference == pytest.approx(0.0099, rel=0.01)
    assert [c.what for c in differing[step].changes if c.outcome == "differs"] == ["magnitude, step 1"]
    assert found.exit_code == 1
    assert "10 the same, 2 differs" in found.headline
    assert again(run, world, rtol=0.02).rows[1].outcome == "within tolerance"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: row.update(prompt="a dog"), "its id is not the one that its prompt, seed and setting give"),
        (lambda row: row.update(seed=2), "its id is not the one"),
        (lambda row: row.update(id="../../../outside"), "its id is not the one"),
        (lambda row: row.update(tokens_dropped=3), "3 tokens were dropped, now 0"),
        (lambda row: row["scores"]["magnitude"].update(space="velocity"), "was compared in velocity space, now in eps"),
    ],
)  # fmt: skip
def test_an_edited_row_differs(
    world: Gaussian,
    ask: Callable[..., AuditConfig],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    reason: str,
) -> None:
    run = audit(ask(images=True), target=world)
    edited = edit(run, 0, change)
    (row,) = again(run, world, edited).rows
    assert row.outcome == "differs"
    assert reason in row.reasons[0]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_another_model_is_refused_and_can_be_accepted(ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=Gaussian.tiny(latent_shape=SHAPE))
    other = Gaussian.tiny(latent_shape=SHAPE, spread=0.6)
    with pytest.raises(UsageError, match=r"is not the model of the run \(.*parameters: was .*--accept-model"):
        again(run, other)
    found = again(run, other, accept_model=True)
    assert any("parameters" in d for d in found.accepted)
    assert found.exit_code == 1
    assert found.headline.endswith("with another model than the recorded one.")
    assert not any("id" in reason for row in found.rows for reason in row.reasons)


def test_another_precision_is_another_model(ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=Gaussian.tiny(latent_shape=SHAPE))
    half = Gaussian.tiny(latent_shape=SHAPE, dtype=torch.float16)
    with pytest.raises(UsageError, match='dtype: was "float32", now "float16"'):
        again(run, half)
    found = again(run, half, accept_model=True)
    assert found.rtol == pytest.approx(2**-5)
    assert found.why == "rounding of a score in float16"
    assert found.exit_code == 0


def test_other_settings_are_refused(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=world)
    evidence = of(run)
    config = config_of(run.manifest).model_copy(update={"steps": 7})
    with pytest.raises(UsageError, match="settings that cannot be made again here \\(steps: was 6, now 7"):
        replay(evidence, choose(evidence), world, config)
    with pytest.raises(UsageError, match="must be a relative difference"):
        again(run, world, rtol=2.0)


def test_what_cannot_be_computed_is_no_agreement(ask: Callable[..., AuditConfig]) -> None:
    class Sick(Gaussian):
        sick = False

        def output(self, x: Latents, t: Tensor, cond: Condition | None) -> Latents:
            out = super().output(x, t, cond)
            if self.sick and cond is not None:
                out[cond.same_as(self.encode(["a cat"]))] = float("nan")
            return out

    world = Sick.tiny(latent_shape=SHAPE)
    run = audit(ask(), target=world)
    world.sick = True
    found = again(run, world)
    assert sorted(r.outcome for r in found.rows) == ["failed"] * 3 + ["same"] * 9
    assert "NaN" in found.rows[0].reasons[0]
    assert found.exit_code == 3
    edit(run, 5, lambda row: row["scores"]["magnitude"].update(value=99.0))
    assert again(run, world).exit_code == 1  # what differs, differs


# Calls


def test_a_borderline_call_is_named_and_not_turned(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=world)
    first = next(run.rows())
    judged_at(run, first.scores["magnitude"].value * (1 + 1e-5))
    found = again(run, world, first.id)
    (verdict,) = found.rows[0].verdicts
    assert (verdict.was, verdict.now, verdict.outcome) == (False, False, "borderline")
    assert found.borderline == [f"sample {first.id} (magnitude)"]
    assert (found.prompts, found.exit_code) == ({}, 0)
    edit(run, 0, lambda row: row["scores"]["magnitude"].update(value=row["scores"]["magnitude"]["value"] * (1 + 2e-5)))
    found = again(run, world, first.id)
    (verdict,) = found.rows[0].verdicts
    assert (verdict.was, verdict.now, verdict.outcome) == (True, False, "borderline")
    assert (found.rows[0].outcome, found.flipped, found.exit_code) == ("within tolerance", 0, 0)


def test_a_flipped_call_is_a_difference(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=world)
    first = next(run.rows())
    judged_at(run, first.scores["magnitude"].value * 1.5)
    edit(run, 0, lambda row: row["scores"]["magnitude"].update(value=row["scores"]["magnitude"]["value"] * 2))
    found = again(run, world, first.id)
    assert (found.rows[0].call, found.flipped, found.exit_code) == ("flipped", 1, 1)
    assert "calls: 1 flipped" in found.headline


def test_prompts_are_judged_when_all_their_seeds_are_there(world: Gaussian, ask: Callable[..., AuditConfig]) -> None:
    run = audit(ask(), target=world)
    rows = [row for row in run.rows() if row.prompt == "the mona lisa"]
    mean = sum(row.scores["magnitude"].value for row in rows) / 3
    judged_at(run, mean * (1 - 1e-6))
    found = again(run, world, rows[0].prompt_id)
    verdict = found.prompts[rows[0].prompt_id]
    assert (verdict.was, verdict.now, verdict.outcome) == (True, True, "borderline")
    assert found.borderline == [f"prompt {rows[0].prompt_id} (magnitude)"]  # what one seed alone would say is no call
    assert again(run, world, rows[0].id, rows[1].id).prompts == {}


def test_a_real_calibration(world: Gaussian, ask: Callable[..., AuditConfig], tmp_path: Path) -> None:
    ordinary = [f"prompt number {i}" for i in range(99)]
    calibrate(ask(prompts=ordinary, out=str(tmp_path / "c")), target=world)
    run = audit(ask(calibration=str(tmp_path / "c")), target=world)
    found = again(run, world)
    assert {found.prompts[row.prompt_id].now for row in run.rows() if row.prompt == "the mona lisa"} == {True}
    assert len(found.prompts) == 4


# Pictures and references


@pytest.fixture
def pictured(world: Gaussian, ask: Callable[..., AuditConfig]) -> tuple[Run, ReferenceSet]:
    known = ReferenceSet.of(
        ["mona", "cat"], world.decode(world.mean(world.encode(["the mona lisa", "a cat"]))), Pixels(8)
    )
    known.threshold = 0.9
    return audit(ask(images=True), target=world, reference=known), known


def test_the_nearest_reference_is_looked_up_again(world: Gaussian, pictured: tuple[Run, ReferenceSet]) -> None:
    run, known = pictured
    found = again(run, world, reference=known)
    assert {r.outcome for r in found.rows} == {"same"}
    assert all(any("similarity" in c.what for c in r.changes) for r in found.rows)
    assert any(v.what == "copy found" and v.now for r in found.rows for v in r.verdicts)
    edited = edit(run, 0, lambda row: row["nearest"].update(similarity=0.5, copy_found=False))
    (row,) = again(run, world, edited, reference=known).rows
    assert row.outcome == "differs"
    assert "similarity" in next(c.what for c in row.changes if c.outcome == "differs")


def test_layouts_are_compared_and_a_clear_copy_is_no_borderline_template(
    world: Gaussian, pictured: tuple[Run, ReferenceSet]
) -> None:
    run, _ = pictured

    def shared(copy: bool, similarity: float) -> Callable[[dict[str, Any]], None]:
        layout = {"layout": 0.5, "layout_reference": "cat", "layout_threshold": 0.5, "template_found": False}
        return lambda row: row["nearest"].update(layout, similarity=similarity, copy_found=copy)

    edit(run, 0, shared(True, 0.95))
    edit(run, 1, shared(False, 0.2))
    edit(run, 2, shared(True, 0.9))
    compare = _Comparison(of(run), lambda name: None, 1e-3, False)
    clear, template, close, *_ = (compare.row(row, row, row.id) for row in run.rows())
    assert {c.what for c in clear.changes} >= {"layout similarity"}
    assert [v.outcome for v in clear.verdicts] == ["same", "same"]
    assert [v.outcome for v in template.verdicts] == ["same", "borderline"]
    assert [v.outcome for v in close.verdicts] == ["borderline", "borderline"]


def test_a_reference_set_must_be_the_one_of_the_run(world: Gaussian, pictured: tuple[Run, ReferenceSet]) -> None:
    run, known = pictured
    assert "Nearest references were not compared" in again(run, world).notes[0]
    other = ReferenceSet(known.ids[:1], known.vectors[:1], known.descriptor, 0.9)
    assert other_reference(run.manifest, known) == []
    with pytest.raises(UsageError, match="the reference set is not the one of the run \\(pictures: was 2, now 1"):
        again(run, world, reference=other)


def test_a_changed_picture_differs(world: Gaussian, pictured: tuple[Run, ReferenceSet]) -> None:
    run, _ = pictured
    first, second, third, fourth, fifth, *_ = run.rows()

    def repaint(row: Row, change: Callable[[np.ndarray], np.ndarray]) -> None:
        path = run.folder / str(row.image)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        Image.fromarray(change(pixels).clip(0, 255).astype(np.uint8)).save(path, "WEBP", lossless=True)

    def one_pixel(pixels: np.ndarray) -> np.ndarray:
        pixels = pixels.copy()
        pixels[3, 4, 1] += 9 if pixels[3, 4, 1] < 128 else -9
        return pixels

    repaint(first, one_pixel)
    repaint(second, lambda pixels: pixels + np.where(pixels < 128, 1, -1))
    repaint(third, lambda pixels: pixels[:8])
    (run.folder / str(fourth.image)).unlink()
    (run.folder / str(fifth.image)).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    found = again(run, world)
    assert [r.outcome for r in found.rows[:5]] == ["differs", "within tolerance", "differs", "same", "differs"]
    assert any(c.what.startswith("picture, unreadable (unknown: in none of") for c in found.rows[4].changes)
    assert [c.difference for c in found.rows[0].changes if "picture" in c.what] == [9.0]
    assert "the recorded picture is not at hand" in found.rows[3].reasons


def test_pictures_kept_with_losses_are_compared_by_their_mean() -> None:
    """Coding turns last digits into many levels of single pixels; a large difference stays one."""
    rows, columns = torch.meshgrid(torch.linspace(0, 9, 256), torch.linspace(0, 7, 256), indexing="ij")
    picture = torch.stack([rows.sin(), columns.cos(), (rows * columns).sin()]) * 0.4 + 0.5
    picture += 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))

    def compared(other: Tensor) -> Any:
        evidence = Evidence("run", Manifest(), lambda: iter(()), picture=lambda name: webp(picture))
        (change,) = _Comparison(evidence, lambda name: webp(other), 3.5e-4, True)._picture("a", "b")
        return change

    close, far = compared(picture + 3e-5 * noise), compared(picture + 0.05 * noise)
    assert (close.outcome, far.outcome) == ("within tolerance", "differs")
    assert "mean" in close.what
    assert compared(picture).outcome == "same"
