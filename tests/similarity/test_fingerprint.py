"""The default descriptor: what it forgives, what it does not, and its weights' file."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from mnemoscope import World
from mnemoscope.errors import UsageError
from mnemoscope.similarity.base import DEFAULT
from mnemoscope.similarity.fingerprint import Fingerprint, FingerprintNetwork
from mnemoscope.similarity.nulls import FMR, in_words, null_of


@pytest.fixture(scope="module")
def never_shown():
    """Held-out pictures and the planted concepts' other pictures, which its training did not contain."""
    world = World()
    return world.pictures(dict.fromkeys(r.picture for r in world.of("heldout", "twin")))


def blurred(x):
    small = F.interpolate(x, (24, 24), mode="bilinear", antialias=True)
    return F.interpolate(small, (64, 64), mode="bilinear")


CHANGES = {
    "blur": blurred,
    "mirror": lambda x: x.flip(3),
    "crop": lambda x: F.interpolate(x[..., 6:-6, 6:-6], (64, 64), mode="bilinear"),
    "dark": lambda x: 0.6 * x,
    "noise": lambda x: (x + 0.08 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_told_from_other_pictures(never_shown, change):
    """At the threshold that 0.1 % of different pairs exceed by its null distribution; of pictures that it was not trained on."""
    made = Fingerprint()
    own = (made(CHANGES[change](never_shown)) * made(never_shown)).sum(1)
    assert (own > null_of(made.name)["thresholds"]["0.001"]).float().mean() > 0.9


def test_its_null_distribution_is_that_of_its_weights(never_shown):
    null = null_of(Fingerprint().name)
    assert null is not None, "measured with other weights: run bench/descriptors.py"
    vectors = Fingerprint()(never_shown)
    different = (vectors @ vectors.T)[~torch.eye(len(vectors), dtype=torch.bool)]
    for fmr in FMR[:2]:
        # These pairs are others than those it was fixed on, of the same kind: the order of magnitude must hold.
        assert (different > null["thresholds"][f"{fmr:g}"]).float().mean() < 3 * fmr
    assert Fingerprint().name in in_words(DEFAULT)


def test_a_plain_card_is_a_copy_of_nothing():
    assert Fingerprint()(torch.full((2, 3, 64, 64), 0.7)).abs().max() == 0


def test_large_pictures_are_reduced_alike():
    x = F.interpolate(
        torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)), (1500, 1100), mode="bicubic"
    ).clamp(0, 1)
    prepared = Fingerprint().prepare(Image.fromarray((x[0].permute(1, 2, 0) * 255).byte().numpy()))
    assert (Fingerprint()(prepared[None]) * Fingerprint()(x)).sum() > 0.995


def test_other_weights_have_another_name(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "mine.safetensors"
    save_file({k: v for k, v in FingerprintNetwork().state_dict().items() if v.is_floating_point()}, file)
    mine = Fingerprint(str(file))
    assert mine.name != Fingerprint().name
    assert mine.identity()["weights"] != Fingerprint().identity()["weights"]
    assert torch.allclose(mine(torch.rand(2, 3, 64, 64)).norm(dim=1), torch.ones(2), atol=1e-5)


def test_weights_that_are_none_get_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        Fingerprint(str(tmp_path / "none.safetensors"))
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="holds no fingerprint weights"):
        Fingerprint(str(file))(torch.rand(1, 3, 64, 64))
    file.write_bytes(b"torn")
    with pytest.raises(UsageError, match="holds no fingerprint weights"):
        Fingerprint(str(file))(torch.rand(1, 3, 64, 64))
