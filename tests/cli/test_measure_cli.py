"""``mnemoscope measure``: what a person types and reads, and that an interrupted run goes on."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mnemoscope.audit.companions import Screen, compared
from mnemoscope.audit.measures import Picture, measured, pictures_in
from mnemoscope.errors import CannotAudit, RunError, UsageError
from mnemoscope.measure.base import build
from mnemoscope.measure.denoising_loss import DenoisingLoss
from mnemoscope.measure.invmm import InvMM, varied
from mnemoscope.models.mixture import Mixture
from mnemoscope.records.measures import Levels, Measures
from mnemoscope.report.measured import missed_words, untested
from mnemoscope.similarity.pixels import Pixels

SHAPE = (3, 16, 16)


@pytest.fixture
def world():
    points = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Mixture.memorizer(points, betas="ddpm")


@pytest.fixture
def folder(tmp_path, world):
    """Three pictures that the world has memorized, and one that it has not."""
    shown = world.decode(world.points[:3].float())
    shown = torch.cat([shown, torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1))])
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate((shown * 255).round().byte().permute(0, 2, 3, 1)):
        Image.fromarray(picture.numpy()).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def method(world, **changes):
    return InvMM(world, Pixels(16), varied(world, "improved", steps=15, updates=100, **changes), beta=0.5)


def test_stored_pictures_come_back_and_another_does_not(world, folder, tmp_path):
    found = measured(method(world), pictures_in([folder]), tmp_path / "out")
    assert [m.result["passed"] for m in found] == [True, True, True, False]
    assert found[3].score == float("inf")
    assert found[3].result["paid"] > 0
    assert all(
        m.result["preset"] == "improved with steps 15, updates 100" or "steps 15" in m.result["preset"] for m in found
    )


def test_a_kill_loses_nothing_but_the_running_batch(world, folder, tmp_path):
    pictures, out = pictures_in([folder]), tmp_path / "out"

    class Killed(Exception):
        pass

    def kill(done, asked, m):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        measured(method(world), pictures, out, batch_size=2, progress=kill)
    kept = {p: p.read_bytes() for p in (out / "pictures").glob("*.json")}
    assert len(kept) == 3
    told = []
    found = measured(method(world), pictures, out, batch_size=2, progress=lambda *a: told.append(a[0]))
    assert told == [4]
    assert all(p.read_bytes() == data for p, data in kept.items())
    whole = measured(method(world), pictures, tmp_path / "whole", batch_size=4)
    for a, b in zip(found, whole, strict=True):
        assert a.id == b.id
        assert a.result["update"] == b.result["update"]
        assert a.result["paid"] == pytest.approx(b.result["paid"], rel=1e-3)


DAMAGES = (
    b"{",
    b"[]",
    b"{}",
    b'{"value": 1, "value": 2}',
    b'{"id": "x", "name": "flipd", "value": "x", "options": {}}',
)


@pytest.mark.parametrize("kind", ["pictures", "companions"])
def test_what_was_kept_and_is_damaged_is_named(world, folder, tmp_path, kind):
    pictures, out = pictures_in([folder / "0.png"]), tmp_path / "out"
    cheap = [DenoisingLoss(draws=2)]
    (whole,) = measured(method(world), pictures, out, companions=cheap)
    assert measured(method(world), pictures, out, companions=cheap) == [whole]
    (file,) = (out / kind).glob("*.json")
    for damage in DAMAGES:
        file.write_bytes(damage)
        with pytest.raises(RunError, match=f"{file.name} (cannot be read|is no|is of)"):
            measured(method(world), pictures, out, companions=cheap)
    file.unlink()
    assert measured(method(world), pictures, out, companions=cheap) == [whole]


def test_another_setting_overwrites_nothing(world, folder, tmp_path):
    pictures = pictures_in([folder / "0.png"])
    (a,), (b,) = (measured(method(world, draws=n), pictures, tmp_path / "out") for n in (8, 4))
    assert a.id != b.id
    assert len(list((tmp_path / "out" / "pictures").glob("*.json"))) == 2


def test_the_command_on_the_bundled_model(run, tmp_path):
    from mnemoscope.demo.world import World

    world = World()
    row = world.of("planted", copies=48)[0]
    picture = world.pictures([row.picture])[0]
    file = tmp_path / "a.png"
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    words = [
        "measure",
        "demo",
        file,
        "--caption",
        row.caption,
        "--updates",
        50,
        "--steps",
        10,
        "--scales",
        "3",
        "--out",
        tmp_path / "out",
    ]
    code, out, err = run(*words)
    assert code == 0
    header, line = out.splitlines()[:2]
    assert header.split("\t")[:2] == ["picture", "nats per dimension"]
    assert line.startswith("a.png\t")
    assert "Low is strongly stored" in err
    code, again, err = run(*words, "--json")
    assert code == 0
    assert "1/1" not in err  # it is kept
    (found,) = json.loads(again)
    assert found["caption"] == row.caption
    assert "with updates 50" in found["result"]["preset"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo", "nowhere.png"], "nowhere.png does not exist"),
        (["some/model", "a.png"], "--beta"),
        (["demo", "a.png", "--caption", "a", "--captions", "b"], "give one of them"),
        (["demo", "a.png", "--with", "flipt"], "no measure named 'flipt'. Did you mean 'flipd'"),
        (["demo", "a.png", "--screen", "secmy"], "Did you mean 'secmi'"),
        (["demo", "a.png", "--only", "flipd", "--with", "secmi"], "leave them out"),
        (["demo", "a.png", "--only", "flipd", "--screen", "secmi"], "leave them out"),
        (["demo", "a.png", "--only", ","], "--only flipd"),
        (["demo", "a.png", "--screen-share", "0.1"], "--screen flipd"),
        (["demo", "a.png", "--screen", "flipd", "--screen-share", "0"], "above 0 and at most 1"),
        (["demo", "a.png", "--scales", "0.5"], "guidance scales, each a number from 1 to 1000"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run, words, says):
    code, _, err = run("measure", *words)
    assert code == 2
    assert says in err


# Cheap companions


def rows_of(out):
    return {p.name: json.loads(p.read_bytes()) for p in (out / "pictures").glob("*.json")}


def test_companions_are_kept_beside_the_result_and_change_no_id(world, folder, tmp_path):
    pictures, out = pictures_in([folder]), tmp_path / "out"
    plain = measured(method(world), pictures, out)
    noise = {p.name: p.read_bytes() for p in (out / "pictures").glob("*.safetensors")}
    before, told = world.forwards, []
    loss, flipd = DenoisingLoss(draws=4), build("flipd")
    found = measured(
        method(world),
        pictures,
        out,
        companions=[loss, flipd],
        progress=lambda *a: told.append(a),
        compare=lambda *a: told.append(a),
    )
    assert told == [("denoising-loss", 4, 4), ("flipd", 4, 4)]  # InvMM had been done
    assert world.forwards - before == 4 * (loss.forwards + flipd.forwards)
    assert [m.id for m in found] == [m.id for m in plain]
    assert [m.result for m in found] == [m.result for m in plain]
    assert {p.name: p.read_bytes() for p in (out / "pictures").glob("*.safetensors")} == noise
    for m, row in zip(found, (rows_of(out)[f"{m.id}.json"] for m in found), strict=True):
        assert row["companions"] == m.companions
        assert set(m.companions) == {"denoising-loss", "flipd"}
        assert row["status"] == "measured"
    assert max(m.companions["flipd"] for m in found[:3]) < found[3].companions["flipd"]
    # Without them it goes on, and forgets none.
    assert measured(method(world), pictures, out) == found


def test_a_screen_measures_the_most_suspicious_share(world, folder, tmp_path):
    pictures, out = pictures_in([folder]), tmp_path / "out"
    screen, told = Screen(build("flipd"), 0.5), []
    found = measured(
        method(world), pictures, out, screen=screen, progress=lambda done, asked, m: told.append((done, asked))
    )
    ranks = sorted(range(4), key=lambda i: found[i].companions["flipd"])
    assert {i for i in range(4) if found[i].status == "measured"} == set(ranks[:2])
    assert told == [(1, 2), (2, 2)]
    kept, left = [found[i] for i in ranks[:2]], [found[i] for i in ranks[2:]]
    for m in left:
        row = rows_of(out)[f"{m.id}.json"]
        assert (row["status"], row["result"]) == ("screened out", None)
        assert row["screen"] == {"name": "flipd", "options": {"time": 50, "probes": 8}, "share": 0.5}
        assert m.score != m.score  # not known, and not censored
        assert not (out / "pictures" / f"{m.id}.safetensors").exists()
    # A result is that of a run without a screen, id and all.
    whole = measured(method(world), pictures, tmp_path / "whole")
    assert [m.id for m in whole] == [m.id for m in found]
    for m in kept:
        (same,) = [w for w in whole if w.id == m.id]
        assert same.result["paid"] == pytest.approx(m.result["paid"], rel=1e-3)
    # What reads the folder tells them apart.
    read = Measures.read(out)
    assert (read.count("screened out"), read.waiting) == (2, 0)
    assert {e.id: e.companions for e in read.entries} == {m.id: m.companions for m in found}


def test_what_was_screened_out_is_measured_once_it_is_let_through(world, folder, tmp_path):
    pictures, out = pictures_in([folder]), tmp_path / "out"
    narrow = measured(method(world), pictures, out, screen=Screen(build("flipd"), 0.25))
    spent = world.forwards
    wide, told = measured(method(world), pictures, out, screen=Screen(build("flipd"), 0.75)), []
    assert [sum(m.status == "measured" for m in found) for found in (narrow, wide)] == [1, 3]
    cost = world.forwards - spent
    assert cost > 0
    # A narrower screen takes nothing back, and no screen measures the rest.
    again = measured(method(world), pictures, out, screen=Screen(build("flipd"), 0.25))
    assert [(m.status, m.result) for m in again] == [(m.status, m.result) for m in wide]
    assert world.forwards == spent + cost
    everything = measured(method(world), pictures, out, progress=lambda done, asked, m: told.append((done, asked)))
    assert told == [(4, 4)]
    assert all(m.status == "measured" and "flipd" in m.companions for m in everything)


def test_a_screen_is_checked_with_some_of_those_that_it_leaves_out(world, folder, tmp_path):
    pictures, out = pictures_in([folder]), tmp_path / "out"
    screen, told = Screen(build("flipd"), 0.25, check=2), []
    found = measured(method(world), pictures, out, screen=screen, progress=lambda *told_: told.append(told_[:2]))
    assert told == [(1, 3), (2, 3), (3, 3)]
    left_out = [m for m in found if m.checked or m.status != "measured"]
    assert len(left_out) == 3
    assert (
        sorted(m.id for m in left_out if m.checked) == sorted(m.id for m in left_out)[:2]
    )  # by their digests, not by rank
    spent = world.forwards
    again = measured(method(world), pictures, out, screen=screen)
    assert ([m.id for m in again if m.checked], world.forwards) == ([m.id for m in found if m.checked], spent)
    read = Measures.read(out)
    reproduced = [e.status == "reproduced" for e in read.entries if e.checked]
    assert missed_words(reproduced) in untested(read, Levels({}))
    assert f"{sum(reproduced)} of 2" in missed_words(reproduced) or "none found among 2" in missed_words(reproduced)
    # What a wider screen lets through checks nothing any more.
    assert not any(m.checked for m in measured(method(world), pictures, out))
    with pytest.raises(UsageError, match="must be a whole number from 0"):
        Screen(build("flipd"), 0.25, check=-1)


def test_a_kill_while_screening_loses_nothing_but_the_running_batch(world, folder, tmp_path):
    pictures, out = pictures_in([folder]), tmp_path / "out"

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    screen = Screen(DenoisingLoss(draws=3), 0.25)
    with pytest.raises(Killed):
        measured(method(world), pictures, out, batch_size=3, screen=screen, compare=kill)
    assert len(list((out / "companions").glob("*.json"))) == 3
    assert not rows_of(out)
    with pytest.raises(Killed):
        measured(method(world), pictures, out, screen=screen, progress=kill)
    assert len(rows_of(out)) == 4
    before = world.forwards
    found = measured(method(world), pictures, out, screen=screen)
    assert world.forwards == before
    assert sum(m.status == "measured" for m in found) == 1


def test_options_and_models_have_values_of_their_own(world, folder, tmp_path):
    pictures = pictures_in([folder])
    a, b = (compared([DenoisingLoss(draws=n)], world, pictures, tmp_path)[0]["denoising-loss"] for n in (2, 3))
    assert a != b
    again = world.forwards
    assert compared([DenoisingLoss(draws=2)], world, pictures, tmp_path)[0]["denoising-loss"] == a
    assert world.forwards == again
    other = Mixture.memorizer(world.points[:4].float(), betas="ddpm")
    compared([DenoisingLoss(draws=2)], other, pictures, tmp_path)
    assert other.forwards == 2 * len(pictures)


class Odd:
    """A measure that has no value for the first picture."""

    name, reads, low_is_stored, needs, forwards, backwards = "odd", "nothing", False, frozenset(), 0, 0

    def __call__(self, target, images, *, prompts=None, keys=None):
        return torch.tensor([float("nan"), 1.0, 3.0, 2.0])[: len(images)]


def test_what_has_no_value_is_not_screened_out(world, folder, tmp_path):
    values = compared([Odd()], world, pictures_in([folder]), tmp_path)
    assert [v["odd"] for v in values] == [None, 1, 3, 2]
    assert Screen(Odd(), 0.25).kept(values) == {0}
    assert Screen(Odd(), 0.5).kept(values) == {0, 2}
    assert Screen(Odd(), 0.07).kept([{"odd": float(i)} for i in range(100)]) == set(range(93, 100))
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            Screen(Odd(), share)


def test_captions_for_a_model_without_text_are_refused(world, folder, tmp_path):
    told = [Picture(folder / "0.png", "a cat")]
    with pytest.raises(CannotAudit, match=r"takes no text, and 0\.png has a caption; leave captions out"):
        measured(method(world), told, tmp_path / "out")
    with pytest.raises(CannotAudit, match="takes no text"):
        compared([DenoisingLoss()], world, told, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bundled(tmp_path):
    """Three pictures of the bundled world, as files."""
    from mnemoscope.demo.world import World

    world = World()
    rows = [*world.of("planted", copies=48)[:1], *world.of("heldout")[:2]]
    (tmp_path / "shown").mkdir()
    for i, picture in enumerate((world.pictures([r.picture for r in rows]) * 255).round().byte().permute(0, 2, 3, 1)):
        Image.fromarray(picture.numpy()).save(tmp_path / "shown" / f"{i}.png")
    return tmp_path / "shown"


BRIEF = ("--updates", 50, "--steps", 5, "--scales", "3")


def test_the_command_with_companions_alone(run, bundled, tmp_path):
    words = [
        "measure",
        "demo",
        bundled,
        "--only",
        "denoising-loss, secmi",
        "--only",
        "secmi",
        "--out",
        tmp_path / "out",
    ]
    code, out, err = run(*words)
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[0] == ["picture", "denoising-loss", "secmi"]
    assert [float(line[1]) for line in lines[1:]] == sorted(float(line[1]) for line in lines[1:])
    assert "denoising-loss: 3/3 pictures" in err
    assert "low is stored. No threshold comes with it." in err
    assert not (tmp_path / "out" / "measure.json").exists()
    code, again, err = run(*words, "--json")
    found = json.loads(again)
    assert {f["image"] for f in found} == {str(bundled / f"{i}.png") for i in range(3)}
    assert all(set(f["companions"]) == {"denoising-loss", "secmi"} for f in found)
    assert "3/3" not in err  # they are kept


def test_the_command_with_a_screen(run, bundled, tmp_path):
    words = [
        "measure",
        "demo",
        bundled,
        *BRIEF,
        "--screen",
        "denoising-loss",
        "--screen-share",
        "0.3",
        "--with",
        "secmi",
    ]
    code, out, err = run(*words, "--out", tmp_path / "out")
    assert code == 0
    header, first, *rest = (line.split("\t") for line in out.splitlines())
    assert header[-2:] == ["secmi", "denoising-loss"]
    assert first[3] != "screened out"
    assert [line[1:6] for line in rest] == [["–", "–", "screened out", "–", "–"]] * 2
    assert float(first[-1]) <= float(rest[0][-1]) <= float(rest[1][-1])
    assert "2 of 3 pictures were screened out by denoising-loss, which kept a share of 0.3" in err
    assert "What the screen misses was not looked at: none of the pictures" in err
    assert "2 screened out" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    code, again, _ = run(*words, "--out", tmp_path / "out", "--json")
    found = json.loads(again)
    assert [f["status"] for f in found].count("screened out") == 2
    assert all((f["result"] is None) == (f["status"] == "screened out") for f in found)


def test_measures_are_listed_with_what_they_read_and_cost(run):
    code, out, _ = run("ls", "measures", "--json")
    assert code == 0
    found = {m["name"]: m for m in json.loads(out)}
    assert found["flipd"]["needs"] == "gradients, training times"
    assert found["flipd"]["costs"] == "1 forward, 8 backward passes per picture"
    assert found["critical-noise"]["reads"].endswith("high is stored")
    assert found["critical-noise"]["costs"] == "80 forwards per picture"


def test_a_measure_that_cannot_be_loaded_hides_no_other(run, tmp_path, monkeypatch):
    package = tmp_path / "some_measures-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: some-measures\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[mnemoscope.measures]\nlost = nowhere_at_all:Lost\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run("ls", "measures", "--json")
    assert code == 0
    found = {m["name"]: m for m in json.loads(out)}
    assert found["lost"]["reads"].startswith("cannot be loaded (ModuleNotFoundError: ")
    assert "flipd" in found


def test_captions_must_name_every_picture(folder, tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text('{"image": "0.png", "caption": "a"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"no caption for 1\.png"):
        pictures_in([folder], file)
    assert pictures_in([folder / "0.png"], file)[0].caption == "a"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 1.*write"):
        pictures_in([folder], file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="there is no picture"):
        pictures_in([tmp_path / "empty"])
