"""Model folders of strangers: what they say of themselves is read as data, and nothing that they bring is run."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from original_layout import to_single_file
from safetensors.torch import load_file, save_file

import mnemoscope
from mnemoscope.errors import CannotAudit, ModelFault
from mnemoscope.models import folders
from mnemoscope.models.host import Diffusion
from mnemoscope.models.load import load
from mnemoscope.models.sampling import denoise

KINDS = ("sd", "sd3", "pixel", "ldm-vq")
CODE = "code that a model brings is not run"


@pytest.fixture(scope="session")
def saved(build_pipe, tmp_path_factory):
    """``saved(kind)``: a pipeline folder; do not change it."""
    known = {}

    def save(kind):
        if kind not in known:
            known[kind] = tmp_path_factory.mktemp("models") / kind
            build_pipe(kind).save_pretrained(known[kind])
        return known[kind]

    return save


@pytest.fixture
def copy(saved, tmp_path):
    """``copy(kind)``: one that may be changed."""
    return lambda kind="sd": shutil.copytree(saved(kind), tmp_path / f"{kind}-copy")


def edit(file: Path, **changes: object) -> None:
    """Other values in a JSON document; infinities and NaN as Python writes them."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, sentence: str, **options: object) -> str:
    with pytest.raises(CannotAudit, match=sentence) as error:
        load(folder, **options)
    return str(error.value)


# Names --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("unet", ["stranger", "Network"]),
        ("unet", ["diffusers.models", "UNet2DConditionModel"]),
        ("unet", ["diffusers", "StableDiffusionPipeline"]),
        ("unet", ["diffusers", "DDIMScheduler"]),
        ("unet", ["diffusers", "utils"]),
        ("unet", ["diffusers", "__name__"]),
        ("unet", ["diffusers", "FlashPackUNet2DConditionModel"]),
        ("unet", ["stable_diffusion", "StableDiffusionSafetyChecker"]),
        ("unet", [None, "UNet2DConditionModel"]),
        ("unet", ["diffusers", "UNet2DConditionModel", "more"]),
        ("unet", {"stranger": 0, "Network": 1}),
        ("unet", "ab"),
        ("unet", []),
        ("more", []),
        ("unet", None),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("text_encoder", ["transformers", "CLIPVisionModel"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("tokenizer", ["builtins", "eval"]),
        ("scheduler", ["transformers", "CLIPTokenizer"]),
        ("safety_checker", ["stranger", "Checker"]),
        ("safety_checker", ["../stranger", "Checker"]),
        ("more", ["stranger", "More"]),
        ("../unet", ["diffusers", "UNet2DConditionModel"]),
        ("_module", "pipeline.py"),
    ],
)
def test_an_entry_is_null_or_a_known_class(copy, monkeypatch, name, entry):
    """Refused before a module is imported: a stranger's is on the path here, and would say so."""
    folder = copy()
    monkeypatch.syspath_prepend(folder)
    (folder / "stranger.py").write_text("class Network: pass\nclass Checker: pass\nclass More: pass\n")
    edit(folder / "model_index.json", **{name: entry})
    assert CODE in refused(folder, rf'model_index.json gives "{name}" as')
    assert "stranger" not in sys.modules
    if name == "unet":
        refused(folder, "model_index.json gives", unet=torch.nn.Linear(1, 1))  # what is given apart is compared with it


def test_what_published_folders_hold_is_taken(copy):
    folder = copy()
    index = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "image_encoder": [None, None],
    }  # gone since
    edit(folder / "model_index.json", _name_or_path="x/y", _diffusers_version="0.6.0", **index)
    assert load(folder).has_text
    edit(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"])
    edit(folder / "scheduler" / "scheduler_config.json", skip_prk_steps=True)
    assert load(folder).has_text


@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel", "logging", "FlaxStableDiffusionPipeline", "StableDiffusionPipelineX"]
)
def test_a_pipeline_is_a_pipeline_class_of_diffusers(name):
    with pytest.raises(CannotAudit, match="is no pipeline class of diffusers"):
        folders.pipeline_type(name)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_programs_beside_a_component_are_not_run(copy, part):
    """diffusers 0.36 takes ``unet/diffusers.py`` for the class that ``["diffusers", …]`` names, and runs it."""
    folder = copy()
    library = "transformers" if part in ("text_encoder", "tokenizer") else "diffusers"
    (folder / part / f"{library}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    assert CODE in refused(folder, rf"{library}\.py is a program")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "stranger.Network"}}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["stranger.Words", None]}}),
        ("text_encoder/config.json", {"text_config": {"auto_map": {}}}),
        ("text_encoder/config.json", {"attn_implementation": "stranger/kernels"}),
        ("text_encoder/config.json", {"_attn_implementation": {"": "stranger/kernels:forward"}}),
        ("unet/config.json", {"_class_name": "Network"}),
        ("unet/config.json", {"_class_name": ["stranger", "Network"]}),
        ("scheduler/scheduler_config.json", {"_class_name": "__builtins__"}),
    ],
)
def test_settings_name_no_code(copy, file, settings):
    folder = copy()
    edit(folder / file, **settings)
    assert CODE in refused(folder, file)


