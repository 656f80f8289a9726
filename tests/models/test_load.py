"""Opening models: every kind of source, and one sentence for everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from original_layout import to_single_file
from safetensors.torch import load_file, save_file

from mnemoscope.errors import CannotAudit, MnemoscopeError, UnknownName, UsageError
from mnemoscope.models import load as load_module
from mnemoscope.models import sources
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.models.load import adapter_for, load
from mnemoscope.models.sampling import denoise
from mnemoscope.models.stable_diffusion import StableDiffusion
from mnemoscope.models.unconditional import Unconditional


@pytest.fixture(scope="session")
def saved(build_pipe, tmp_path_factory):
    """``saved(kind)``: a pipeline folder; do not change it."""
    folders = {}

    def save(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("models") / kind
            build_pipe(kind).save_pretrained(folders[kind])
        return folders[kind]

    return save


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(saved("sd"), tmp_path / "model")


def scores(target):
    step = next(denoise(target, target.noise([0]), target.encode(["a cat"]), target.encode([""])))
    return step.cond


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("sd", StableDiffusion),
        ("sd2", StableDiffusion),
        ("pixel", Unconditional),
        ("ldm-kl", Unconditional),
        ("ldm-vq", Unconditional),
    ],
)
def test_folder_and_pipeline_are_the_same_model(kind, adapter, saved, build_pipe, target_of):
    target = load(saved(kind))
    assert type(target) is adapter
    assert target.name == kind
    assert "float32" in target.dtype_reason
    ready = load(build_pipe(kind))
    x, cond = target.noise([0]), target.encode(["a cat"]) if target.has_text else None
    pixels = torch.rand(1, 3, 8 * target.factor, 8 * target.factor, generator=torch.Generator().manual_seed(0))
    for ask in (
        lambda model: model.predict(x, torch.tensor(500), cond),
        lambda model: model.decode(x),
        lambda model: model.encode_images(pixels),
    ):
        torch.testing.assert_close(ask(target), ask(ready))


def test_a_target_is_returned_as_it_is():
    world = Gaussian.tiny()
    assert load(world) is world
    with pytest.raises(UsageError, match="dtype=float16: a Gaussian in memory is audited as it is"):
        load(world, dtype="float16")


def test_a_pipeline_is_audited_as_it_is(build_pipe):
    pipe = build_pipe("sd")
    target = load(pipe, guidance=3.0, resolution=32)
    assert target.unet is pipe.unet
    assert (target.guidance, target.latent_shape) == (3.0, (4, 16, 16))
    assert target.dtype_reason == "float32: as the pipeline came"
    for change in (
        {"dtype": "float16"},
        {"device": "cpu"},
        {"lora": "x"},
        {"variant": "fp16"},
        {"use_safetensors": True},
    ):
        with pytest.raises(UsageError, match="in memory is audited as it is"):
            load(pipe, **change)


def test_options_reach_the_adapter(saved):
    target = load(saved("sd"), guidance=4.0, resolution=(16, 32), sampler="own")
    assert (target.guidance, target.latent_shape, target.sampler) == (4.0, (4, 8, 16), "own")
    with pytest.raises(UsageError, match="takes no text, so there is nothing to guide"):
        load(saved("pixel"), guidance=4.0)


@pytest.mark.parametrize("name", ["bfloat16", "bf16", torch.bfloat16])
def test_dtype_by_any_name(saved, name):
    for keyword in ("dtype", "torch_dtype"):
        target = load(saved("sd"), **{keyword: name})
        assert target.dtype == torch.bfloat16
        assert target.dtype_reason == "bfloat16: asked for"
        assert target.vae.dtype == target.text_encoder.dtype == torch.bfloat16


def test_unneeded_parts_are_not_loaded(folder):
    """A safety checker (1.2 GB in Stable Diffusion 1) is named in the index; it is not even looked for."""
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load(folder).has_text


def test_keywords_pass_through_unread(saved, build_pipe):
    vae = build_pipe("sd", seed=1).vae
    target = load(saved("sd"), vae=vae)
    assert target.vae is vae
    assert "unet/diffusion_pytorch_model.safetensors" in target.identity()["files"]
    assert not any(name.startswith("vae/") for name in target.identity()["files"])


def test_variant(saved, build_pipe, tmp_path):
    pipe = build_pipe("sd", seed=1)
    pipe.save_pretrained(tmp_path / "m")
    pipe.to(torch.float16).save_pretrained(tmp_path / "m", variant="fp16")
    half = load(tmp_path / "m", variant="fp16")
    full = load(tmp_path / "m")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in half.identity()["files"]
    assert "unet/diffusion_pytorch_model.safetensors" in full.identity()["files"]
    with pytest.raises(CannotAudit, match="variant"):
        load(saved("sd"), variant="fp16")


# A denoiser given apart


def test_fine_tuned_unet(saved, build_pipe, tmp_path):
    tuned = build_pipe("sd", seed=5).unet
    tuned.save_pretrained(tmp_path / "tuned" / "unet")
    expected = scores(load(saved("sd"), unet=tuned))
    assert (expected - scores(load(saved("sd")))).abs().max() > 0.01
    for place in (tmp_path / "tuned", str(tmp_path / "tuned" / "unet")):
        target = load(saved("sd"), unet=place)
        torch.testing.assert_close(scores(target), expected)
        assert target.identity()["fingerprint"] != load(saved("sd")).identity()["fingerprint"]
    with pytest.raises(CannotAudit, match="no folder /nowhere to take the UNet from"):
        load(saved("sd"), unet="/nowhere")
    with pytest.raises(CannotAudit, match=r"vae holds no UNet \(AutoencoderKL\)"):
        load(saved("sd"), unet=saved("sd") / "vae")
    with pytest.raises(CannotAudit, match="is a UNet alone: give the pipeline it belongs to"):
        load(tmp_path / "tuned" / "unet")


def test_lora(saved, build_pipe, tmp_path):
    peft = pytest.importorskip("peft")
    unet = build_pipe("sd").unet
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    layers = peft.get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="cats.safetensors")

    plain, full = load(saved("sd")), load(saved("sd"), lora=tmp_path / "cats.safetensors")
    half = load(saved("sd"), lora={str(tmp_path): 0.5})
    (adapter,) = full.identity()["adapters"]
    assert (adapter["name"], adapter["scale"], adapter["active"]) == ("cats", 1.0, True)
    assert "lora/cats/cats.safetensors" in full.identity()["files"]
    assert half.identity()["adapters"][0]["scale"] == 0.5
    assert len({t.identity()["fingerprint"] for t in (plain, full, half)}) == 3
    assert (scores(full) - scores(plain)).abs().max() > 1e-3
    assert (scores(full) - scores(half)).abs().max() > 1e-3

    # A user's own pipeline, with the LoRA loaded by hand.
    pipe = build_pipe("sd")
    pipe.load_lora_weights(str(tmp_path), weight_name="cats.safetensors", adapter_name="mine")
    (mine,) = load(pipe).identity()["adapters"]
    assert mine == {**adapter, "name": "mine"}
    pipe.disable_lora()
    assert not load(pipe).identity()["adapters"][0]["active"]


def test_lora_in_words(saved, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="a DDPMPipeline takes no LoRA"):
        load(saved("pixel"), lora="x.safetensors")
    monkeypatch.setattr("diffusers.utils.is_peft_available", lambda: False)
    with pytest.raises(UsageError, match="LoRA needs peft: pip install peft"):
        load(saved("sd"), lora="x.safetensors")
    monkeypatch.setattr("diffusers.utils.is_peft_available", lambda: True)
    with pytest.raises(CannotAudit, match=r"no LoRA x\.safetensors"):
        load(saved("sd"), lora="x.safetensors")
    with pytest.raises(CannotAudit, match=r"lora.bin is a pickle"):
        load(saved("sd"), lora=tmp_path / "lora.bin")
    with pytest.raises(CannotAudit, match="should hold one LoRA file and holds 0"):
        load(saved("sd"), lora=tmp_path)


# A single file


def test_single_file(saved, build_pipe, tmp_path):
    file = tmp_path / "sd-v1.safetensors"
    save_file(to_single_file(build_pipe("sd")), file)
    target = load(file, config=str(saved("sd")))
    torch.testing.assert_close(scores(target), scores(load(saved("sd"))))
    x = target.noise([0])
    torch.testing.assert_close(target.decode(x), load(saved("sd")).decode(x))
    assert target.name == "sd-v1.safetensors"
    assert list(target.identity()["files"]) == ["sd-v1.safetensors"]
    assert target.identity()["fingerprint"] == load(saved("sd")).identity()["fingerprint"]


def test_single_file_in_words(saved, tmp_path):
    lora, other, both, flow = (tmp_path / f"{n}.safetensors" for n in ("lora", "other", "offline", "flow"))
    save_file({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}, flow)
    save_file({"unet.lora_A.weight": torch.zeros(1)}, lora)
    save_file({"conditioner.weight": torch.zeros(1)}, other)
    save_file({"cond_stage_model.transformer.x": torch.zeros(1)}, both)
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    (tmp_path / "notes.txt").write_text("hello")
    for file, sentence in {
        "lora.safetensors": "looks like a LoRA: give its base model here",
        "flow.safetensors": "looks like a Stable Diffusion 3 checkpoint in one file: give its pipeline folder",
        "other.safetensors": "is not a Stable Diffusion 1 or 2 checkpoint",
        "offline.safetensors": "its configuration is neither in the cache nor to be had from the hub; give a local pipeline folder",
        "broken.safetensors": "could not be opened",
        "model.ckpt": "is a pickle, which can run code when opened; ask its author for safetensors",
        "notes.txt": "is no model: give a pipeline folder or a .safetensors checkpoint",
    }.items():
        with pytest.raises(CannotAudit, match=sentence):
            load(tmp_path / file)
    with pytest.raises(CannotAudit, match="could not be opened with the configuration in"):
        load(both, config=str(saved("sd")))


# The hub, without a network


def test_cached_hub_model(saved, tmp_path):
    commit = "a" * 40
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(saved("sd"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    target = load("org/tiny", cache_dir=str(tmp_path), local_files_only=True)
    assert target.name == "org/tiny"
    assert target.identity()["revision"] == commit
    assert target.identity()["fingerprint"] == load(saved("sd")).identity()["fingerprint"]


@pytest.mark.parametrize("options", [{"local_files_only": True}, {}])
def test_offline_and_not_cached(tmp_path, options):
    why = "the hub was not to be asked|HF_HUB_OFFLINE is set"
    with pytest.raises(CannotAudit, match=rf"org/model is not in the cache and ({why})\. Looked in {tmp_path}"):
        load("org/model", cache_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (GatedRepoError, "org/model is gated: accept its license on its hub page, then run `hf auth login`"),
        (RepositoryNotFoundError, "no folder and no hub repository org/model; a private one needs `hf auth login`"),
        (RevisionNotFoundError, "org/model has no revision 'v2' on the hub"),
        (OSError, "org/model offers its weights as pickle only.*choose one with safetensors"),
    ],
)
def test_what_the_hub_refuses(error, sentence, monkeypatch):
    def refuse(*args, **options):
        raised = error.__new__(error)  # the hub's own errors want an HTTP response
        Exception.__init__(raised, "no safetensors weights" if error is OSError else "refused")
        raise raised

    monkeypatch.setattr(sources.DiffusionPipeline, "download", refuse)
    with pytest.raises(CannotAudit, match=sentence):
        load("org/model", revision="v2")


# What is wrong with it


@pytest.mark.parametrize("kind", ["sd", "sd2", "pixel", "ldm-kl", "ldm-vq"])
def test_every_kind_of_model_says_what_it_lacks(kind, saved, tmp_path):
    """Each part of each kind: its weights as pickle, gone, or the whole folder gone; and a precision nobody knows."""
    parts = [p.name for p in saved(kind).iterdir() if p.is_dir()]
    assert {"unet", "scheduler"} <= set(parts)
    for part in parts:
        folder = shutil.copytree(saved(kind), tmp_path / part)
        for weights in (folder / part).glob("*.safetensors"):
            pickle = weights.rename(weights.with_suffix(".bin"))
            with pytest.raises(
                CannotAudit, match=rf"{part} holds its weights as pickle only.*ask its author for safetensors"
            ):
                load(folder)
            pickle.unlink()
            with pytest.raises(
                CannotAudit, match=rf"{part} has no weights.*download or copy the model again, completely"
            ):
                load(folder)
        shutil.rmtree(folder / part)
        with pytest.raises(CannotAudit, match=f"has no {part}, which its model_index.json names; download or copy"):
            load(folder)
    with pytest.raises(UnknownName, match=r"no dtype named 'float61'\. Did you mean 'float64'"):
        load(saved(kind), dtype="float61")


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("./nowhere", CannotAudit, r"no file or folder ./nowhere"),
        ("a/b/c", CannotAudit, "no file or folder a/b/c"),
        ("gone.safetensors", CannotAudit, "no file or folder gone.safetensors"),
        ("dmeo", UnknownName, "Did you mean 'demo'"),
        (7, UsageError, "an int is not a model|a int is not a model"),
    ],
)
def test_sources_that_do_not_exist(source, error, sentence):
    with pytest.raises(error, match=sentence):
        load(source)


def test_bundled_models_that_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("mnemoscope.models.sources.files", lambda package: tmp_path)
    for name in ("demo", "demo-unconditional"):
        with pytest.raises(CannotAudit, match=f"bundled model '{name}' is missing"):
            load(name)


def test_damaged_folders(folder):
    def says(sentence):
        with pytest.raises(CannotAudit, match=sentence):
            load(folder)

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    says("could not be opened")
    weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    says(r"unet holds its weights as pickle only \(diffusion_pytorch_model.bin\)")
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    says(r"unet has no weights \(no .safetensors file\)")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(whole)
    says(r"only diffusion_pytorch_model.fp16.safetensors; perhaps another variant")
    shutil.rmtree(folder / "unet")
    says("has no unet, which its model_index.json names")
    (folder / "model_index.json").write_text("{")
    says("model_index.json is damaged")
    (folder / "model_index.json").write_text('{"_class_name": ["my_code", "MyPipeline"]}')
    says("custom pipeline code is not run")
    (folder / "model_index.json").unlink()
    says("is no pipeline folder: it has no model_index.json")


def test_weights_that_do_not_fit(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({k: v[:1].clone() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(CannotAudit, match="could not be opened"):
        load(folder)


@pytest.mark.parametrize(
    ("pipeline", "sentence"),
    [
        ("FluxPipeline", "its guidance is distilled, so one call makes no prediction without the prompt"),
        ("StableDiffusion3InpaintPipeline", "inpainting models need a picture as input"),
        ("StableDiffusion3ControlNetPipeline", "its denoiser needs a picture beside the prompt"),
        ("StableDiffusionXLPipeline", "Stable Diffusion XL comes later"),
        ("LatentConsistencyModelPipeline", "distilled with guidance inside"),
        ("StableDiffusionInpaintPipeline", "inpainting models need a picture as input"),
        ("SomethingElse", r"cannot be audited yet\. Supported: DDIMPipeline"),
    ],
)
def test_pipelines_of_other_kinds(folder, pipeline, sentence):
    """Refused by name, before anything is loaded."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(CannotAudit, match=sentence):
        load(folder)


