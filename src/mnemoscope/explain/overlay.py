"""Maps laid over pictures: WebP with a color bar, and the same in words.

Colors run from dark blue over gray to yellow with steadily growing lightness (cividis: Nuñez, Anderton & Renslow, PLOS ONE 2018),
which people with any kind of color vision read alike, and which survives a gray print.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from .regions import Regions

CIVIDIS = np.array(
    [(0, 32, 77), (49, 68, 107), (102, 105, 112), (149, 143, 120), (203, 186, 105), (255, 234, 70)], np.float64
)
"""Six evenly spaced colors of the map; what lies between is interpolated."""
LEAST_SIDE = 192
"""Pictures are enlarged by a whole factor to at least this many pixels."""
GAP = 8
BAR = 14
UNIT = {
    "score": "squared score difference",
    "curvature": "curvature difference",
    "attention": "attention to the end token",
}


@dataclass(frozen=True)
class Overlay:
    """A picture for people, and its words for those who cannot see it.

    Attributes:
        webp: The file's bytes.
        alt: What it shows, for the ``alt`` attribute.
        width: In pixels.
        height: In pixels.
    """

    webp: bytes
    alt: str
    width: int
    height: int

    def html(self) -> str:
        """An ``img`` element with the picture inside."""
        data = base64.b64encode(self.webp).decode()
        size = f'width="{self.width}" height="{self.height}"'
        return f'<img src="data:image/webp;base64,{data}" alt="{html.escape(self.alt)}" {size}>'


def colors(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """RGB in [0, 255] of values in [0, 1]; what lies outside gets the color at the end."""
    at = np.clip(values, 0, 1)
    knots = np.linspace(0, 1, len(CIVIDIS))
    return np.stack([np.interp(at, knots, CIVIDIS[:, c]) for c in range(3)], axis=-1)


def overlay(regions: Regions) -> Overlay:
    """For each seed the picture and, below it, its map over a gray version of it; one scale for all, from 0, with a bar."""
    heat = regions.upsampled().clamp(min=0).double().numpy()
    most = float(heat.max()) or 1.0
    factor = max(1, -(-LEAST_SIDE // min(heat.shape[1:])))
    pictures = [
        np.round(p.permute(1, 2, 0).double().numpy() * 255).clip(0, 255).astype(np.uint8) for p in regions.images
    ]
    columns = [
        np.concatenate([p, np.full((GAP, p.shape[1], 3), 255, np.uint8), _laid_over(p, h / most)])
        for p, h in zip((_larger(p, factor) for p in pictures), (_larger(h, factor) for h in heat), strict=True)
    ]
    gap = np.full((columns[0].shape[0], GAP, 3), 255, np.uint8)
    sheet = np.concatenate([part for column in columns for part in (column, gap)], axis=1)
    image = _with_bar(Image.fromarray(sheet), most)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90, method=4)
    return Overlay(out.getvalue(), describe(regions), image.width, image.height)


def describe(regions: Regions) -> str:
    """The maps in words: where each is strongest, how much of the picture holds half of it, and the scale."""
    heat = regions.upsampled().clamp(min=0)
    parts = []
    for seed, one in zip(regions.seeds, heat, strict=True):
        flat = one.flatten().sort(descending=True).values
        half = int((flat.cumsum(0) < flat.sum() / 2).sum()) + 1
        row, column = divmod(int(one.argmax()), one.shape[1])
        where = _where(row / one.shape[0], column / one.shape[1])
        parts.append(
            f"seed {seed}: strongest at the {where}, half of it in {100 * half / len(flat):.0f} % of the picture"
        )
    steps = f"step {regions.at[0] + 1}" if len(regions.at) == 1 else f"{len(regions.at)} steps"
    return (
        f"Generated pictures of {regions.prompt!r}, and where the prompt pulls them at {steps} ({UNIT[regions.kind]}, "
        f"0 to {float(heat.max()):.3g}, dark blue to yellow). {'; '.join(parts)}."
    )


def _where(down: float, right: float) -> str:
    """A ninth of the picture, in words."""
    row, column = (
        ("top", "middle", "bottom")[min(2, int(3 * down))],
        ("left", "center", "right")[min(2, int(3 * right))],
    )
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


def _larger(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _laid_over(picture: UInt8[np.ndarray, "height width 3"], heat: Float[np.ndarray, "height width"]) -> np.ndarray:
    """Color over gray, the more opaque the stronger."""
    gray = (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    alpha = 0.35 + 0.5 * heat[..., None]
    return np.round((1 - alpha) * gray + alpha * colors(heat)).astype(np.uint8)


def _with_bar(sheet: Image.Image, most: float) -> Image.Image:
    """The sheet with a color bar at its right, from 0 (below) to the largest value."""
    font = ImageFont.load_default(12)
    top, bottom = f"{most:.2g}", "0"
    room = max(int(font.getlength(top)), int(font.getlength(bottom))) + 6
    out = Image.new("RGB", (sheet.width + BAR + room, sheet.height), "white")
    out.paste(sheet, (0, 0))
    ramp = colors(np.linspace(1, 0, sheet.height))[:, None].repeat(BAR, 1)
    out.paste(Image.fromarray(np.round(ramp).astype(np.uint8)), (sheet.width, 0))
    draw = ImageDraw.Draw(out)
    draw.text((sheet.width + BAR + 4, 0), top, fill="black", font=font)
    draw.text((sheet.width + BAR + 4, sheet.height - 15), bottom, fill="black", font=font)
    return out
