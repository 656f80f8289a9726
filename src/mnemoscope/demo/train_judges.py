"""Train what judges pictures: the default copy descriptor, and the bundled world's own image–text score.

    python -m mnemoscope.demo.build world
    python -m mnemoscope.demo.train world autoencoder
    python -m mnemoscope.demo.train_judges world fingerprint        world/fingerprint/fingerprint.safetensors
    python -m mnemoscope.demo.train_judges world world-captions     world/world-captions/world-captions.safetensors

Each continues where it was stopped; about ten minutes on two free cores. The fingerprint is shown neither held-out pictures nor the
planted concepts' other pictures, the captions' judge neither those other pictures nor the held-out ones in the Fluent style: on
these they are judged (``docs/descriptors.md``).
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..parsing import parse_json
from ..similarity.captions import WorldCaptionsNetwork
from ..similarity.fingerprint import FingerprintNetwork
from ..terminal import guard
from .train import SEED, Draws, Trainer, hue

Network = TypeVar("Network", bound=torch.nn.Module)

LATENT_NOISE = (0.0, 0.2, 0.4, 0.6)
"""What is added to (scaled, unit-variance) latents before decoding: a diffusion model's latents are never quite right."""
TEMPERATURE, ENTROPY = 0.07, 0.5


def autoencoded(vae: AutoencoderKL, images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1] through the autoencoder, with Gaussian noise of that deviation on the scaled latents."""
    scale = vae.config.scaling_factor
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = vae.encode(images * 2 - 1).latent_dist.mean.float() * scale
        z = z + noise * torch.randn(z.shape, generator=generator)
        return (vae.decode(z / scale).sample.float() / 2 + 0.5).clamp(0, 1)


class Distortions:
    """What a copy may have suffered, each with some probability, different for every picture of a batch."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        """Distorted pictures, same shape, in [0, 1]."""
        x = self.moved(x)
        x = self.some(0.4, x, self.blurred)
        x = self.some(0.25, x, self.shrunk)
        x = self.some(0.6, x, self.recolored)
        x = self.some(0.3, x, self.noisy)
        return self.some(0.2, x, self.jpeg).clamp(0, 1)

    def some(self, share: float, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``change`` applied to that share of the pictures."""
        chosen = self.uniform(len(x)) < share
        if chosen.any():
            x = x.clone()
            x[chosen] = change(x[chosen])
        return x

    def uniform(self, *shape: int, low: float = 0, high: float = 1) -> Tensor:
        """Uniform numbers of that shape."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def moved(self, x: Tensor) -> Tensor:
        """Mirrored, turned by up to 12 degrees, cropped to as little as 70 % or with a margin, shifted."""
        n = len(x)
        turn = self.uniform(n, low=-0.21, high=0.21) * (self.uniform(n) < 0.5)
        scale = torch.where(self.uniform(n) < 0.6, self.uniform(n, low=0.7, high=1.05), torch.ones(n))
        aspect = self.uniform(n, low=0.95, high=1.05)
        mirror = torch.where(self.uniform(n) < 0.4, -1.0, 1.0)
        shift = self.uniform(n, 2, low=-1, high=1) * (0.06 + (1 - scale).clamp(min=0))[:, None]
        shift = shift * (self.uniform(n) < 0.6)[:, None]
        c, s = torch.cos(turn) * scale, torch.sin(turn) * scale
        rows = [torch.stack([c * mirror * aspect, -s, shift[:, 0]], 1), torch.stack([s * mirror, c, shift[:, 1]], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def blurred(self, x: Tensor) -> Tensor:
        """Gaussian blur of one width, 0.4 to 2 px."""
        sigma = float(self.uniform(1, low=0.4, high=2.0))
        radius = max(1, round(3 * sigma))
        line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        line = (line / line.sum()).expand(3, 1, 1, -1)
        x = F.pad(x, (radius,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(x, line, groups=3), line.transpose(2, 3), groups=3)

    def shrunk(self, x: Tensor) -> Tensor:
        """Made as small as 20 px and back."""
        side = int(self.uniform(1, low=20, high=48))
        small = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)

    def recolored(self, x: Tensor) -> Tensor:
        """Hue, saturation, contrast and brightness."""
        n = len(x)
        x = torch.einsum("nij,njhw->nihw", hue(self.uniform(n, low=-0.2, high=0.2)), x)
        grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
        light, contrast, saturation = (
            self.uniform(n, 1, 1, 1, low=a, high=b) for a, b in ((0.55, 1.2), (0.7, 1.3), (0.6, 1.4))
        )
        x = grey + saturation * (x - grey)
        return (light * (mean + contrast * (x - mean))).clamp(0, 1)

    def noisy(self, x: Tensor) -> Tensor:
        """Gaussian noise of up to 25 grey levels."""
        deviation = self.uniform(len(x), 1, 1, 1, high=0.1)
        return x + deviation * torch.randn(x.shape, generator=self.generator)

    def jpeg(self, x: Tensor) -> Tensor:
        """JPEG at qualities of 12 to 70."""
        out = []
        for picture, quality in zip(x, self.uniform(len(x), low=12, high=70).tolist(), strict=True):
            pixels = (picture.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy()
            data = BytesIO()
            Image.fromarray(pixels).save(data, "JPEG", quality=int(quality))
            out.append(torch.from_numpy(np.array(Image.open(data))).permute(2, 0, 1).float() / 255)
        return torch.stack(out)


def bank(vae: AutoencoderKL, pictures: Tensor, deviations: Sequence[float] = LATENT_NOISE) -> Tensor:
    """uint8 pictures through the autoencoder with each noise on the latents, ``[noise, n, 3, 64, 64]``."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([
        torch.cat([autoencoded(vae, x / 255, noise, generator).mul(255).round().byte() for x in pictures.split(64)])
        for noise in deviations
    ])  # fmt: skip


