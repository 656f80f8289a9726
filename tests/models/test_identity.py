"""Which model was audited: everything that changes a score changes the fingerprint, nothing else does."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler
from safetensors.torch import load_file, save_file

from mnemoscope.detect.calibrate import Calibration, setting_of
from mnemoscope.errors import UsageError
from mnemoscope.models import identity
from mnemoscope.models.load import load


@pytest.fixture
def folder(build_pipe, tmp_path):
    build_pipe("sd").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fingerprint(target):
    return target.identity()["fingerprint"]


def test_what_it_says(folder):
    found = load(folder).identity()
    assert found["pipeline"] == "StableDiffusionPipeline"
    assert found["scheduler"]["class"] == "DDIMScheduler"
    assert found["scheduler"]["prediction_type"] == "epsilon"
    assert (found["dtype"], found["resolution"], found["adapters"]) == ("float32", [16, 16], [])
    assert set(found["weights"]) == {"unet", "vae", "text_encoder"}
    assert set(found["files"]) == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert found["files"]["unet/diffusion_pytorch_model.safetensors"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.loads(json.dumps(found)) == found


def test_a_folder_and_a_pipeline_in_memory_are_the_same_model(folder, build_pipe):
    """So a calibration made with the one holds for the other."""
    stored, ready = load(folder).identity(), load(build_pipe("sd")).identity()
    assert stored["fingerprint"] == ready["fingerprint"]
    assert ready["files"] == {}
    setting = {"guidance": 7.5, "steps": 50, "window": (0, 1), "seeds": 4, "seed_mode": "shared"}
    made = Calibration.fit(range(99), setting_of(stored, **setting), detector="magnitude", fpr=0.05)
    assert made.check(setting_of(ready, **setting)) == []
    other = load(build_pipe("sd", seed=1)).identity()
    with pytest.raises(UsageError, match=r"target\.weights\.unet: was"):
        made.check(setting_of(other, **setting))


def test_how_files_are_cut_and_named_does_not_matter(folder, tmp_path):
    """Shards, and half precision stored apart, hold the same weights once they are loaded."""
    whole, cut = load(folder, dtype="float16"), tmp_path / "cut"
    shutil.copytree(folder, cut)
    shutil.rmtree(cut / "unet")
    load(folder).unet.save_pretrained(cut / "unet", max_shard_size="50KB")
    half = DiffusionPipeline.from_pretrained(folder).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert len(list((cut / "unet").glob("*.safetensors"))) > 1
    for other in (load(cut, dtype="float16"), load(tmp_path / "half", variant="fp16", dtype="float16")):
        assert other.identity()["files"] != whole.identity()["files"]
        assert fingerprint(other) == fingerprint(whole)


def test_how_modules_are_wrapped_does_not_matter(build_pipe):
    class Compiled(torch.nn.Module):
        """What torch.compile makes of names."""

        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    pipe = build_pipe("sd")
    plain = identity.weights({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    wrapped = identity.weights({"unet": Compiled(pipe.unet), "text_encoder": Compiled(pipe.text_encoder)})
    assert wrapped == plain


def test_a_lora_is_its_tensors_and_their_factor(build_pipe):
    peft = pytest.importorskip("peft")

    def made(name="cats", alpha=8.0, seed=0, scale=1.0):
        unet = build_pipe("sd").unet
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q"]), name)
        unet.set_adapters([name], [scale])
        (adapter,) = identity.adapters({"unet": unet})
        return adapter, identity.weights({"unet": unet})["unet"]

    adapter, base = made()
    assert base == identity.weights({"unet": build_pipe("sd").unet})["unet"]  # what it was added to is still the same
    assert made(name="dogs")[0] == {**adapter, "name": "dogs"}
    assert made(scale=0.5)[0] == {**adapter, "scale": 0.5}
    hashes = [adapter["sha256"], made(alpha=4.0)[0]["sha256"], made(seed=1)[0]["sha256"]]
    assert len(set(hashes)) == 3


def test_a_copy_elsewhere_is_the_same_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    here, there = load(folder).identity(), load(copy).identity()
    assert here["fingerprint"] == there["fingerprint"]
    assert {k for k in here if here[k] != there[k]} <= identity.PROVENANCE


def test_one_changed_weight_is_seen(folder):
    before = fingerprint(load(folder))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(load(folder)) != before


def test_every_setting_counts(build_pipe, adapt):
    def made(kind="sd", seed=0, change=lambda pipe: pipe, **options):
        return fingerprint(adapt(change(build_pipe(kind, seed)), **options))

    def nudge(pipe):
        with torch.no_grad():
            next(pipe.unet.parameters()).view(-1)[0].add_(1e-3)
        return pipe

    def other_betas(pipe):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.013)
        return pipe

    def pndm(pipe):
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
        return pipe

    def other_words(pipe):
        pipe.tokenizer.add_tokens(["mnemoscope"])
        return pipe

    same = made()
    assert made() == same
    assert made(guidance=3.0) == same  # a setting of the run, kept beside the identity
    different = [
        made(seed=1),
        made(kind="sd-v"),
        made(change=nudge),
        made(change=other_betas),
        made(change=pndm, sampler="own"),
        made(change=other_words),
        made(change=lambda pipe: pipe.to(torch.bfloat16)),
        made(resolution=32),
    ]
    assert len({same, *different}) == len(different) + 1


def test_it_is_computed_once_and_when_asked_for(build_pipe, adapt, monkeypatch):
    target = adapt(build_pipe("sd"))
    calls = []
    monkeypatch.setattr(identity, "hash_tensors", lambda tensors: calls.append(1) or "x")
    assert calls == []
    first = target.identity()
    first["name"] = "changed by the caller"
    assert target.identity()["name"] == "tiny"
    assert len(calls) == 3


def test_tensors_are_hashed_by_name_type_shape_and_bytes():
    a = torch.arange(6, dtype=torch.float32)
    tensors = {"a": a, "b": a.to(torch.bfloat16), "c": torch.tensor(1.0), "d": a.view(2, 3).T}
    first = identity.hash_tensors(tensors.items())
    assert identity.hash_tensors(reversed(tensors.items())) == first
    for change in ({"a": a.view(2, 3)}, {"b": a.to(torch.float16)}, {"c": torch.tensor(2.0)}, {"e": a}):
        assert identity.hash_tensors({**tensors, **change}.items()) != first


def test_sharded_and_tagged_weight_files(tmp_path):
    def names(*present, variant=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in present:
            (folder / name).touch()
        return [p.name for p in identity.weight_files(folder, variant)]

    base = "diffusion_pytorch_model"
    shards = [f"{base}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tagged = [f"{base}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names(*shards) == shards
    assert names(*tagged, *shards, variant="fp16") == tagged
    assert names(*tagged, *shards) == shards
    assert names(f"{base}.safetensors", f"{base}.non_ema.safetensors", "notes.safetensors") == [f"{base}.safetensors"]
    assert names("model.safetensors", variant="fp16") == ["model.safetensors"]