def test_an_adapter_does_not_put_another_model_in_place(copy):
    folder = copy()
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/model"}')
    refused(folder, "adapter_config.json names another model to be loaded in this one's place")


@pytest.mark.parametrize("shard", ["model.bin", "../unet/model.safetensors", "gone.safetensors", 7])
def test_shards_are_safetensors_in_the_folder(copy, shard):
    folder = copy()
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{name}.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": shard}, "metadata": {}})
        )
        refused(folder, "which is no safetensors file beside it")
        (folder / part / f"{name}.safetensors.index.json").unlink()


def test_shards_of_a_model_are_read(copy, build_pipe):
    folder, pipe = copy(), build_pipe("sd")
    expected = load(folder).identity()["fingerprint"]
    for part in ("unet", "text_encoder"):
        shutil.rmtree(folder / part)
        getattr(pipe, part).save_pretrained(folder / part, max_shard_size="60KB")
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    assert load(folder).identity()["fingerprint"] == expected


# Files --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "tokenizer/vocab.txt", "scheduler/scheduler_config.json"]
)
def test_a_pipe_is_not_waited_for(copy, file):
    folder = copy()
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    refused(folder, "no regular file")


def test_links_of_the_hub_s_cache_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    blobs.mkdir()
    for i, file in enumerate(p for p in sorted(saved("sd").rglob("*")) if p.is_file()):
        shutil.copy(file, blobs / str(i))
        link = snapshot / file.relative_to(saved("sd"))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    assert load(snapshot).identity()["fingerprint"] == load(saved("sd")).identity()["fingerprint"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "damaged"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "more than 64 deep"),
        ('{"a": 1e999}', '"a" is inf'),
        ('{"a": {"b": [NaN]}}', '"b" is nan'),
        ('{"a": ' + "9" * 5000 + "}", "damaged"),
        ("[]", "holds no named settings"),
        (" " * (folders.LARGEST + 1), "the limit is"),
    ],
)
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_documents_are_bounded(copy, file, text, reason):
    folder = copy()
    (folder / file).write_text(text)
    refused(folder, f"{file}.*{reason}")


# Numbers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 10**6, 10**12, 3.5, True, "1000", None])
@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_are_a_sane_number(copy, kind, steps):
    folder = copy(kind)
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=steps)
    refused(folder, "num_train_timesteps is .*a whole number from 1 to 100,000")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beta_start": math.nan}, '"beta_start" is nan'),
        ({"beta_end": math.inf}, '"beta_end" is inf'),
        ({"trained_betas": [0.1, math.nan]}, '"trained_betas" is nan'),
        ({"beta_end": 5}, "do not fall"),
        ({"beta_start": 0, "beta_end": 0}, "do not fall"),
        ({"beta_start": -0.01}, "do not fall|could not be opened"),
        ({"trained_betas": [0.1, 1.5]}, "do not fall"),
        ({"trained_betas": [0.1, 1.0, 0.1]}, "do not fall"),
        ({"trained_betas": []}, "do not fall|could not be opened"),
        ({"beta_start": "a"}, "could not be opened"),
    ],
)
@pytest.mark.parametrize("kind", ["sd", "pixel"])
def test_noise_levels_are_finite_and_fall(copy, kind, settings, sentence):
    folder = copy(kind)
    edit(folder / "scheduler" / "scheduler_config.json", **settings)
    refused(folder, sentence)
    if kind == "sd":
        refused(folder, sentence, sampler="own")


@pytest.mark.parametrize("shift", [math.nan, math.inf, 0, -1, "3", None])
def test_a_flow_s_shift_is_a_number_above_zero(copy, shift):
    folder = copy("sd3")
    edit(folder / "scheduler" / "scheduler_config.json", shift=shift)
    refused(folder, "shift")


def test_a_flow_shifts_by_its_size_with_finite_numbers(copy, build_pipe, adapt):
    for settings in (
        {"max_image_seq_len": 256},
        {"max_shift": 1e308},
        {"time_shift_type": "linear", "base_shift": -9, "max_shift": -9},
    ):
        pipe = build_pipe("sd3")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)
        with pytest.raises(CannotAudit, match=r"shifts its times by no finite number|stops at times outside"):
            adapt(pipe).schedule(10)


