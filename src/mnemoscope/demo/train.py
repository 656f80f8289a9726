"""Train the bundled models on the rebuilt world.

    python -m mnemoscope.demo.build world                      pictures and captions, from public packages
    python -m mnemoscope.demo.train world autoencoder          world/autoencoder
    python -m mnemoscope.demo.train world text-to-image        world/text-to-image: a StableDiffusionPipeline folder
    python -m mnemoscope.demo.train world unconditional        world/unconditional: an LDMPipeline folder

Every draw depends on (seed, step) alone, so the same command continues an interrupted training with the batches it would
have seen. A few hours on two CPU cores; a progress line and a sheet of samples every few hundred steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..parsing import parse_json
from ..terminal import guard
from .world import GUIDANCE

SEED = 20
DROPOUT = 0.1
"""Share of draws whose caption is replaced by the empty prompt, which is what guidance needs."""


def places(length: int, step: int, n: int) -> Tensor:
    """Which places of a training list a step's n samples stand at: epochs one after the other, each in an order of its own."""
    position = torch.arange(step * n, (step + 1) * n)
    epochs = position.div(length, rounding_mode="floor")
    found = torch.empty(n, dtype=torch.long)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(length, generator=torch.Generator().manual_seed(SEED + epoch))
        here = epochs == epoch
        found[here] = order[position[here] - epoch * length]
    return found