class Sources:
    """What a batch is made of: bundled pictures, their autoencoded versions, fresh views, and composed scenes.

    Scenes (cut-outs on clouds of color) are there so that the network meets more than one centered thing on a plain card.
    """

    def __init__(self, world: Path, vae: AutoencoderKL):
        rows = [parse_json(line) for line in (world / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
        unseen = {r["picture"] for r in rows if r["group"] in ("heldout", "twin")}
        names = [n for n in dict.fromkeys(r["picture"] for r in rows) if n not in unseen]
        with zipfile.ZipFile(world / "pictures.zip") as z:
            self.pictures = torch.stack([_picture(z, n) for n in names])
            self.unseen = torch.stack(
                [_picture(z, n) for n in dict.fromkeys(r["picture"] for r in rows if r["picture"] in unseen)]
            )
        self.views = Draws(world)
        self.cutouts = torch.stack(list(self.views.cut.values()))
        self.bank = bank(vae, self.pictures)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two versions of n different pictures, not yet distorted; in [0, 1]."""
        scenes, views = n // 4, n // 4
        index = torch.randperm(len(self.pictures), generator=generator)[: n - scenes - views]
        plain = self.pictures[index].float() / 255
        made = self.bank[torch.randint(len(self.bank), (len(index),), generator=generator), index].float() / 255
        second = torch.where((torch.rand(len(index), generator=generator) < 0.5)[:, None, None, None], made, plain)
        chosen = torch.randperm(len(self.cutouts), generator=generator)[:views]
        fresh = torch.cat([self.views.views(self.cutouts[chosen], generator), self.scenes(scenes, generator)])
        return torch.cat([plain, fresh]), torch.cat([second, fresh])

    def scenes(self, n: int, generator: torch.Generator) -> Tensor:
        """Up to four cut-outs of any size, turn and hue on clouds of color."""
        canvas = _clouds(n, 64, generator)
        for _ in range(4):
            chosen = self.cutouts[torch.randint(len(self.cutouts), (n,), generator=generator)]
            u = torch.rand(n, 6, generator=generator)
            scale, turn = 1 / (0.25 + 0.7 * u[:, 0]), (u[:, 1] - 0.5) * 6.28
            c, s, shift = torch.cos(turn) * scale, torch.sin(turn) * scale, (u[:, 2:4] - 0.5) * 2.4 * scale[:, None]
            theta = torch.stack([torch.stack([c, -s, shift[:, 0]], 1), torch.stack([s, c, shift[:, 1]], 1)], 1)
            grid = F.affine_grid(theta, [n, 4, 64, 64], align_corners=False)
            seen = F.grid_sample(chosen, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            rgb = (
                torch.einsum("nij,njhw->nihw", hue((u[:, 4] - 0.5) * 3), seen[:, :3]).clamp(min=0).minimum(seen[:, 3:])
            )
            there = (u[:, 5] < 0.7).float()[:, None, None, None]
            canvas = there * (rgb + (1 - seen[:, 3:]) * canvas) + (1 - there) * canvas
        return canvas.clamp(0, 1)


def _clouds(n: int, side: int, generator: torch.Generator) -> Tensor:
    """Noise of three octaves per channel around a random color."""
    x = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, side, side).clone()
    for cells, strength in ((2, 0.5), (4, 0.35), (16, 0.15)):
        noise = torch.randn(n, 3, cells, cells, generator=generator)
        weight = strength * torch.rand(n, 1, 1, 1, generator=generator)
        x += weight * F.interpolate(noise, (side, side), mode="bicubic", align_corners=False)
    return x.clamp(0, 1)


def _picture(archive: zipfile.ZipFile, name: str) -> Tensor:
    return torch.from_numpy(np.array(Image.open(BytesIO(archive.read(f"{name}.webp"))).convert("RGB"))).permute(2, 0, 1)


def contrast(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"]) -> Tensor:
    """InfoNCE both ways at :data:`TEMPERATURE`, plus the KoLeo entropy term −mean log ‖nearest other‖."""
    logits, own = a @ b.T / TEMPERATURE, torch.arange(len(a))
    both = torch.cat([a, b])
    similarity = both @ both.T
    similarity = similarity.masked_fill(torch.eye(len(both), dtype=torch.bool), -1)
    similarity[own, own + len(a)] = similarity[own + len(a), own] = -1
    nearest = (2 - 2 * similarity.max(1).values).clamp(min=1e-6).sqrt()
    koleo = -nearest.log().mean()
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2 + ENTROPY * koleo


def recall(network: FingerprintNetwork, unseen: Tensor, fmr: float = 1e-3) -> float:
    """Share of distorted never-seen pictures above the similarity that a share ``fmr`` of different pairs exceeds."""
    network.eval()
    x = unseen.float() / 255
    with torch.no_grad():
        s = network(Distortions(torch.Generator().manual_seed(1))(x)) @ network(x).T
    network.train()
    different = s[~torch.eye(len(s), dtype=torch.bool)]
    return float((s.diagonal() > torch.quantile(different, 1 - fmr)).float().mean())


def train_fingerprint(world: Path, steps: int = 800, n: int = 144) -> None:
    """The network of :mod:`mnemoscope.similarity.fingerprint`."""
    torch.manual_seed(SEED)  # initial weights only
    vae = AutoencoderKL.from_pretrained(world / "autoencoder").requires_grad_(False)
    sources, network = Sources(world, vae), _channels_last(FingerprintNetwork())
    print(f"{_size(network)}, {len(sources.pictures)} pictures", flush=True)
    trainer = Trainer({"network": network}, world / "fingerprint", steps=steps, lr=2e-3, ema=0.99)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        a, b = sources.batch(n, generator)
        distort = Distortions(generator)
        x = torch.cat([distort(a), distort(b)]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            cells = network.cells(x * 2 - 1).flatten(1)
        v = F.normalize(network.project(cells.float()), dim=1)
        return contrast(v[:n], v[n:])

    def look(step: int) -> None:
        found = recall(network, sources.unseen)
        print(f"step {step} distorted never-seen pictures found at 0.1 % false matches: {found:.3f}", flush=True)

    trainer.run(loss, look, every=200)
    with trainer.averaged():
        export(network, world / "fingerprint" / "fingerprint.safetensors")


def train_captions(world: Path, steps: int = 700, n: int = 128) -> None:
    """The network of :class:`mnemoscope.similarity.captions.WorldCaptions`."""
    torch.manual_seed(SEED)  # initial weights only
    vae = AutoencoderKL.from_pretrained(world / "autoencoder").requires_grad_(False)
    rows = [parse_json(line) for line in (world / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    judged = [r for r in rows if r["group"] == "twin" or (r["group"] == "heldout" and r["style"] == "fluent")]
    shown = [r for r in rows if r not in judged]
    with zipfile.ZipFile(world / "pictures.zip") as z:
        pictures, unseen = (torch.stack([_picture(z, r["picture"]) for r in some]) for some in (shown, judged))
    versions, draws = bank(vae, pictures, LATENT_NOISE[:2]), Draws(world)
    cut = {draws.rows[i]["picture"]: c for i, c in draws.cut.items()}
    network = _channels_last(WorldCaptionsNetwork())
    print(f"{_size(network)}, {len(shown)} pictures with captions", flush=True)
    trainer = Trainer({"network": network}, world / "world-captions", steps=steps, lr=2e-3, ema=0.99)
    by_concept: dict[str, list[int]] = {}
    for i, r in enumerate(shown):
        by_concept.setdefault(r["concept"], []).append(i)
    concepts = list(by_concept.values())

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        chosen = [concepts[i] for i in torch.randperm(len(concepts), generator=generator)[:n].tolist()]
        at = [c[int(torch.randint(len(c), (1,), generator=generator))] for c in chosen]
        x = versions[torch.randint(len(versions), (n,), generator=generator), at].float() / 255
        fresh = [k for k, i in enumerate(at) if shown[i]["picture"] in cut and torch.rand(1, generator=generator) < 0.6]
        if fresh:
            x[fresh] = draws.views(torch.stack([cut[shown[at[k]]["picture"]] for k in fresh]), generator)
        x = Distortions(generator)(x).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            cells = network.picture.cells(x * 2 - 1).flatten(1)
        seen = F.normalize(network.picture.project(cells.float()), dim=1)
        said = network.texts([_fewer_words(shown[i]["caption"], generator) for i in at])
        logits, own = seen @ said.T / TEMPERATURE, torch.arange(n)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def look(step: int) -> None:
        network.eval()
        captions = list(dict.fromkeys(r["caption"] for r in rows))
        with torch.no_grad():
            s = network.picture(unseen.float() / 255) @ network.texts(captions).T
        network.train()
        rank = (s > s.gather(1, torch.tensor([[captions.index(r["caption"])] for r in judged]))).sum(1)
        found = ", ".join(f"in the first {k}: {(rank < k).float().mean():.3f}" for k in (1, 5, 20))
        print(
            f"step {step} right caption among {len(captions)} for {len(judged)} never-shown pictures, {found}",
            flush=True,
        )

    trainer.run(loss, look, every=250)
    with trainer.averaged():
        export(network, world / "world-captions" / "world-captions.safetensors")


def _fewer_words(caption: str, generator: torch.Generator) -> str:
    """The caption without a fifth of its words, so that the score does not hang on one."""
    words = caption.split()
    kept = [w for w, u in zip(words, torch.rand(len(words), generator=generator).tolist(), strict=True) if u > 0.2]
    return " ".join(kept or words)


def _channels_last(network: Network) -> Network:
    """The layout in which CPUs convolve fastest."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _size(network: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"


def export(network: torch.nn.Module, file: Path) -> None:
    """The weights in half precision."""
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items() if v.is_floating_point()}, file)


def main() -> None:
    """Command line."""
    guard()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("world", type=Path)
    p.add_argument("judge", choices=["fingerprint", "world-captions"])
    p.add_argument("--steps", type=int)
    args = p.parse_args()
    train = {"fingerprint": train_fingerprint, "world-captions": train_captions}[args.judge]
    train(args.world, **({} if args.steps is None else {"steps": args.steps}))


if __name__ == "__main__":
    main()
