"""Rebuilding the bundled pictures: the same bytes with the same encoder, and a sentence with another."""

import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from mnemoscope.demo import build
from mnemoscope.demo.world import ASSETS

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@pytest.mark.skipif(build.other_encoder() is not None, reason="written by another Pillow or libwebp")
def test_the_recorded_encoder_wrote_the_bundled_bytes():
    with zipfile.ZipFile(ASSETS / "pictures.zip") as archive:
        for name in archive.namelist()[::40]:
            stored = archive.read(name)
            assert build.encode(Image.open(BytesIO(stored))) == stored, name


def test_another_encoder_is_named_with_the_cure(monkeypatch):
    monkeypatch.setattr(build, "ENCODER", build.encoder())
    assert build.other_encoder() is None
    monkeypatch.setattr(build, "ENCODER", "Pillow 1.0 with libwebp 0.1")
    sentence = build.other_encoder()
    assert sentence is not None
    assert "written by Pillow 1.0 with libwebp 0.1 and this is Pillow " in sentence
    assert "pip install --constraint constraints.txt pillow" in sentence


def test_constraints_pin_the_recorded_pillow():
    release = build.ENCODER.split()[1]
    assert f"\npillow=={release};" in CONSTRAINTS.read_text(encoding="utf-8")