def test_models_in_memory_are_checked_too(build_pipe, adapt):
    """Whoever calls watch or guard brings a pipeline that no folder was read for."""
    pipe = build_pipe("sd")
    pipe.scheduler = DDIMScheduler(beta_start=math.nan)
    with pytest.raises(CannotAudit, match="no finite numbers or do not fall"):
        adapt(pipe)
    with pytest.raises(CannotAudit, match="no finite numbers or do not fall"), mnemoscope.watch(pipe):
        pass


def test_pure_noise_at_the_end_may_be_loaded():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    assert Diffusion(scheduler).train_steps == 1000


def test_the_one_infinite_setting_of_diffusers_is_taken(copy):
    folder = copy()
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit(
        folder / "scheduler" / "scheduler_config.json",
        lambda_min_clipped=-math.inf,
        _class_name="DPMSolverMultistepScheduler",
    )
    assert load(folder, sampler="own").has_text


@pytest.mark.parametrize("offset", [-50, 500, 10**6])
def test_a_sampler_stays_inside_its_timesteps(copy, offset):
    folder = copy("pixel")
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=offset, timestep_spacing="leading")
    with pytest.raises(CannotAudit, match="stops at times outside of its training timesteps 0 to 999"):
        load(folder).schedule(50)


@pytest.mark.parametrize(
    ("kind", "file", "settings", "sentence"),
    [
        ("sd", "vae/config.json", {"scaling_factor": 0}, "has the scaling_factor 0, by which no latent can be scaled"),
        ("sd", "vae/config.json", {"scaling_factor": math.nan}, '"scaling_factor" is nan'),
        ("sd", "vae/config.json", {"scaling_factor": "1"}, "has the scaling_factor 1"),
        ("sd3", "vae/config.json", {"shift_factor": math.inf}, '"shift_factor" is inf'),
        ("ldm-vq", "vqvae/config.json", {"scaling_factor": 0.0}, "has the scaling_factor 0.0"),
        ("pixel", "unet/config.json", {"sample_size": 10**6}, "sample_size 1000000.*at most 8192 pixels"),
        ("pixel", "unet/config.json", {"sample_size": [8, 0]}, "sample_size"),
        ("pixel", "unet/config.json", {"sample_size": None}, "sample_size None"),
        (
            "sd",
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 10**30},
            "has places for 77; correct model_max_length",
        ),
        (
            "sd3",
            "tokenizer_2/tokenizer_config.json",
            {"model_max_length": 10**9},
            "has places for 77; correct model_max_length",
        ),
        ("sd", "mnemoscope.json", {"guidance": "inf"}, "its guidance is no finite number"),
        ("sd", "mnemoscope.json", {"guidance": math.nan}, '"guidance" is nan'),
    ],
)
def test_other_numbers_that_a_folder_gives(copy, kind, file, settings, sentence):
    folder = copy(kind)
    if file == "mnemoscope.json":
        (folder / file).write_text("{}")
    edit(folder / file, **settings)
    refused(folder, sentence)


def test_a_schedule_that_makes_no_number_of_a_finite_output_ends_in_no_score(build_pipe, adapt, monkeypatch):
    """The raw output is finite, what is compared is not."""
    target = adapt(build_pipe("sd2"))
    target._diffusion._alpha[981] = math.nan
    with pytest.raises(ModelFault, match=r"predicted NaN or infinity at step 0 \(t = 981\)"):
        mnemoscope.check(target, "a cat", seeds=1)
    with pytest.raises(ModelFault, match="NaN or infinity"):
        next(denoise(target, target.noise([0]), target.encode(["a cat"]), target.encode([""]), check=True))
    large = adapt(build_pipe("sd"))
    output = large.output
    monkeypatch.setattr(large, "output", lambda x, t, cond: output(x, t, cond) * 1e30)
    with pytest.raises(ModelFault, match="not finite"):
        mnemoscope.check(large, "a cat", seeds=1)


