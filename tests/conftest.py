"""Tiny models with random weights, built from configs in a fraction of a second each."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test may reach for the network

import functools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OFFICIAL = Path(__file__).parent / "reference" / "official_wen"
TEXT_KINDS = ("sd", "sd-v", "sd-x0", "sd2")
FLOW_KINDS = ("sd3", "sd35")
IMAGE_KINDS = ("pixel", "gray", "ldm-kl", "ldm-vq")


@pytest.fixture(scope="session", autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key that marks indexes is made in a folder of the session, never in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def official_wen() -> Path:
    """A tiny Stable-Diffusion-shaped pipeline and the numbers the official code gets on it."""
    return OFFICIAL


@pytest.fixture(scope="session")
def build_pipe() -> Callable[..., Any]:
    """``build_pipe(kind, seed=0)``: a fresh diffusers pipeline of one of TEXT_KINDS, FLOW_KINDS or IMAGE_KINDS."""
    return build


@pytest.fixture(scope="session")
def target_of() -> Callable[[str], Any]:
    """``target_of(kind)``: a target on such a pipeline, made once and shared; do not change it."""
    return functools.cache(lambda kind: wrap(build(kind)))


@pytest.fixture(scope="session")
def adapt() -> Callable[..., Any]:
    """``adapt(pipe, **options)``: the pipeline as a target named "tiny"."""
    return wrap


def wrap(pipe: Any, **options: Any) -> Any:
    from mnemoscope.models.host import Origin
    from mnemoscope.models.load import build as adapt

    return adapt(pipe, Origin(name="tiny"), **options)


def build(kind: str, seed: int = 0) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = _text_pipe if kind in TEXT_KINDS else _flow_pipe if kind in FLOW_KINDS else _image_pipe
        pipe = make(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_pipe(kind: str) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    two = kind == "sd2"
    tokenizer = CLIPTokenizer.from_pretrained(OFFICIAL / "model" / "tokenizer", **({"pad_token": "!"} if two else {}))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3 if two else 2,
        num_attention_heads=2,
        hidden_act="gelu" if two else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    channels, factor = (8, 8) if two else (4, 2)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=[2, 4] if two else 4,
        use_linear_projection=two,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type={"sd": "epsilon", "sd-x0": "sample"}.get(kind, "v_prediction"),
    )
    return StableDiffusionPipeline(
        vae=_kl(channels, factor),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flow_pipe(kind: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    def clip(width: int, **options: Any) -> tuple[Any, Any]:
        tokenizer = CLIPTokenizer.from_pretrained(OFFICIAL / "model" / "tokenizer", **options)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return CLIPTextModelWithProjection(config).eval(), tokenizer

    (first, words), (second, words_2) = clip(8), clip(16, pad_token="!")
    later = kind == "sd35"
    t5, words_3 = (None, None) if later else _t5(32)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
        dual_attention_layers=(0,) if later else (),
        qk_norm="rms_norm" if later else None,
    )
    vae = _kl(16, 2)
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=first,
        tokenizer=words,
        text_encoder_2=second,
        tokenizer_2=words_2,
        text_encoder_3=t5,
        tokenizer_3=words_3,
    )


def _t5(width: int) -> tuple[Any, Any]:
    """An encoder and a tokenizer of single signs and a few words, whose scores make whole words likelier."""
    import string

    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    signs = string.ascii_letters + string.digits + string.punctuation
    words = ("a", "cat", "dog", "three", "white", "dots", "on", "red", "field")
    known = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    vocab = [*known, *((sign, -5.0) for sign in signs), *((f"▁{word}", -3.0) for word in words)]
    tokenizer = T5TokenizerFast(vocab=vocab, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def _image_pipe(kind: str) -> Any:
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel

    channels = {"gray": 1}.get(kind, 3)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        # The grey one learns its variance, as improved DDPMs do: twice the channels come out.
        out_channels=2 if kind == "gray" else channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()
    if kind in ("pixel", "gray"):
        return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    if kind == "ldm-kl":
        vae = _kl(channels, 2)
    else:
        vae = VQModel(
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=3,
            num_vq_embeddings=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()
    return LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear"))


def _kl(channels: int, factor: int) -> Any:
    from diffusers import AutoencoderKL

    blocks = factor.bit_length()
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        sample_size=8 * factor,
    ).eval()


@pytest.fixture
def ranks():
    """Environments of two processes on this machine that train together, as a launcher of accelerate makes them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
