"""SSCD: presets, hash pinning, packaged weights. The networks here are a color mean times a matrix, so every number is known."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.similarity import sscd
from mnemoscope.similarity.sscd import SSCD

ONNX = Path(__file__).parents[1] / "reference" / "onnx" / "mean_color.onnx"
MATRIX = [[0.1257302, -0.1321049, 0.6404226, 0.1049001, -0.5356694, 0.3615951, 1.304000, 0.9470810],
          [-0.7037352, -1.2654215, -0.6232744, 0.0413260, -2.3250308, -0.2187917, -1.2459110, -0.7322674],
          [-0.5442590, -0.3163002, 0.4116305, 1.0425134, -0.1285347, 1.3664634, -0.6651947, 0.3515101]]  # fmt: skip


class MeanColor(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "weights.torchscript.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(MeanColor()).save(str(file))
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def packaged(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sscd, "_packaged_file", lambda weights: ONNX)


def smooth(n=2, size=(50, 70)):
    return torch.nn.functional.interpolate(
        torch.rand(n, 3, 5, 7, generator=torch.Generator().manual_seed(0)), size=size, mode="bilinear"
    )


def test_a_program_is_run_only_if_its_hash_is_given(script):
    file, digest = script
    with pytest.raises(UsageError, match=f"sha256 {digest}, and no sha256 was given"):
        SSCD(str(file))
    with pytest.raises(UsageError, match="sha256 0000 was given"):
        SSCD(str(file), sha256="0000")
    assert SSCD(str(file), sha256=digest).name == f"sscd-{digest[:8]}/authors-320"


@pytest.mark.parametrize(("preset", "shape"), [("authors-288", (288, 403)), ("authors-320", (320, 320)),
                                               ("papers-224", (224, 224)), ("invmm-320", (320, 320))])  # fmt: skip
def test_presets_have_their_sizes(script, preset, shape):
    made = SSCD(str(script[0]), preset, sha256=script[1])
    picture = Image.fromarray((smooth()[0].permute(1, 2, 0) * 255).byte().numpy())
    assert tuple(made.prepare(picture).shape[-2:]) == shape


@pytest.mark.parametrize(("preset", "mean", "std"), [("authors-320", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                                                     ("papers-224", (0.5,) * 3, (0.5,) * 3)])  # fmt: skip
def test_presets_have_their_statistics(script, preset, mean, std):
    color = torch.tensor([0.2, 0.6, 0.9])
    x = color.view(1, 3, 1, 1).expand(1, 3, 40, 40)
    expected = ((color - torch.tensor(mean)) / torch.tensor(std)).repeat(2)
    found = SSCD(str(script[0]), preset, sha256=script[1])(x)[0]
    assert torch.allclose(found, expected / expected.norm(), atol=1e-5)


def test_papers_crop_leaves_the_border_out(script):
    x = torch.zeros(1, 3, 256, 256)
    x[..., :10, :] = 1  # within the 16 px that a centre crop of 224 leaves out
    inside = SSCD(str(script[0]), "papers-224", sha256=script[1])(x)[0]
    assert torch.allclose(inside, torch.full((6,), -1.0) / 6**0.5, atol=1e-5)


def test_packaged_weights_see_bytes(packaged):
    x = smooth(3, (320, 320))
    expected = ((x * 255).round().mean((2, 3))) @ torch.tensor(MATRIX)
    found = SSCD()(x)
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-4)
    assert SSCD().name == "sscd-mixup-int8/authors-320"


def test_packaged_weights_refuse_other_statistics(packaged):
    with pytest.raises(UsageError, match="needs the official TorchScript file"):
        SSCD(preset="papers-224")


def test_wrong_names_get_help(tmp_path):
    with pytest.raises(UnknownName, match="authors-288"):
        SSCD(preset="author-288")
    with pytest.raises(UsageError, match="is no SSCD file"):
        SSCD(str(tmp_path / "nothing.pt"))


def test_what_is_no_torchscript_gets_a_sentence(tmp_path):
    file = tmp_path / "broken.pt"
    file.write_bytes(b"nothing of the kind")
    made = SSCD(str(file), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(UsageError, match="is no TorchScript file"):
        made(smooth())


def test_without_the_package_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(sscd.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mnemoscope\[sscd\]'"):
        SSCD()
