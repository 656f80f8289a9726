"""Latents that are kept in a file: used again only where they are those that were written."""

from unittest.mock import MagicMock

import numpy as np
import pytest

from mnemoscope.train import cache
from mnemoscope.train.data import TrainingSet


@pytest.fixture
def encode(tmp_path, monkeypatch, target_of):
    """``encode()``: latents of three pictures in a file; how often they were computed."""
    pictures = MagicMock(spec=TrainingSet)
    pictures.__len__.return_value = 3
    pictures.digest.return_value = "three"
    encoded = []

    def fill(moments, *_):
        moments[:] = np.arange(moments.size, dtype=np.float32).reshape(moments.shape)
        encoded.append(moments.shape)

    def encode():
        found = cache.encode_pictures(
            target_of("sd"), pictures, 32, flip=True, file=tmp_path / "latents.bin", gigabytes=0.0
        )
        assert np.array_equal(found.moments.ravel(), np.arange(found.moments.size))
        return len(encoded)

    monkeypatch.setattr(cache, "_fill", fill)
    return encode


def test_a_file_of_latents_is_used_again(encode):
    assert [encode(), encode()] == [1, 1]


def changed(name, change):
    def apply(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def emptied(folder):
    """Both files, so that they fit each other and not the pictures."""
    (folder / "latents.bin").write_bytes(b"")
    key = (folder / "latents.key").read_text().split()[0]
    (folder / "latents.key").write_bytes(cache._recorded(folder / "latents.bin", key))


@pytest.mark.parametrize(
    "change",
    [
        changed("latents.bin", lambda data: data[:-1] + b"x"),
        changed("latents.bin", lambda data: data[:100]),
        changed("latents.bin", lambda data: data + b"x"),
        changed("latents.bin", lambda data: np.full(len(data) // 4, np.nan, np.float32).tobytes()),
        changed("latents.key", lambda data: data.split()[0]),  # as earlier versions wrote it
        changed("latents.key", lambda data: b"\xff"),
        lambda folder: (folder / "latents.bin").unlink(),
        lambda folder: (folder / "latents.key").unlink(),
        emptied,
    ],
    ids=["a byte", "cut off", "longer", "not numbers", "no hash", "no text", "no file", "no record", "emptied"],
)
def test_a_file_of_other_latents_is_written_again(encode, tmp_path, change):
    encode()
    change(tmp_path)
    assert [encode(), encode()] == [2, 2]