def test_derived_pipelines_are_accepted(build_pipe):
    class Mine(StableDiffusionPipeline):
        pass

    assert adapter_for(Mine) is StableDiffusion


def test_adapters_of_plugins_are_found(monkeypatch):
    class Adapter(StableDiffusion):
        pipelines = frozenset({"MyPipeline"})

    class Entry:
        value = "somebody.elses:Adapter"

        def load(self):
            return Adapter

    monkeypatch.setattr(load_module, "entry_points", lambda group: [Entry()])
    assert adapter_for("MyPipeline") is Adapter
    assert adapter_for("DDPMPipeline") is Unconditional


@pytest.mark.parametrize(
    ("dtype", "hint"), [("flaot16", "Did you mean 'float16'"), ("int8", "no dtype named 'int8'"), (torch.int8, "int8")]
)
def test_wrong_dtype(saved, dtype, hint):
    with pytest.raises(UnknownName, match=hint):
        load(saved("sd"), dtype=dtype)


def test_wrong_device(saved):
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"device '{device}' cannot be used here"):
            load(saved("sd"), device=device)


def test_errors_are_ours(tmp_path):
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(MnemoscopeError):
        load(tmp_path)


def test_opening_prints_nothing(saved, capfd):
    load(saved("sd"))
    assert capfd.readouterr() == ("", "")


