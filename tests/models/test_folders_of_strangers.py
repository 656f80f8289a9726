"""Model folders whose documents are sound one by one, and lead the libraries elsewhere, to great sizes, or to no end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mnemoscope.audit.check import check
from mnemoscope.errors import CannotAudit, ModelFault
from mnemoscope.models import folders, spelling
from mnemoscope.models.load import load
from mnemoscope.plugins import BUNDLED

DEMO = Path(spelling.__file__).parents[1] / "demo" / "assets" / BUNDLED["demo"]
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"


class PanicException(BaseException):
    """What a panic of Rust is called in Python; no module exports the class."""


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model."""
    return shutil.copytree(DEMO, tmp_path / "model")


def edit(file: Path, **changes: object) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **changes}))


def refused(source: object, sentence: str, **options: object) -> None:
    with pytest.raises(CannotAudit, match=sentence):
        load(source, **options)


def growth(count: int, content: str = "aa") -> dict[str, object]:
    """A normalizer that multiplies a text's length so many times."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [step] * count}


@pytest.mark.parametrize(
    ("file", "settings", "sentence"),
    [
        ("text_encoder/config.json", {"configuration_files": ["config.4.0.0.json"]}, "names other files to be read"),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "fp8"}}, "holds quantized weights"),
        ("vae/config.json", {"quantization_config": {"quant_method": "gguf"}}, "holds quantized weights"),
        ("unet/config.json", {"quantization_config": {}}, "holds quantized weights"),
        ("text_encoder/config.json", {"num_labels": 10**6}, "num_labels is 1000000; it must be at most 1,000"),
        (
            "text_encoder/config.json",
            {"model_type": "clip", "text_config": {"num_hidden_layers": 10**4}},
            "describes far more weights",
        ),
        ("text_encoder/config.json", {"_attn_implementation_internal": "stranger/kernels"}, "names code of its own"),
        ("text_encoder/config.json", {"attn_implementation": {"": {"": "stranger/kernels"}}}, "names code of its own"),
        ("text_encoder/config.json", {"layer_norm_eps": 1825}, "could not be opened: .*layer_norm_eps.*1825"),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "/etc/hostname"}, "vocab_file is .* files beside it"),
        ("tokenizer/tokenizer_config.json", {"merges_file": "../merges.txt"}, "merges_file is .* files beside it"),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.json/../x"]}, "files beside it"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_file": 7}, "tokenizer_file is 7"),
        ("tokenizer/tokenizer.json", {"normalizer": growth(5)}, "5 make a text longer"),
        ("tokenizer/tokenizer.json", {"normalizer": growth(17, content="")}, "its normalizer has 18 steps"),
        ("tokenizer/tokenizer.json", {"normalizer": growth(1, content="a" * 17)}, "at most 16 characters"),
        ("tokenizer/tokenizer.json", {"normalizer": {"type": "Prepend", "prepend": "a" * 17}}, "at most 16 characters"),
        ("scheduler/scheduler_config.json", {"solver_order": 4 * 10**8}, "solver_order is 400000000"),
        ("scheduler/scheduler_config.json", {"num_vec_classes": 10**9}, "num_vec_classes is 1000000000"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "x"}, 'timestep_spacing is "x"; it must be one of'),
        ("scheduler/scheduler_config.json", {"prediction_type": "x"}, "prediction type 'x'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "x"}, "could not be opened: x is not implemented"),
        ("scheduler/scheduler_config.json", {"trained_betas": [[0.1] * 1000] * 2}, "null or a list of numbers"),
        ("scheduler/scheduler_config.json", {"thresholding": True, "dynamic_thresholding_ratio": 5}, "ratio is 5"),
        ("mnemoscope.json", {"guidance": 10**400}, "is damaged"),
    ],
)
def test_settings_lead_nowhere_else_and_are_bounded(folder, file, settings, sentence):
    edit(folder / file, **settings)
    refused(folder, sentence)


def test_settings_of_a_whole_clip_are_those_of_its_text_encoder(folder):
    file = folder / "text_encoder" / "config.json"
    text = {**json.loads(file.read_text()), "model_type": "clip_text_model"}
    file.write_text(json.dumps({"model_type": "clip", "text_config": text, "projection_dim": 128}))
    assert load(folder).identity()["fingerprint"] == load(DEMO).identity()["fingerprint"]


def test_a_tokenizer_has_a_vocabulary(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refused(folder, "tokenizer holds no vocabulary")


def test_a_panic_is_a_sentence():
    def panic(*_: object, **__: object) -> None:
        raise PanicException("no such id")

    with pytest.raises(CannotAudit, match="could not be opened: no such id"), folders.opening("x"):
        panic()
    with pytest.raises(CannotAudit, match="cannot read a text"):
        spelling.tokenize(panic, "a cat")
    with pytest.raises(KeyboardInterrupt), folders.opening("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"unet": "x" * 5000}, {"lora": "x" * 5000}])
def test_a_source_too_long_to_look_up(options):
    pytest.importorskip("peft")
    refused("demo" if options else "x" * 5000, "x… cannot be looked up", **options)


@pytest.mark.parametrize(
    "place", ["diffusion_pytorch_model.safetensors.index.fp16.json", "x.fp16.safetensors.index.json"]
)
def test_only_the_list_of_the_weights_that_are_loaded_is_complete(folder, place):
    unet = folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    weights.rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    left_over = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}, "metadata": {}}
    (unet / f"{weights.name}.index.json").write_text(json.dumps(left_over))
    folders.require_data(unet, "fp16")
    with pytest.raises(CannotAudit, match="no safetensors file beside it"):
        folders.require_data(unet)
    for shard in ("gone.safetensors", "../../x.safetensors"):
        (unet / place).write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CannotAudit, match="no safetensors file beside it"):
            folders.require_data(unet, "fp16")


def test_a_text_under_no_component_s_name_is_data(folder):
    edit(folder / "model_index.json", variant="fp16")
    assert load(folder).has_text
    (folder / "variant").mkdir()
    refused(folder, 'gives "variant" as "fp16"')


# LoRA ---------------------------------------------------------------------------------------------------------------------


def lora(file: Path, tensor: str = QUERY, **settings: object) -> Path:
    """A LoRA of one layer, with metadata as diffusers writes them."""
    tensors = {f"{tensor}.lora_A.weight": torch.zeros(2, 128), f"{tensor}.lora_B.weight": torch.zeros(128, 2)}
    known = {"r": 2, "lora_alpha": 2, "target_modules": [QUERY.removeprefix("unet.")], **settings}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in known.items()})}
    save_file(tensors, file, metadata=metadata)
    return file


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": r"([\w.]+)+!"}, "names must consist of"),
        ({"target_modules": ["(a|a)*$"]}, "names must consist of"),
        ({"exclude_modules": "(a|a)*$"}, "names must consist of"),
        ({"rank_pattern": {"(a|a)*$": 2}}, "names must consist of"),
        ({"alpha_pattern": {"(a|a)*$": 2}}, "names must consist of"),
        ({"alpha_pattern": {"to_q": math.inf}}, "must be finite"),
        ({"lora_alpha": math.nan}, "a finite number"),
        ({"r": 4 * 10**6}, "a whole number from 1 to 128"),
        ({"r": "2"}, "a whole number from 1 to 128"),
        ({"rank_pattern": {"to_q": 129}}, "a whole number from 1 to 128"),
        ({"layer_replication": [[0, 10**6]]}, "names must consist of"),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "no further configuration"),
        ({"megatron_config": True}, "no further configuration"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_metadata_of_a_lora_are_plain(tmp_path, settings, reason):
    with pytest.raises(CannotAudit, match=f"the metadata of .*{reason}"):
        folders.require_adapter(lora(tmp_path / "lora.safetensors", **settings))


def test_tensors_of_a_lora_have_plain_names(tmp_path):
    """diffusers makes patterns of them where the ranks differ."""
    with pytest.raises(CannotAudit, match=r"has a tensor named .*names must consist of"):
        folders.require_adapter(lora(tmp_path / "lora.safetensors", tensor=r"unet.([\w.]+)+!"))


def test_metadata_that_peft_writes_are_taken(tmp_path):
    peft = pytest.importorskip("peft")
    layers = {
        "target_modules": [QUERY.removeprefix("unet.")],
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"to_q": 4.5},
    }
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", base_model_name_or_path="a/b", **layers)
    settings = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    file = lora(tmp_path / "lora.safetensors", **settings)
    assert load(DEMO, lora=file).identity()["fingerprint"]


@pytest.mark.parametrize(
    ("file", "settings", "reason"),
    [
        ("unet/config.json", {"norm_eps": "x"}, "TypeError"),
        ("unet/config.json", {"freq_shift": [1]}, "TypeError"),
        ("unet/config.json", {"downsample_padding": 7}, "RuntimeError"),
        ("tokenizer/tokenizer_config.json", {"eos_token": "<|endofte>"}, "IndexError"),
    ],
)
def test_settings_that_only_a_computation_looks_at_end_in_a_sentence(folder, file, settings, reason):
    edit(folder / file, **settings)
    with pytest.raises(ModelFault, match=rf"cannot be computed with \({reason}: .*download or copy it again"):
        check(load(folder), "a cat", seeds=1, steps=2)
