"""Pictures that an audit measures after its prompts: resumed, bounded beforehand, joined in the report."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

from mnemoscope.audit.config import AuditConfig, MeasureSpec
from mnemoscope.audit.measures import LOCK
from mnemoscope.audit.plan import plan
from mnemoscope.audit.run import audit, calibrate
from mnemoscope.audit.stored import Job
from mnemoscope.errors import RunError, UnknownName, UsageError
from mnemoscope.measure.invmm import InvMM
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.records.measures import Measures
from mnemoscope.records.store import Run
from mnemoscope.report.html import write_json, write_markdown, write_report

SHAPE = (3, 16, 16)
PROMPTS = ["a cat", "the mona lisa"]


def point() -> torch.Tensor:
    """The memorized picture, in [-1, 1]."""
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def world():
    return Gaussian.world(["a cat"], memorized={"the mona lisa": point()}, latent_shape=SHAPE, betas="ddpm")


@pytest.fixture
def pictures(tmp_path, world):
    """The memorized picture, one of noise under an audited caption, and one under another."""
    stored = world.decode(point()[None])[0]
    noise = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    captions = ["the mona lisa", "a cat", "a <b>dog</b>"]
    for name, picture, caption in zip(("lisa", "cat", "dog"), [stored, *noise], captions, strict=True):
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
        lines.append(json.dumps({"image": f"{name}.png", "caption": caption}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def ask(tmp_path, pictures):
    def make(**settings):
        spec = {
            "name": "improved",
            "updates": 40,
            "steps": 6,
            "scales": [2.0],
            "descriptor": "fingerprint",
            "beta": 0.9,
        }
        given = {"prompts": PROMPTS, "seeds": 2, "steps": 8, "out": str(tmp_path / "run"), "measure": str(pictures),
                 "captions": str(tmp_path / "captions.jsonl"), "measure_preset": spec}  # fmt: skip
        return AuditConfig(**(given | settings))

    return make


def test_an_audit_measures_pictures_and_its_report_joins_them(ask, world):
    told = []
    run = audit(ask(), target=world, progress=told.append, command="mnemoscope audit …")
    assert run.manifest.status == "done"
    assert [p.note is not None for p in told[-3:]] == [True] * 3
    found = Measures.read(run.folder / "measures")
    assert found.request.command == "mnemoscope audit …"
    assert {Path(e.image).stem: e.status for e in found.entries} == {
        "lisa": "reproduced",
        "cat": "censored",
        "dog": "censored",
    }
    assert len(list((run.folder / "measures" / "pictures").glob("*.webp"))) == 3 * 5
    text = write_report(run.folder).read_text(encoding="utf-8")
    assert "Pictures measured with this model" in text
    assert "2 of 3 captions were audited" in text
    assert "Prompt scores and picture scores" in text
    assert "a &lt;b&gt;dog&lt;/b&gt;" in text
    assert "not audited" in text
    markdown = write_markdown(run.folder).read_text(encoding="utf-8")
    assert "**Pictures measured with this model**" in markdown
    (lisa,) = [line for line in markdown.splitlines() if line.startswith("| lisa.png | the mona lisa")]
    assert "reproduced after" in lisa
    assert not lisa.endswith("not audited |")
    (dog,) = [line for line in markdown.splitlines() if line.startswith("| dog.png")]
    assert dog.endswith("not audited |")
    facts = json.loads(write_json(run.folder).read_text(encoding="utf-8"))
    assert {Path(p["image"]).stem: p["status"] for p in facts["measured"]["pictures"]} == {
        Path(e.image).stem: e.status for e in found.entries
    }


def test_the_same_audit_goes_on_with_the_missing_pictures(ask, world, monkeypatch):
    def stop(progress):
        if progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(ask(), target=world, progress=stop)
    folder = Path(ask().out)
    assert Run(folder).manifest.status == "done"
    (kept,) = (folder / "measures" / "pictures").glob("*.json")
    before = kept.read_bytes()
    assert Measures.read(folder / "measures").waiting == 2
    assert "2 still to be measured" in write_report(folder).read_text(encoding="utf-8")
    audit(ask(), target=world)
    assert Measures.read(folder / "measures").waiting == 0
    assert kept.read_bytes() == before
    spent = world.forwards
    audit(ask(), target=world)
    assert world.forwards == spent


def test_a_dry_run_bounds_what_is_spent(ask, world):
    cost = plan(ask(), target=world)
    assert cost.measured == 3
    before = world.forwards
    audit(ask(), target=world)
    entries = Measures.read(Path(ask().out) / "measures").entries
    assert sum(e.numbers.backwards for e in entries) <= cost.most_backwards
    assert world.forwards - before <= cost.forwards + cost.most_forwards
    assert cost.most_backwards == 3 * 40 * Job.of(ask(), world).method.preset.batch
    assert plan(ask(measure=None, captions=None), target=world).measured == 0


def test_a_calibration_measures_nothing(ask, world, tmp_path):
    run, _ = calibrate(ask(prompts=[f"prompt {i}" for i in range(120)], seeds=1, out=str(tmp_path / "c")), target=world)
    assert not (run.folder / "measures").exists()


def test_a_folder_remembers_what_was_asked_for_under_one_setting(ask, world, pictures, tmp_path):
    """Pictures of several calls are reported together, those of another setting are not; levels that were put there stay."""
    out = tmp_path / "measures"
    few = {"name": "improved", "updates": 4, "steps": 4, "scales": [2.0], "beta": 0.99}

    def measure(name, **changes):
        Job.of(ask(measure=str(pictures / name), measure_preset=few | changes), world).measure(
            out, command=f"measure {name}"
        )
        return Measures.read(out)

    assert [Path(e.image).name for e in measure("cat.png").entries] == ["cat.png"]
    file = out / "measure.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"levels": {"48": [0.01]}}))
    found = measure("dog.png")
    assert {Path(e.image).name for e in found.entries} == {"cat.png", "dog.png"}
    assert found.request.command == "measure dog.png"
    assert found.levels().scores == {48: [0.01]}
    other = measure("cat.png", updates=5)
    assert [Path(e.image).name for e in other.entries] == ["cat.png"]
    assert other.levels().scores == {}
    assert len(list((out / "pictures").glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"measure_preset": "improved"}, "calibrated similarity .* write measure_preset: {name: improved, beta: 0.85}"),
        ({"measure": None}, "captions are those of pictures to measure"),
        ({"shard": "0/2"}, "pictures are measured by one process"),
        ({"measure": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_computed(ask, world, settings, says):
    with pytest.raises(UsageError, match=says):
        audit(ask(**settings), target=world)
    assert not Path(ask().out).exists()
    assert world.forwards == 0


def test_a_preset_in_short_and_in_full(ask, world):
    assert AuditConfig(measure_preset="official").measure_preset == MeasureSpec(name="official")
    job = Job.of(ask(), world)
    assert job.method.preset.updates == 40
    assert job.method.preset.scales == (2.0,)
    with pytest.raises(UnknownName, match="no preset named 'improvd'"):
        Job.of(ask(measure_preset={"name": "improvd", "beta": 0.5}), world)
    with pytest.raises(UsageError, match=r"measure_preset\.scales is 0\.5"):
        ask(measure_preset={"scales": [0.5]})
    with pytest.raises(UnknownName, match="no setting of measure_preset named 'upates'"):
        ask(measure_preset={"upates": 3})


def test_a_second_command_that_measures_into_the_same_folder_is_refused(ask, world):
    audit(ask(measure=None, captions=None), target=world)
    folder = Path(ask().out) / "measures"
    folder.mkdir()
    with FileLock(folder / LOCK, timeout=0), pytest.raises(RunError, match="is being written by another process"):
        audit(ask(), target=world)
    assert not (folder / "measure.json").exists()
    audit(ask(), target=world)
    assert Measures.read(folder).waiting == 0


@pytest.mark.skipif(os.name != "posix", reason="files that are open stay where they are")
def test_measuring_ends_where_its_folder_is_deleted(ask, world, monkeypatch):
    folder = Path(ask().out) / "measures"
    measure = InvMM.__call__

    def measured(*given, **more):
        found = measure(*given, **more)
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(InvMM, "__call__", measured)
    with pytest.raises(RunError, match="was deleted or emptied while this command wrote to it"):
        audit(ask(), target=world)
    assert not folder.exists()
