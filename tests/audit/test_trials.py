"""The protocol of mitigations and the attack on them, in a world where it is known what is memorized."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mnemoscope.audit.memory import peak_memory
from mnemoscope.audit.mitigations import Protocol, frechet
from mnemoscope.audit.redteam import RedTeam
from mnemoscope.errors import UsageError
from mnemoscope.mitigate.base import Generation, sample
from mnemoscope.mitigate.redteam import attack
from mnemoscope.models.mixture import Mixture
from mnemoscope.models.noising import denoising_loss
from mnemoscope.records.trials import Case, Trial
from mnemoscope.report.mitigations import (
    Gate,
    Rows,
    attacks_table,
    groups_of,
    numbers,
    ordinary_table,
    tradeoff,
    worst_table,
)
from mnemoscope.similarity.reference import ReferenceSet
from whole import Whole

SHAPE = (3, 16, 16)
MEMORIZED = ("the mona lisa", "the starry night", "the scream")
ORDINARY = tuple(f"a {animal} {place}" for animal in ("cat", "dog", "hen") for place in ("here", "there"))
FOR_THE_GATE = tuple(f"picture number {i}" for i in range(60))


class Brightness:
    """A caption score that needs no network: how bright a picture is."""

    name = "brightness"

    def identity(self):
        return {"name": self.name}

    def __call__(self, images, captions):
        assert len(images) == len(captions)
        return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def world():
    return Mixture.world([*ORDINARY, *FOR_THE_GATE], MEMORIZED, rare=0.05, latent_shape=SHAPE)


def pictures(world):
    """What the memorized prompts draw, in [0, 1]."""
    return world.decode(world.points[: len(MEMORIZED)].float())


@pytest.fixture(scope="module")
def reference(world):
    found = ReferenceSet(list(MEMORIZED), Whole()(pictures(world)), Whole())
    found.threshold = 0.95
    return found


def protocol(world, reference, folder, **options):
    cases = [Case(p, p, "planted", p, p) for p in MEMORIZED] + [Case(p, p, "ordinary", p) for p in ORDINARY]
    options = {"seeds": 2, "steps": 8, "batch_size": 5, "real": torch.rand(12, *SHAPE), **options}
    return Protocol(world, cases, FOR_THE_GATE, reference, Brightness(), folder=folder, **options)


@pytest.fixture(scope="module")
def trial(world, reference, tmp_path_factory):
    run = protocol(world, reference, tmp_path_factory.mktemp("trial"))
    cells = [run.without(), run.cell("delayed-guidance", {"start": 0.05}), run.cell("delayed-guidance", {"start": 1.0})]
    return Trial(
        "mixture", run.cases, 2, 8, world.guidance, run.ordinary_sizes, "whole", "brightness", ["ordinary"], cells
    )


def test_memorized_prompts_copy_and_late_guidance_ends_it(trial):
    planted = Rows.of(trial, "planted")
    copies = [numbers(trial, cell, planted).copies.value for cell in trial.cells]
    assert copies[0] == 1.0
    assert copies[2] < 0.5
    assert all(numbers(trial, c, Rows.of(trial, "ordinary")).copies.value == 0 for c in trial.cells)


def test_nothing_changes_nothing(trial):
    n = numbers(trial, trial.cells[0], Rows.of(trial, "planted", "ordinary"))
    assert n.change.value == pytest.approx(0, abs=1e-5)
    assert n.loss.value == n.loss.low == n.loss.high == 0


def test_the_gate_leaves_ordinary_samples_as_they_are(trial):
    gate, rows = Gate.of(trial, fpr=0.05), Rows.of(trial, "ordinary")
    fires = gate.fires(trial.cells[0])
    assert fires[Rows.of(trial, "planted").index].all()
    gated = numbers(trial, trial.cells[2], rows, gate)
    assert gated.fired == pytest.approx(fires[rows.index].mean())
    assert gated.change.value <= numbers(trial, trial.cells[2], rows).change.value
    if not fires[rows.index].any():
        assert gated.change.value == 0


def test_a_finished_cell_is_not_sampled_again(world, reference, tmp_path):
    run = protocol(world, reference, tmp_path)
    first = run.cell("delayed-guidance", {"start": 0.5})
    before = world.forwards
    again = protocol(world, reference, tmp_path)
    assert again.cell("delayed-guidance", {"start": 0.5}) == first
    assert world.forwards == before
    assert torch.equal(again.pictures(first), run.pictures(first))
    assert again.cell("delayed-guidance", {"start": 0.6}) != first
    assert world.forwards > before


def test_another_setting_is_another_cell(world, reference, tmp_path):
    a, b = protocol(world, reference, tmp_path).without(), protocol(world, reference, tmp_path, seeds=3).without()
    assert len(b.copied) == 3 * len(a.copied) // 2


def test_costs_are_counted(trial):
    nothing, delayed = trial.cells[:2]
    assert nothing.forwards == delayed.forwards == 2 * 8
    assert nothing.backwards == 0
    assert nothing.seconds > 0


def test_one_sample_is_what_plain_sampling_gives(world, reference, tmp_path):
    run = protocol(world, reference, tmp_path)
    run.without()
    case, seed = run.samples[3]
    *_, last = sample(world, Generation.of(world, [case.prompt], [seed], steps=8))
    torch.testing.assert_close(run.plain_pictures[3], world.decode(last.x_next)[0], rtol=0, atol=1 / 255)


def test_tables_and_figure_say_what_the_numbers_say(trial):
    gate = Gate.of(trial, fpr=0.05)
    columns, rows = worst_table(trial, "planted")
    assert [r[0] for r in rows] == ["none", "delayed-guidance 0.05", "delayed-guidance 1"]
    assert rows[0][columns.index("copies")].startswith("100 %")
    assert all(len(r) == len(columns) for r in rows)
    columns, rows = ordinary_table(trial, gate)
    assert all(len(r) == len(columns) for r in rows)
    drawn = tradeoff(trial, "planted")
    assert "delayed-guidance" in drawn
    assert groups_of(trial) == ["planted", "ordinary"]


def test_a_trial_is_read_back_whole(trial, tmp_path):
    assert Trial.load(trial.save(tmp_path / "trial.json")) == trial
    (tmp_path / "torn.json").write_text(json.dumps({"cases": []})[:-3])
    with pytest.raises(UsageError, match="bench mitigations"):
        Trial.load(tmp_path / "torn.json")


def test_frechet_distance_of_gaussians():
    """Between N(μ, s²) and N(ν, r²) in one dimension: (μ − ν)² + (s − r)²."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        0.3 + 0.05 * torch.randn(4000, 3, 2, 2, generator=generator),
        0.6 + 0.1 * torch.randn(4000, 3, 2, 2, generator=generator),
    )
    found = frechet(a, b, lambda x: x[:, :2, 0, 0])
    assert found == pytest.approx(2 * (0.3**2 + 0.05**2), rel=0.05)
    assert frechet(a, a, lambda x: x[:, :2, 0, 0]) == pytest.approx(0, abs=1e-6)