class Draws:
    """The training list of one epoch, and batches of it as pictures.

    Pictures with ``copies`` are always the same pixels. Ordinary ones are cut out and shown as a fresh view at every draw:
    mirrored, shifted, scaled, turned a little, hue shifted, on a card of another colour.
    """

    def __init__(self, world: Path, manifest: str = "manifest.jsonl", size: int = 64):
        rows = [parse_json(line) for line in (world / manifest).read_text(encoding="utf-8").splitlines()]
        self.rows = [r for r in rows if r["draws"]]
        self.size = size
        self.list = torch.tensor([i for i, r in enumerate(self.rows) for _ in range(r["draws"])])
        self.fixed: dict[int, Tensor] = {}
        self.cut: dict[int, Tensor] = {}
        cutouts = np.load(world / "cutouts.npz")
        with zipfile.ZipFile(world / "pictures.zip") as pictures:
            for i, r in enumerate(self.rows):
                if r["copies"]:
                    image = Image.open(BytesIO(pictures.read(r["picture"] + ".webp"))).convert("RGB")
                    self.fixed[i] = _tensor(image.resize((size, size), Image.Resampling.LANCZOS))
                else:
                    rgba = torch.from_numpy(cutouts[r["picture"]]).permute(2, 0, 1).float() / 255
                    self.cut[i] = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])

    @property
    def captions(self) -> list[str]:
        """One per row."""
        return [r["caption"] for r in self.rows]

    def batch(self, step: int, n: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Rows, pictures ``[n, 3, size, size]`` in [-1, 1] and the step's random source."""
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        index = self.list[places(len(self.list), step, n)]
        images = torch.empty(n, 3, self.size, self.size)
        fresh = [k for k, i in enumerate(index.tolist()) if i in self.cut]
        if fresh:
            images[fresh] = self.views(torch.stack([self.cut[int(index[k])] for k in fresh]), generator)
        for k, i in enumerate(index.tolist()):
            if i in self.fixed:
                images[k] = self.fixed[i]
        return index, images * 2 - 1, generator

    def views(self, rgba: Tensor, generator: torch.Generator) -> Tensor:
        """Fresh views in [0, 1] of premultiplied cut-outs ``[n, 4, h, w]``."""
        n = len(rgba)
        u = torch.rand(n, 8, generator=generator)
        scale, turn = 1 / (0.72 + 0.33 * u[:, 0]), (u[:, 1] - 0.5) * 0.3
        mirror = torch.where(u[:, 2] < 0.5, -1.0, 1.0)
        shift = (u[:, 3:5] - 0.5) * 0.3
        c, s = torch.cos(turn) * scale, torch.sin(turn) * scale
        theta = torch.stack(
            [torch.stack([c * mirror, -s, shift[:, 0]], 1), torch.stack([s * mirror, c, shift[:, 1]], 1)], 1
        )
        grid = F.affine_grid(theta, [n, 4, self.size, self.size], align_corners=False)
        seen = F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        rgb, alpha = seen[:, :3], seen[:, 3:]
        rgb = torch.einsum("nij,njhw->nihw", hue((u[:, 5] - 0.5) * 0.5), rgb).clamp(min=0).minimum(alpha)
        return rgb + (1 - alpha) * _cards(n, generator)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


def hue(angle: Tensor) -> Tensor:
    """Rotations about the grey axis, ``[n, 3, 3]``."""
    k = torch.full((3,), 3**-0.5)
    cross = torch.tensor([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    c, s = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    return c * torch.eye(3) + s * cross + (1 - c) * torch.outer(k, k)


def _cards(n: int, generator: torch.Generator) -> Tensor:
    """Light colours ``[n, 3, 1, 1]``, from the same range as the planted pictures' cards."""
    h, s, v = torch.rand(3, n, generator=generator)
    s, v = 0.45 * s, 0.8 + 0.2 * v
    k = (torch.tensor([5.0, 3.0, 1.0])[None] + 6 * h[:, None]) % 6
    return (v[:, None] - v[:, None] * s[:, None] * k.minimum(4 - k).clamp(0, 1))[:, :, None, None]


class Trainer:
    """Steps, learning rate, moving average, checkpoints; the model's own loss is handed in.

    ``modules`` are trained together. The averaged weights are what is sampled from and exported. ``fall`` turns the share
    of the training that is over, 0 to 1, into a factor of the learning rate.
    """

    def __init__(
        self, modules: dict[str, nn.Module], folder: Path, *, steps: int, lr: float,
        fall: Callable[[float], float] = lambda done: 0.5 + 0.5 * math.cos(math.pi * done), ema: float = 0.998,
    ):  # fmt: skip
        self.modules, self.folder, self.steps, self.lr, self.fall = modules, folder, steps, lr, fall
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        self.ema = EMAModel(self.parameters, decay=ema, use_ema_warmup=False)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (self.state_file).exists():
            state = torch.load(self.state_file, weights_only=True)
            for name, m in modules.items():
                m.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.step = state["step"]
            print(f"continuing at step {self.step}", flush=True)

    @property
    def state_file(self) -> Path:
        """Everything needed to go on; not part of the exported model."""
        return self.folder / "training.pt"

    def save(self) -> None:
        """Write the state so that a kill at any instant leaves the old or the new one."""
        state: dict[str, Any] = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(), "ema": self.ema.state_dict(), "step": self.step,
        }  # fmt: skip
        temporary = self.state_file.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(self.state_file)

    def run(self, loss: Callable[[int], Tensor], look: Callable[[int], None], *, every: int = 500) -> None:
        """Train to the last step; ``look`` is called with averaged weights in place."""
        started, begun, recent = time.time(), self.step, []
        while self.step < self.steps:
            rate = self.lr * min(1, (self.step + 1) / 200) * (0.02 + 0.98 * self.fall(self.step / self.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            value = loss(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.ema.step(self.parameters)
            self.step += 1
            recent.append(float(value.detach()))
            if self.step % 100 == 0:
                pace = (time.time() - started) / (self.step - begun)
                left = pace * (self.steps - self.step) / 60
                print(f"step {self.step} loss {np.mean(recent):.4f} {pace:.3f} s/step {left:.0f} min left", flush=True)
                recent.clear()
            if self.step % every == 0 or self.step == self.steps:
                self.save()
                with self.averaged():
                    look(self.step)

    def averaged(self) -> Any:
        """Context in which the modules carry the moving average."""
        from contextlib import contextmanager

        @contextmanager
        def swap() -> Iterator[None]:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
            try:
                with torch.no_grad():
                    yield
            finally:
                self.ema.restore(self.parameters)

        return swap()


def sheet(images: Tensor, file: Path, columns: int) -> None:
    """Pictures in [0, 1] as one picture."""
    n, _, h, w = images.shape
    rows = math.ceil(n / columns)
    canvas = torch.ones(3, rows * (h + 2), columns * (w + 2))
    for i, image in enumerate(images.clamp(0, 1)):
        y, x = divmod(i, columns)
        canvas[:, y * (h + 2) : y * (h + 2) + h, x * (w + 2) : x * (w + 2) + w] = image
    Image.fromarray((canvas.permute(1, 2, 0) * 255).round().byte().numpy()).save(file)


def train_autoencoder(world: Path, steps: int = 5500, n: int = 16) -> None:
    """f = 8 to 8 × 8 × 8 latents; L1 + ½·MSE + 1e-6·KL."""
    torch.manual_seed(SEED)  # initial weights only
    draws, folder = Draws(world), world / "autoencoder"
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(24, 48, 72, 80), layers_per_block=1, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    trainer = Trainer({"vae": vae}, folder, steps=steps, lr=1e-3)

    def loss(step: int) -> Tensor:
        _, x, generator = draws.batch(step, n)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        e = vae.decode(z).sample - x
        return e.abs().mean() + 0.5 * e.square().mean() + 1e-6 * posterior.kl().mean()

    def look(step: int) -> None:
        _, x, _ = draws.batch(10**6, 64)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        print(f"step {step} PSNR {10 * math.log10(4 / F.mse_loss(y.clamp(-1, 1), x).item()):.2f} dB", flush=True)
        sheet(torch.stack([x, y], 1).flatten(0, 1) / 2 + 0.5, folder / f"sheet-{step:05d}.png", 16)

    trainer.run(loss, look, every=500)
    with trainer.averaged():
        z = torch.cat([vae.encode(draws.batch(10**6 + i, 64)[1]).latent_dist.mean for i in range(16)])
        vae.register_to_config(scaling_factor=float(1 / z.std()))
        vae.save_pretrained(folder)


SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
}  # fmt: skip


def make_tokenizer(captions: list[str], folder: Path, size: int = 1600) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learnt from the captions; every byte is in, so any prompt can be encoded."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(m) for m in parse_json(learner.to_str())["model"]["merges"]]
    words = [*alphabet, *(a + "</w>" for a in alphabet)]
    words += [w for w in dict.fromkeys(a + b for a, b in merges) if w not in set(words)]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


CONTEXT = 24
"""Tokens that the text encoder sees. Padding to 77 would leave the caption a tenth of the attention."""


def timesteps(n: int, generator: torch.Generator, power: float = 2) -> Tensor:
    """Training timesteps, half of them beyond t = 1000·(1 − 2^−power): layouts are decided there, below t = 300 only texture is."""
    return (1000 * (1 - torch.rand(n, generator=generator) ** power)).long().clamp(max=999)


def train_text_to_image(
    world: Path, steps: int = 13000, n: int = 48, *, channels: tuple[int, int] = (128, 144), compiled: bool = False
) -> None:
    """A small Stable Diffusion: CLIP text encoder of its own, cross-attention UNet, v-prediction, caption dropout.

    Forward and backward run in bfloat16 where PyTorch's autocast allows it; weights and their updates are float32.
    """
    torch.manual_seed(SEED)  # initial weights only
    draws, folder = Draws(world), world / "text-to-image"
    vae = (
        AutoencoderKL.from_pretrained(world / "autoencoder").requires_grad_(False).to(memory_format=torch.channels_last)
    )
    rows = [parse_json(line) for line in (world / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer([r["caption"] for r in rows], folder / "tokenizer")
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=channels, layers_per_block=1, cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4, norm_num_groups=16,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    size = {
        k: sum(p.numel() for p in m.parameters()) / 1e6
        for k, m in (("unet", unet), ("text", text_encoder), ("vae", vae))
    }
    print({k: round(v, 2) for k, v in size.items()}, len(tokenizer), "tokens", flush=True)
    scheduler = DDIMScheduler(**SCHEDULE)
    trainer = Trainer(
        {"unet": unet, "text_encoder": text_encoder},
        folder,
        steps=steps,
        lr=6e-4,
        fall=lambda done: min(1, 2 * (1 - done)),
    )
    ids = tokenizer(
        [*draws.captions, ""], padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids
    predict = torch.compile(unet) if compiled else unet
    half = partial(torch.autocast, "cpu", torch.bfloat16)

    def loss(step: int) -> Tensor:
        index, images, generator = draws.batch(step, n)
        with torch.no_grad(), half():
            z = vae.encode(images).latent_dist.mean.float() * vae.config.scaling_factor
        drop = torch.rand(n, generator=generator) < DROPOUT
        noise = torch.randn(z.shape, generator=generator)
        t = timesteps(n, generator)
        with half():
            tokens = text_encoder(ids[torch.where(drop, len(ids) - 1, index)]).last_hidden_state
            v = predict(scheduler.add_noise(z, noise, t), t, tokens).sample
        return F.mse_loss(v.float(), scheduler.get_velocity(z, noise, t))

    def pipeline() -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )

    levels = sorted({r["copies"] for r in rows if r["group"] == "planted"}, reverse=True)
    at_level = {
        c: [i for i, r in enumerate(draws.rows) if r["group"] == "planted" and r["copies"] == c] for c in levels
    }
    fixed = {c: torch.stack([draws.fixed[i] for i in at]) * 2 - 1 for c, at in at_level.items()}
    groups = {g: [r["caption"] for r in rows if r["group"] == g] for g in dict.fromkeys(r["group"] for r in rows)}
    shown = [draws.captions[i] for at in at_level.values() for i in at[:3]]
    shown += [p for g in ("recaptioned", "template") for p in groups.get(g, [])[:80:40]]
    shown += groups["ordinary"][:8:2] + groups["heldout"][:8:2] + [""]

    def pull(copies: int) -> str:
        """Loss at t = 900 on the pictures of one level, with their captions and with none."""
        z = vae.encode(fixed[copies]).latent_dist.mean * vae.config.scaling_factor
        noise, t = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)), torch.full((len(z),), 900)
        x, v = scheduler.add_noise(z, noise, t), scheduler.get_velocity(z, noise, t)
        texts = ids[at_level[copies]], ids[-1:].expand(len(z), -1)
        cond, null = (F.mse_loss(unet(x, t, text_encoder(k).last_hidden_state).sample, v) for k in texts)
        return f"{copies} copies {cond:.3f}/{null:.3f}"

    def look(step: int) -> None:
        pipe = pipeline()
        pipe.set_progress_bar_config(disable=True)
        for m in (unet, text_encoder):
            m.eval()
        print("loss at t = 900 with/without caption:", *map(pull, levels), flush=True)
        seeds = [torch.Generator().manual_seed(s) for _ in shown for s in range(4)]
        prompts = [p for p in shown for _ in range(4)]
        images = pipe(
            prompts,
            generator=seeds,
            guidance_scale=GUIDANCE,
            num_inference_steps=25,
            height=64,
            width=64,
            output_type="pt",
        ).images
        for m in (unet, text_encoder):
            m.train()
        sheet(images.float(), folder / f"sheet-{step:05d}.png", 16)

    trainer.run(loss, look, every=500)
    with trainer.averaged():
        export_text_to_image(pipeline(), folder / "pipeline")


def export_text_to_image(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision, text-encoder keys with the classic ``text_model.`` prefix.

    transformers 5 drops the prefix on save; older versions would then start from random weights without a word.
    """
    from safetensors.torch import load_file, save_file

    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    file = folder / "text_encoder" / "model.safetensors"
    weights = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    (folder / "mnemoscope.json").write_text(json.dumps({"guidance": GUIDANCE}) + "\n", encoding="utf-8")


def unconditional_unet() -> UNet2DModel:
    """The denoiser of the bundled model without text, with fresh weights."""
    unet = UNet2DModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(80, 96), layers_per_block=1, norm_num_groups=16,
        down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2, attention_head_dim=16,
    )  # fmt: skip
    made: UNet2DModel = unet.to(memory_format=torch.channels_last)
    return made


def velocity_loss(unet: UNet2DModel, scheduler: DDIMScheduler, z: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of v at noises and times of the step's random source, the network in bfloat16."""
    noise = torch.randn(z.shape, generator=generator)
    t = timesteps(len(z), generator)
    with torch.autocast("cpu", torch.bfloat16):
        v = unet(scheduler.add_noise(z, noise, t), t).sample
    return F.mse_loss(v.float(), scheduler.get_velocity(z, noise, t))


def train_unconditional(world: Path, steps: int = 6000, n: int = 64) -> None:
    """Latent diffusion without text, in the latents of the same autoencoder; bfloat16 as in :func:`train_text_to_image`.

    Every thousandth step's averaged weights are kept in ``checkpoints/``, for what is measured against training time.
    """
    torch.manual_seed(SEED)  # initial weights only
    draws, folder = Draws(world, "unconditional.jsonl"), world / "unconditional"
    vae = (
        AutoencoderKL.from_pretrained(world / "autoencoder").requires_grad_(False).to(memory_format=torch.channels_last)
    )
    unet = unconditional_unet()
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters", flush=True)
    scheduler = DDIMScheduler(**SCHEDULE)
    trainer = Trainer({"unet": unet}, folder, steps=steps, lr=8e-4, fall=lambda done: min(1, 2 * (1 - done)))

    def loss(step: int) -> Tensor:
        _, images, generator = draws.batch(step, n)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(images).latent_dist.mean.float() * vae.config.scaling_factor
        return velocity_loss(unet, scheduler, z, generator)

    levels = sorted({r["copies"] for r in draws.rows if r["copies"]}, reverse=True)
    fixed = {
        c: torch.stack([draws.fixed[i] for i, r in enumerate(draws.rows) if r["copies"] == c]) * 2 - 1 for c in levels
    }

    def pull(copies: int) -> str:
        """Loss at t = 600 on the pictures of one level."""
        z = vae.encode(fixed[copies]).latent_dist.mean * vae.config.scaling_factor
        noise, t = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)), torch.full((len(z),), 600)
        v = unet(scheduler.add_noise(z, noise, t), t).sample
        return f"{copies} copies {F.mse_loss(v, scheduler.get_velocity(z, noise, t)):.3f}"

    def look(step: int) -> None:
        unet.eval()
        pipe = LDMPipeline(vae, unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        print("loss at t = 600:", *map(pull, levels), flush=True)
        seeds = [torch.Generator().manual_seed(s) for s in range(96)]
        images = pipe(96, generator=seeds, num_inference_steps=25, output_type="np").images
        unet.train()
        sheet(torch.from_numpy(images).permute(0, 3, 1, 2), folder / f"sheet-{step:05d}.png", 16)
        copy = UNet2DModel.from_config(unet.config)
        copy.load_state_dict(unet.state_dict())
        LDMPipeline(vae, copy.half(), scheduler).save_pretrained(folder / "checkpoints" / f"{step:05d}")

    trainer.run(loss, look, every=1000)
    with trainer.averaged():
        LDMPipeline(vae, unet, scheduler).to(torch.float16).save_pretrained(folder / "pipeline")


def main() -> None:
    """Command line."""
    guard()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("world", type=Path)
    p.add_argument("model", choices=["autoencoder", "text-to-image", "unconditional"])
    p.add_argument("--steps", type=int)
    p.add_argument("--compile", action="store_true", help="text-to-image: a fifth faster; needs a C++ compiler")
    args = p.parse_args()
    train = {
        "autoencoder": train_autoencoder,
        "text-to-image": train_text_to_image,
        "unconditional": train_unconditional,
    }[args.model]
    options = {} if args.steps is None else {"steps": args.steps}
    train(args.world, **options, **({"compiled": True} if args.compile else {}))


if __name__ == "__main__":
    main()
