"""``mnemoscope measure``: what a person types and reads, and that an interrupted run goes on."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mnemoscope.audit.measures import measured, pictures_in
from mnemoscope.errors import UsageError
from mnemoscope.measure.invmm import InvMM, varied
from mnemoscope.models.mixture import Mixture
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
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run, words, says):
    code, _, err = run("measure", *words)
    assert code == 2
    assert says in err


def test_captions_must_name_every_picture(folder, tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text('{"image": "0.png", "caption": "a"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"no caption for 1\.png"):
        pictures_in([folder], file)
    assert pictures_in([folder / "0.png"], file)[0].caption == "a"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="line 1: write"):
        pictures_in([folder], file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="there is no picture"):
        pictures_in([tmp_path / "empty"])