def test_peak_memory_sees_what_is_allocated():
    with peak_memory(torch.device("cpu")) as little:
        pass
    with peak_memory(torch.device("cpu")) as much:
        np.ones(25_000_000)
    if little.megabytes is None:
        pytest.skip("this system does not tell")
    assert much.megabytes - little.megabytes > 150


# The attack.


def test_the_loss_vanishes_for_the_memorized_picture_alone(world):
    cond = world.encode(["the mona lisa", "a cat here"])
    x0, eps = (
        world.points[:1].float().expand(2, -1, -1, -1),
        torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)),
    )
    loss = denoising_loss(world, x0, torch.tensor([990, 990]), eps, cond)
    assert loss[0] < 1e-6
    assert loss[1] > 1e-3


def test_the_attack_finds_a_stored_picture_and_no_other(world):
    """From an ordinary prompt: the stored picture's loss falls to nothing, a picture that is not stored keeps its own."""
    other = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x0 = torch.cat([world.points[:1].float(), other])
    found, losses = attack(world, x0, world.encode(["a cat here"]).expand(2), (0, 1), steps=60, lr=0.1)
    assert losses[-10:, 0].mean() < 0.1 * losses[:10, 0].mean()
    assert losses[-10:, 1].mean() > 0.5 * losses[:10, 1].mean()
    assert len(found) == 2


def test_the_attack_does_not_depend_on_the_batch(world):
    x0, cond = world.points[:2].float(), world.encode(["a cat here", "a dog here"])
    both = attack(world, x0, cond, (5, 6), steps=5)[0].tokens
    alone = attack(world, x0[1:], cond.select(torch.tensor([1])), (6,), steps=5)[0].tokens
    torch.testing.assert_close(both[1:], alone)


def test_red_team(world, reference):
    """Late guidance hides the pictures; the attacked embedding is still one of a memorized picture, and controls stay away."""
    generator = torch.Generator().manual_seed(2)
    shown = world.decode(torch.rand(2, *SHAPE, generator=generator) * 2 - 1)
    controls = [Case(f"never {i}", ORDINARY[i], "control", str(i), f"never {i}") for i in range(2)]
    cases = [Case(p, p, "planted", p, p) for p in MEMORIZED]
    team = RedTeam(
        world, cases, pictures(world), controls, shown, reference, seeds=2, steps=8, updates=60, batch_size=4
    )
    none, words = team.against(), team.against("random-tokens", {"count": 8})
    assert all(none.before)
    assert sum(none.after) == len(none.after) == 6
    assert not any(none.controls)
    assert words.after == none.after  # an embedding has no words to edit
    assert len(none.size) == 6
    columns, rows = attacks_table(Trial("", [], 2, 8, 7.5, {"1": [0.0]}, "", "", [], [], [none]), Gate(1, 0.0))
    assert len(rows[0]) == len(columns)
    assert rows[0][-1] == "100 %"


def test_pictures_and_prompts_must_pair(world):
    with pytest.raises(UsageError, match="one of each"):
        attack(world, world.points[:2].float(), world.encode(["a cat"]), (0,))