def test_a_text_encoder_without_its_weights_is_refused(folder):
    """transformers would fill them with random numbers and only log it."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("q_proj.weight"))
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(CannotAudit, match="lacks 1 of the text encoder's weights"):
        load(folder)


def test_both_spellings_of_text_encoder_keys_give_the_same_model(folder):
    expected = scores(load(folder))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    for prefix in ("", "text_model."):
        save_file({prefix + k: v for k, v in tensors.items()}, file, metadata={"format": "pt"})
        assert torch.equal(scores(load(folder)), expected)


def test_a_misspelt_option_is_refused(saved):
    """diffusers would only log it, and the base model would be audited in place of the fine-tuned one."""
    with pytest.raises(UnknownName, match=r"no option of load named 'uent'\. Did you mean 'unet'"):
        load(saved("sd"), uent="nowhere")


def test_a_folder_may_recommend_its_guidance(folder):
    assert load(folder).guidance == 7.5
    (folder / "mnemoscope.json").write_text('{"guidance": 3}')
    assert load(folder).guidance == 3
    assert load(folder, guidance=5.0).guidance == 5
    (folder / "mnemoscope.json").write_text('{"guidance": "high"}')
    with pytest.raises(CannotAudit, match=r"mnemoscope\.json is damaged"):
        load(folder)
