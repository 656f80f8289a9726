"""What every descriptor promises: ours and those of installed packages. A plugin author runs this file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mnemoscope import plugins
from mnemoscope.errors import UsageError
from mnemoscope.similarity.base import Descriptor, build


@pytest.fixture(params=sorted(plugins.installed("descriptor")))
def descriptor(request):
    try:
        return build(request.param)
    except UsageError as e:
        pytest.skip(f"{request.param} cannot run here: {e}")


def pictures(n, size=96, seed=0):
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def as_image(x):
    return Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())


def test_it_is_a_descriptor(descriptor):
    assert isinstance(descriptor, Descriptor)
    assert descriptor.name == descriptor.name
    assert json.loads(json.dumps(descriptor.identity())) == descriptor.identity()


def test_vectors_are_of_unit_length_and_finite(descriptor):
    vectors = descriptor(pictures(5))
    assert vectors.shape[0] == 5
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5), atol=1e-4)


def test_a_picture_is_most_like_itself(descriptor):
    vectors = descriptor(pictures(12))
    assert ((vectors @ vectors.T).argmax(1) == torch.arange(12)).all()


def test_a_batch_says_what_its_members_say_alone(descriptor):
    x = pictures(4)
    alone = torch.cat([descriptor(x[i : i + 1]) for i in range(4)])
    # int8 networks round, and a batch may be summed in another order: what is asked for is the same similarity to 3 digits.
    assert ((descriptor(x) * alone).sum(1) > 0.999).all()


@pytest.mark.parametrize("size", [64, 96, 300])
def test_prepared_pictures_and_tensors_agree(descriptor, size):
    image = as_image(pictures(1, size)[0])
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    prepared = descriptor.prepare(image)
    assert prepared.dtype == torch.float32
    assert (descriptor(prepared[None]) * descriptor(tensor[None])).sum() > 0.995


def test_equal_calls_give_equal_numbers(descriptor):
    x = pictures(3)
    assert torch.equal(descriptor(x), descriptor(x))


def test_pictures_of_any_shape_are_taken(descriptor):
    wide = torch.nn.functional.interpolate(pictures(2), size=(80, 120))
    assert descriptor(wide).isfinite().all()


def test_no_gradient_and_no_change_of_the_callers_mode(descriptor):
    x = pictures(1).requires_grad_(True)
    with torch.enable_grad():
        descriptor(x.detach())
        assert torch.is_grad_enabled()
