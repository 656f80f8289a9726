"""The laboratory: how findings are put into pages, how censored scores are ranked, and one study from end to end."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from mnemoscope.demo.world import World
from mnemoscope.errors import UsageError
from mnemoscope.lab import duplication, pages, protection, sizes, stored
from mnemoscope.lab.__main__ import STUDIES
from mnemoscope.lab.pages import Finding
from mnemoscope.measure.invmm import varied
from mnemoscope.models.load import load
from mnemoscope.train.config import TrainConfig


def test_a_finding_replaces_its_block_and_nothing_else(tmp_path):
    (tmp_path / "page.md").write_text("before\n<!-- one -->\nold\n<!-- /one -->\nafter\n", encoding="utf-8")
    finding = Finding("one", "page.md", "new ± figures\n", {"a": [1, None]}, "<svg></svg>")
    for _ in range(2):  # a second time changes nothing more
        pages.write(tmp_path, finding)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text == "before\n<!-- one -->\nnew ± figures\n\n![one](one.svg)\n<!-- /one -->\nafter\n"
    assert json.loads((tmp_path / "one.json").read_text()) == {"a": [1, None]}
    assert (tmp_path / "one.svg").read_text() == "<svg></svg>"


@pytest.mark.parametrize("text", ["no block\n", "<!-- one --> never closed\n", None])
def test_a_page_without_the_block_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "page.md").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="has no block <!-- one -->"):
        pages.write(tmp_path, Finding("one", "page.md", "x"))
    assert text is None or (tmp_path / "page.md").read_text(encoding="utf-8") == text


def test_censored_scores_rank_last_and_together():
    inf = math.inf
    assert stored._low_is_stored(np.array([0.2, inf, 0.1])).argsort().tolist() == [1, 0, 2]
    falling = np.array([[inf, 0.0], [inf, 0.0], [0.3, 1.0], [0.1, 2.0]])
    assert stored._rho(falling) == pytest.approx(-1)
    assert stored._rho(np.array([[inf, 0.0], [inf, 1.0]])) == 0  # nothing to rank
    assert stored._spread([0.1, 0.2], inf, 5) == "0.1000, censored, 0.2000 (reproduced)"
    assert stored._spread([], inf, 3) == "–"


def test_studies_want_a_model_that_is_known(tmp_path):
    for name in ("copies", "membership", "replication", "samplers"):
        with pytest.raises(UsageError, match="use one of demo, demo-unconditional"):
            STUDIES[name]("some/model", tmp_path, 1)
    with pytest.raises(UsageError, match="holds no pipelines"):
        STUDIES["steps"](str(tmp_path), tmp_path, 1)


def test_a_screen_is_judged_by_the_reproduced_pictures_that_it_lets_through():
    passed = np.array([True, True, False, False])
    scores = np.array([4.0, 1.0, 3.0, 2.0])
    assert [cell.split(" [")[0] for cell in stored._missed("x", scores, passed)[1:]] == ["1 of 2", "1 of 2"]
    assert [cell.split(" [")[0] for cell in stored._missed("x", -scores, passed)[1:]] == ["1 of 2", "1 of 2"]
    assert [cell.split(" [")[0] for cell in stored._missed("x", scores * passed, passed)[1:]] == ["2 of 2", "2 of 2"]


def test_training_sets_of_the_size_study_are_nested_and_hold_one_picture_of_a_concept_first(tmp_path):
    world = World("unconditional")
    order = sizes._order(world)
    assert order == sizes._order(world)
    assert len({row.picture for row in order}) == len(order) >= sizes.SIZES[-1]
    assert len({row.concept for row in order[: sizes.SIZES[0]]}) == sizes.SIZES[0]
    assert not {row.picture for row in order} & {row.picture for row in world.of("heldout")}
    with pytest.raises(UsageError, match="name that one"):
        sizes.sizes("demo", tmp_path, 1)
    with pytest.raises(UsageError, match="the smallest set holds 48; ask for fewer"):
        sizes.sizes("demo-unconditional", tmp_path, 49)


def test_checkpoints_that_are_measured_double(tmp_path):
    for step in (*range(1000, 7000, 1000), 0):
        (tmp_path / f"{step:05d}").mkdir()
        if step:
            (tmp_path / f"{step:05d}" / "model_index.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert [p.name for p in stored._doubling(tmp_path)] == ["01000", "02000", "04000", "06000"]


@pytest.mark.slow
def test_a_model_of_the_size_study_goes_on_where_it_was_stopped(tmp_path):
    world = World("unconditional")
    rows = sizes._order(world)[:8]
    whole = load(str(sizes.train(world, rows, tmp_path / "whole", steps=4)))
    assert whole.latent_shape == (8, 8, 8)
    before = (tmp_path / "whole" / "training.pt").stat().st_mtime_ns
    sizes.train(world, rows, tmp_path / "whole", steps=4)
    assert (tmp_path / "whole" / "training.pt").stat().st_mtime_ns == before


def test_pictures_of_the_protection_study(tmp_path):
    world = World()
    repeated, others, ordinary, clean = protection.chosen(world)
    assert (len(repeated), len(others), len(ordinary), len(clean)) == (12, 720, 24, 40)
    every = repeated + others + ordinary + clean
    assert len({row.picture for row in every}) == len({row.concept for row in every}) == len(every)
    # The model knows them all, each as well as any other.
    assert {row.group for row in every} == {"ordinary"}
    assert len({row.draws for row in every}) == 1
    rows = [*((row, 24) for row in repeated[:2]), *((row, 1) for row in others[:3])]
    folder = protection.folder_of(world, rows, tmp_path / "pictures")
    assert len(list(folder.glob("*.png"))) == 2 * 24 + 3
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {line["text"] for line in lines} == {row.caption for row in repeated[:2] + others[:3]}
    for settings in protection.VARIANTS.values():
        TrainConfig(model="demo", data=str(folder), out=str(tmp_path / "out"), **settings)
    assert set(protection.LESS) < set(protection.VARIANTS)
    assert len({json.dumps(settings) for settings in protection.VARIANTS.values()}) == len(protection.VARIANTS)
    with pytest.raises(UsageError, match="name demo"):
        protection.protection("demo-unconditional", tmp_path, 1)
    # What is to be forgotten is stored, and lies in no other list.
    stored_pictures = world.of("planted", copies=protection.STORED_COPIES)[: protection.REPEATED]
    assert len(stored_pictures) == protection.REPEATED
    assert not {row.concept for row in stored_pictures} & {row.concept for row in every}


@pytest.mark.slow
def test_the_protection_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    for name, value in (
        ("REPEATED", 2),
        ("COPIES", 3),
        ("OTHERS", 14),
        ("ORDINARY", 2),
        ("CLEAN", 4),
        ("STEPS", 2),
        ("SAMPLER", 2),
    ):
        monkeypatch.setattr(protection, name, value)
    some = {
        k: v
        for k, v in protection.VARIANTS.items()
        if k
        in (
            protection.UNPROTECTED,
            "filter, τ = 1",
            "filter, τ(t) from 25% of clean samples on",
            "near-duplicates dropped",
        )
    }
    monkeypatch.setattr(protection, "VARIANTS", some)
    finding = protection.protection("demo", tmp_path, 2)
    assert set(finding.facts) == {*some, "not fine-tuned"}
    assert all(len(made) == 2 for name, made in finding.facts.items() if name != "not fine-tuned")
    assert finding.text.count("\n| ") == 1 + 1 + 4
    assert finding.plot.count("<circle") == 2 * 5  # the untrained model is in it
    capsys.readouterr()
    again = protection.protection("demo", tmp_path, 2)
    assert again.facts == finding.facts


def test_a_known_law_is_found_again():
    rng = np.random.default_rng(3)
    copies = np.repeat([2, 4, 10, 24, 48], 60)
    hits = rng.binomial(duplication.SEEDS, 1 / (1 + (8 / copies) ** 2.0))
    found = duplication.law(copies, hits, resamples=200)
    assert found["slope"].low < 2.0 < found["slope"].high
    assert found["half"].low < 8.0 < found["half"].high
    assert found["half"].high / found["half"].low < 1.5
    # Every resample of pictures that one threshold separates has a law, too.
    steep = duplication.law(np.array([2, 4, 10, 24]), np.array([0, 0, 4, 4]), resamples=50)
    assert 4 < steep["half"].value < 10
    # Where copies make no difference, no number of them is half-way.
    flat = duplication.law(np.array([2, 4, 10, 24]), np.array([2, 1, 1, 0]), resamples=50)
    assert flat["half"].value == math.inf


@pytest.mark.slow
def test_the_duplication_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(duplication, "SAMPLER", 4)
    finding = duplication.duplication("demo", tmp_path, 1)
    assert finding.text.count("\n| ") == 1 + 6
    assert "| held out | 1 | 0.0%" in finding.text
    assert finding.plot.count("<circle") == 2 * 6
    assert "drawn" in capsys.readouterr().out
    again = duplication.duplication("demo", tmp_path, 1)
    assert again.facts == finding.facts
    assert "drawn" not in capsys.readouterr().out
    with pytest.raises(UsageError, match="name demo"):
        duplication.duplication("demo-unconditional", tmp_path, 1)


@pytest.fixture
def quick(monkeypatch):
    """A budget of seconds; figures mean nothing under it."""

    def least(target, name="improved"):
        return varied(target, name, updates=16, steps=3, preview=2, confirm=4, search=2)

    monkeypatch.setattr(stored, "varied", least)
    monkeypatch.setattr(stored, "NATURAL", 64)


@pytest.mark.slow
def test_every_study_of_the_bundled_model(quick, tmp_path, capsys):
    """Each finding says what was measured and names all its levels; a second call measures nothing again."""
    copies = stored.copies("demo-unconditional", tmp_path, 1)
    for level in ("320", "80", "20", "5", "1"):
        assert f"| {level} copies | " in copies.text
    assert "| held out | " in copies.text
    assert re.search(r"Spearman's ρ .*: -?\d\.\d\d \[", copies.text)
    assert len(copies.facts["pictures"]) == 7
    assert copies.plot.count("<circle") == 7
    capsys.readouterr()
    assert stored.copies("demo-unconditional", tmp_path, 1).facts == copies.facts
    assert capsys.readouterr().out == ""

    replication = stored.replication("demo-unconditional", tmp_path, 1)
    assert replication.facts["samples"] == 64
    assert len(replication.facts["pictures"]) == 5
    membership = stored.membership("demo-unconditional", tmp_path, 2)
    assert set(membership.facts) == {"InvMM", *stored.MEMBERSHIP}
    samplers = stored.samplers("demo-unconditional", tmp_path, 1)
    assert "DDPM, 50 steps" in samplers.facts
    assert len({len(rates) for rates in samplers.facts.values()}) == 1