# Weights ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "part", "settings"),
    [
        ("sd", "unet", {"block_out_channels": [1_000_000, 1_000_000]}),
        ("sd", "unet", {"layers_per_block": 10**9}),
        ("sd", "unet", {"layers_per_block": 10**6}),
        ("sd", "text_encoder", {"num_hidden_layers": 10**6}),
        ("sd", "unet", {"cross_attention_dim": 10**9}),
        ("sd", "vae", {"latent_channels": 10**8}),
        ("sd", "text_encoder", {"vocab_size": 10**10}),
        ("sd", "text_encoder", {"num_hidden_layers": 10**9}),
        ("sd", "text_encoder", {"max_position_embeddings": 10**10}),
        ("sd3", "transformer", {"num_layers": 10**9}),
        ("sd3", "transformer", {"pos_embed_max_size": 10**5}),
        ("sd3", "text_encoder_3", {"vocab_size": 10**10}),
        ("pixel", "unet", {"in_channels": 10**10}),
        ("ldm-vq", "vqvae", {"num_vq_embeddings": 10**10}),
        ("sd", "unet", {"layers_per_block": 10**9, "quantization_config": {"quant_method": "bitsandbytes"}}),
    ],
)
def test_sizes_are_compared_with_the_files_before_anything_is_allocated(copy, kind, part, settings):
    folder = copy(kind)
    edit(folder / part / "config.json", **settings)
    refused(folder, rf"{part} could not be opened: its config.json describes far more weights than its files hold")
    if part == "unet" and kind == "sd":
        with pytest.raises(CannotAudit, match="describes far more weights"):
            load(folder, unet=folder / "unet")


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_filled_with_random_numbers(copy, saved, kind, capfd):
    parts = [p.parent.name for p in saved(kind).glob("*/*.safetensors")]
    assert len(parts) > (kind == "sd")
    folder = copy(kind)
    for part in parts:
        (file,) = (folder / part).glob("*.safetensors")
        whole = load_file(file)
        name = next(k for k in sorted(whole, reverse=True) if k.endswith("weight"))
        save_file({k: v for k, v in whole.items() if k != name}, file, metadata={"format": "pt"})
        refused(folder, rf"lacks 1 of the {part.replace('_', ' ')}'s weights")
        save_file(whole, file, metadata={"format": "pt"})
    load(folder)
    assert capfd.readouterr() == ("", "")


def test_a_fine_tuned_denoiser_is_checked_alike(saved, copy):
    folder = copy()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k != "conv_in.weight"}, file, metadata={"format": "pt"})
    refused(saved("sd"), "lacks 1 of the unet's weights", unet=folder / "unet")
    (folder / "unet" / "diffusers.py").write_text("")
    refused(saved("sd"), "is a program", unet=folder / "unet")


def test_early_names_of_attention_layers_are_the_same_weights(copy, saved):
    folder = copy("ldm-vq")
    early = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for part in ("unet", "vqvae"):
        (file,) = (folder / part).glob("*.safetensors")
        renamed = {}
        for key, value in load_file(file).items():
            for now, before in early.items():
                key = key.replace(f".{now}", f".{before}")
            renamed[key] = value
        save_file(renamed, file, metadata={"format": "pt"})
    assert load(folder).identity()["fingerprint"] == load(saved("ldm-vq")).identity()["fingerprint"]


def test_no_weight_stays_without_memory(build_pipe):
    pipe = build_pipe("sd")
    folders.require_loaded(pipe, "tiny")
    pipe.vae.decoder.conv_in.to("meta")
    with pytest.raises(CannotAudit, match=r"tiny could not be opened: vae was loaded without decoder.conv_in.weight"):
        folders.require_loaded(pipe, "tiny")


def test_a_single_file_is_checked_alike(copy, build_pipe, tmp_path):
    whole, config, file = to_single_file(build_pipe("sd")), copy(), tmp_path / "model.safetensors"
    save_file(whole, file)
    assert load(file, config=str(config)).has_text
    for start, part in (
        ("model.diffusion_model.", "unet"),
        ("first_stage_model.", "vae"),
        ("cond_stage_model.", "text encoder"),
    ):
        name = next(k for k in sorted(whole) if k.startswith(start) and k.endswith("weight"))
        save_file({k: v for k, v in whole.items() if k != name}, file)
        with pytest.raises(CannotAudit, match=f"lacks weights of the {part}|could not be opened"):
            load(file, config=str(config))
    save_file(whole, file)
    for change, sentence in (
        (
            {"unet/config.json": {"layers_per_block": 10**9}},
            "could not be opened with the configuration in .* far more weights",
        ),
        ({"scheduler/scheduler_config.json": {"num_train_timesteps": 10**12}}, "num_train_timesteps"),
        ({"model_index.json": {"unet": ["stranger", "Network"]}}, CODE),
    ):
        for name, settings in change.items():
            before = (config / name).read_text()
            edit(config / name, **settings)
            with pytest.raises(CannotAudit, match=sentence):
                load(file, config=str(config))
            (config / name).write_text(before)
    weights = config / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CannotAudit, match="holds its weights as pickle only"):
        load(file, config=str(config))


def test_a_lora_is_one_regular_safetensors_file(saved, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "lora.txt").write_text("x")
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x04")
    os.mkfifo(tmp_path / "pipe.safetensors")
    wrong = {
        "lora.txt": "is no LoRA: give a .safetensors file",
        "pipe.safetensors": "no regular file",
        "broken.safetensors": "could not be opened",
    }
    for name, sentence in wrong.items():
        refused(saved("sd"), sentence, lora=tmp_path / name)
