"""Make the pictures of the docs: contact sheet of the world and samples of the model.

python bench/pictures.py
"""

from __future__ import annotations

import math

import torch
from PIL import Image

from common import DOCS, sample
from mnemoscope import World, load


def grid(pictures: torch.Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Pictures in [0, 1] side by side."""
    n, _, h, w = pictures.shape
    canvas = torch.ones(3, math.ceil(n / columns) * (h + gap), columns * (w + gap))
    for i, picture in enumerate(pictures):
        y, x = divmod(i, columns)
        canvas[:, y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = picture
    return Image.fromarray((canvas.permute(1, 2, 0) * 255).round().byte().numpy())


def main() -> None:
    world = World()
    folder = DOCS / "images"
    folder.mkdir(exist_ok=True)
    rows = [world.of("planted", copies=c)[:16] for c in world.levels[::-1]]
    rows += [world.of("recaptioned")[::6][:16], [r for r in world.of("template") if "card with" in r.family][:16]]
    rows += [world.of("template")[:16], world.of("ordinary")[:16], world.of("heldout")[:16]]
    grid(world.pictures([r.picture for row in rows for r in row]), 16).save(folder / "world.webp", quality=85)

    # Each line: training picture, then four seeds of its caption; two captions a line, most copies first.
    target = load("demo")
    chosen = [r for c in world.levels[::-1] for r in world.of("planted", copies=c)[:4]]
    chosen += world.of("template")[40:44] + world.captions("ordinary")[:4] + world.captions("heldout")[:4]
    made = sample(
        target, target.noise([0, 1, 2, 3] * len(chosen)), [r.caption for r in chosen for _ in range(4)]
    ).unflatten(0, (-1, 4))
    cells = torch.cat([world.pictures([r.picture for r in chosen])[:, None], made], 1)
    grid(cells.flatten(0, 1), 20).save(folder / "text-to-image.webp", quality=85)


if __name__ == "__main__":
    main()
