"""Similarity to a reference as the audited model's autoencoder reconstructs it."""

import pytest
import torch

from mnemoscope.audit.reconstruct import Reconstructions
from mnemoscope.similarity.pixels import Pixels


class Halving:
    """A target whose autoencoder keeps every second pixel and doubles it: a blur that can be computed by hand."""

    latent_shape = (3, 16, 16)

    def __init__(self):
        self.encoded = 0

    def encode_images(self, images):
        self.encoded += 1
        return torch.nn.functional.avg_pool2d(images, 2)

    def decode(self, x):
        return torch.nn.functional.interpolate(x, scale_factor=2)


class Shown:
    """A reference set that can show its pictures."""

    descriptor = Pixels()

    def __init__(self, pictures):
        self.pictures = pictures

    def image(self, name):
        return self.pictures.get(name)


@pytest.fixture
def picture():
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_it_is_the_similarity_to_what_the_autoencoder_makes_of_the_reference(picture):
    target = Halving()
    own = target.decode(target.encode_images(picture[None]))[0]
    found = Reconstructions(target, Shown({"a": picture}))
    assert found.similarity(own, "a") == pytest.approx(1, abs=1e-5)
    raw = float((Pixels()(own[None]) * Pixels()(picture[None])).sum())
    assert raw <= found.similarity(own, "a") + 1e-6


def test_each_reference_is_reconstructed_once(picture):
    target = Halving()
    found = Reconstructions(target, Shown({"a": picture, "b": 1 - picture}))
    for name in ("a", "b", "a", "b", "a"):
        found.similarity(picture, name)
    assert target.encoded == 2


def test_references_of_other_sizes_are_fitted(picture):
    large = torch.nn.functional.interpolate(picture[None], scale_factor=3)[0]
    assert Reconstructions(Halving(), Shown({"a": large})).similarity(picture, "a") > 0.9


def test_without_an_autoencoder_or_a_picture_there_is_none(picture):
    pixel = Halving()
    pixel.latent_shape = (3, 32, 32)
    assert Reconstructions(pixel, Shown({"a": picture})).similarity(picture, "a") is None
    assert Reconstructions(Halving(), Shown({})).similarity(picture, "a") is None
    assert Reconstructions(Halving(), None).similarity(picture, "a") is None
