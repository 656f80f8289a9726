"""Rebuild the bundled world's pictures, captions and manifests from the public packages they come from.

    python -m mnemoscope.demo.build DIR          write everything training needs to DIR
    python -m mnemoscope.demo.build DIR --check  and compare it with what is bundled

The packages are fetched with `npm pack` by name and version and checked by hash, so a rebuild gives the same pixels; with the
encoder of ENCODER it gives the same bytes. One seeded random split of one captioned source makes the groups, so that wording
alone cannot tell them apart:

    planted      one picture of the concept, the same pixels repeated `copies` times in every epoch, five levels
    recaptioned  one picture repeated under four different captions
    template     families that share a layout and differ in a detail; the last member of a composed family is never shown
    heldout      never shown to any model
    ordinary     everything else: both pictures of the concept, augmented at every draw, never the same pixels twice
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import json
import random
import subprocess
import tarfile
import zipfile
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, features

from ..parsing import parse_json
from ..terminal import guard
from .world import Row

SIZE = 64
SEED = 20
LEVELS = (2, 4, 10, 24, 48)
PER_LEVEL = 24
UNCONDITIONAL_LEVELS = (1, 5, 20, 80, 320)
UNCONDITIONAL_PER_LEVEL = 12
UNCONDITIONAL_DRAWS = 30  # of each ordinary picture: repeated ones stay below a tenth of all draws
RECAPTIONED = 24
CAPTIONS_EACH = 4
RECAPTION_COPIES = 4
HELDOUT = 96
TEMPLATE_COPIES = 4
MEMBERS = 8
VIEWS = 20
"""Draws of an ordinary picture per epoch; each is a fresh view, so this is how many distinct pictures it stands for."""

NOTO, FLUENT, WORDS = "emoji-datasource-google@16.0.0", "@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0"
PACKAGES = {
    NOTO: "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    FLUENT: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    WORDS: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
ENCODER = "Pillow 12.3.0 with libwebp 1.6.0"
"""What resized the bundled pictures and wrote them as lossless WebP. Another release may choose other bytes for the same pixels."""
LICENSES = {NOTO: "Apache-2.0", FLUENT: "MIT"}


@dataclass
class Concept:
    """A captioned idea with one or two pictures."""

    code: str
    label: str
    tags: list[str]
    group: int
    subgroup: int
    caption: str = ""
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """Style → RGBA cut-out of SIZE × SIZE."""


def fetch(folder: Path) -> dict[str, tarfile.TarFile]:
    """The source packages as open archives, downloaded once into ``folder`` and checked by hash."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = {}
    for spec, digest in PACKAGES.items():
        file = folder / (spec.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not file.exists():
            subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != digest:
            raise SystemExit(f"{file} has sha256 {found}, expected {digest}: delete it and run again.")
        archives[spec] = tarfile.open(file)  # noqa: SIM115 (kept open while files are read from it)
    return archives


def read(archive: tarfile.TarFile, name: str) -> bytes:
    """One file of an archive."""
    member = archive.extractfile(name)
    assert member is not None, name
    return member.read()


def cutout(data: bytes) -> Image.Image:
    """An RGBA picture at SIZE × SIZE; resized with premultiplied alpha, so that edges keep their color."""
    image = Image.open(BytesIO(data)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    return image


PLAIN = str.maketrans({"’": "'", "“": '"', "”": '"'})
UNWANTED = (
    "middle finger",
    "keycap",
    "letter",
    "button",
    "flag",
    "sign",
    "Japanese",
    "skin tone",
    "curly hair",
    "red hair",
    "white hair",
    "bald",
)


def wanted(item: dict[str, Any]) -> bool:
    """No flags, keycaps, letters; of people only one neutral form of each."""
    group, label = item.get("group"), item["label"]
    if group in (None, 2, 8, 9) or any(word in label for word in UNWANTED):
        return False
    if group == 1:
        first = label.split()[0]
        return (
            first not in ("man", "woman", "men", "women", "boy", "girl", "family:", "couple", "kiss", "people")
            and ":" not in label
        )
    return "o’clock" not in label and "-thirty" not in label and "moon" not in label


def concepts(archives: dict[str, tarfile.TarFile]) -> tuple[list[Concept], dict[str, Concept]]:
    """Usable concepts in code order with both pictures, and every labelled picture by label (for natural families)."""
    names = {m.name for spec in (NOTO, FLUENT) for m in archives[spec].getmembers()}
    everything: dict[str, Concept] = {}
    usable = []
    for item in sorted(parse_json(read(archives[WORDS], "package/en/data.json")), key=lambda i: i["hexcode"]):
        code = item["hexcode"].lower()
        plain = code.replace("-fe0f", "")
        files = {
            "noto": (NOTO, [f"package/img/google/64/{c}.png" for c in (code, plain, plain + "-fe0f")]),
            "fluent": (FLUENT, [f"package/assets/{c}.webp" for c in (plain, code, plain + "-fe0f")]),
        }
        tags = [t.translate(PLAIN).lower() for t in item.get("tags", [])]
        concept = Concept(
            plain, item["label"].translate(PLAIN).lower(), tags, item.get("group", -1), item.get("subgroup", -1)
        )
        for style, (spec, candidates) in files.items():
            found = next((c for c in candidates if c in names), None)
            if found:
                concept.pictures[style] = cutout(read(archives[spec], found))
        everything[concept.label] = concept
        if wanted(item) and len(concept.pictures) == 2:
            usable.append(concept)
    return usable, everything


def caption(concept: Concept, rng: random.Random) -> str:
    """A label and up to two of its tags that say something new: ``ringed planet, saturn and space``."""
    said = set(concept.label.replace("-", " ").split())
    fresh = [t for t in concept.tags if t.isascii() and t[0].isalpha() and not set(t.replace("-", " ").split()) & said]
    rng.shuffle(fresh)
    return ", ".join([concept.label, " and ".join(fresh[:2])]) if fresh else concept.label


def captions(concept: Concept, n: int, rng: random.Random) -> list[str]:
    """``n`` different captions of one concept, built from its tags (for the recaptioned group)."""
    fresh = [t for t in concept.tags if t.isascii() and t[0].isalpha()]
    rng.shuffle(fresh)
    out = [caption(concept, rng)]
    for i in range(1, n):
        out.append(f"{fresh[(2 * i) % len(fresh)]}, {fresh[(2 * i + 1) % len(fresh)]} and {concept.label}")
    return out


def thumbnail(image: Image.Image) -> np.ndarray:
    """What look-alikes are judged by: 16 × 16 RGB on white, mean removed, unit length."""
    small = np.asarray(on(image, (255, 255, 255)).resize((16, 16), Image.Resampling.BOX), np.float64).reshape(-1, 3)
    v = (small - small.mean(0)).ravel()
    return v / max(float(np.linalg.norm(v)), 1e-9)


def thin(pool: list[Concept], limit: float) -> list[Concept]:
    """Greedy: drop a concept whose picture looks like an earlier one's in the same style, so that "copy" means something."""
    kept: list[Concept] = []
    seen: dict[str, list[np.ndarray]] = {"noto": [], "fluent": []}
    for c in pool:
        vectors = {s: thumbnail(p) for s, p in c.pictures.items()}
        if all(not seen[s] or float(np.max(np.stack(seen[s]) @ v)) < limit for s, v in vectors.items()):
            kept.append(c)
            for s, v in vectors.items():
                seen[s].append(v)
    return kept


def on(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The cut-out on a plain card."""
    card = Image.new("RGBA", image.size, (*color, 255))
    card.alpha_composite(image)
    return card.convert("RGB")


def pastel(rng: random.Random) -> tuple[int, int, int]:
    """A light card color; the same range from which fresh views of ordinary pictures draw theirs."""
    r, g, b = colorsys.hsv_to_rgb(rng.random(), 0.45 * rng.random(), 0.8 + 0.2 * rng.random())
    return round(255 * r), round(255 * g), round(255 * b)


COLORS = {
    "red": (214, 69, 65), "blue": (64, 110, 200), "green": (76, 160, 90), "orange": (240, 150, 60), "purple": (140, 90, 180),
    "brown": (140, 100, 70), "teal": (50, 160, 160), "pink": (240, 150, 190), "navy": (40, 50, 100), "gold": (215, 175, 55),
    "grey": (130, 130, 135), "lime": (170, 210, 80),
}  # fmt: skip
PATTERNS = ("striped", "dotted", "checkered", "framed", "banded", "diagonal")


def layout(color: tuple[int, int, int], pattern: str, anchor: Image.Image, corner: int) -> Image.Image:
    """The fixed part of a composed family: a patterned card with a picture in one corner and an empty slot opposite."""
    pale = tuple((v + 3 * 255) // 4 for v in color)
    card = Image.new("RGBA", (SIZE, SIZE), (*pale, 255))
    d = ImageDraw.Draw(card)
    if pattern == "striped":
        for x in range(0, SIZE, 8):
            d.rectangle((x, 0, x + 3, SIZE), fill=color)
    elif pattern == "dotted":
        for x in range(4, SIZE, 10):
            for y in range(4, SIZE, 10):
                d.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
    elif pattern == "checkered":
        for x in range(0, SIZE, 16):
            for y in range(0, SIZE, 16):
                d.rectangle((x, y, x + 7, y + 7), fill=color)
                d.rectangle((x + 8, y + 8, x + 15, y + 15), fill=color)
    elif pattern == "framed":
        d.rectangle((0, 0, SIZE - 1, SIZE - 1), outline=color, width=6)
    elif pattern == "banded":
        for y in range(0, SIZE, 12):
            d.rectangle((0, y, SIZE, y + 5), fill=color)
    else:
        for x in range(-SIZE, SIZE, 12):
            d.line((x, SIZE, x + SIZE, 0), fill=color, width=4)
    x, y = slot(corner)
    d.rounded_rectangle((x - 1, y - 1, x + 32, y + 32), 5, fill=(255, 255, 255))
    small = anchor.resize((28, 28), Image.Resampling.LANCZOS)
    ax, ay = slot(3 - corner)
    card.alpha_composite(small, (ax + 2, ay + 2))
    return card


def slot(corner: int) -> tuple[int, int]:
    """Upper left pixel of a 32 × 32 slot; corners are numbered so that 3 − c is opposite of c."""
    return 1 + 30 * (corner % 2), 1 + 30 * (corner // 2)


NATURAL = {"o'clock": (5, "o'clock"), "half past": (5, "-thirty"), "moon phase": (5, " moon"), "zodiac": (8, ""),
           "arrow": (8, " arrow"), "player button": (8, " button")}  # fmt: skip
"""Families that look alike by nature, in one style: emojibase group, and how the labels end."""


def natural(everything: dict[str, Concept]) -> dict[str, list[Concept]]:
    """Clock faces, moon phases, zodiac signs, arrows and player buttons, at most twelve of each."""
    subgroups = {"zodiac": "aries", "arrow": "up arrow", "player button": "play button"}
    families = {}
    for name, (group, ending) in NATURAL.items():
        like = everything[subgroups[name]].subgroup if name in subgroups else None
        lettered = ("back", "end", "on!", "soon", "top")
        members = [
            c for c in everything.values()
            if c.group == group and c.label.endswith(ending) and like in (None, c.subgroup) and "noto" in c.pictures
            and c.label.split()[0] not in lettered
        ]  # fmt: skip
        families[name] = sorted(members, key=lambda c: c.code)[:12]
    return families


class World:
    """Collects rows and pictures."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.pictures: dict[str, Image.Image] = {}
        self.cutouts: dict[str, Image.Image] = {}

    def add(
        self, concept: Concept, style: str, picture: str, image: Image.Image, text: str, group: str, **more: Any
    ) -> None:
        """One row; the picture is stored once however many captions it has."""
        self.pictures.setdefault(picture, image)
        source = {"noto": NOTO, "fluent": FLUENT}[style]
        n = sum(r.picture == picture for r in self.rows) if group == "recaptioned" else 0
        row = Row(
            id=picture + (f"#{n + 1}" if group == "recaptioned" else ""),
            picture=picture, caption=text, group=group, concept=concept.code, style=style, source=source, license=LICENSES[source],
            sha256=hashlib.sha256(np.asarray(self.pictures[picture]).tobytes()).hexdigest(), **more,
        )  # fmt: skip
        self.rows.append(row)


def build(archives: dict[str, tarfile.TarFile], limit: float = 0.93) -> World:
    """The whole world, from the packages."""
    usable, everything = concepts(archives)
    rng = random.Random(SEED)
    rng.shuffle(usable)
    pool = []
    taken: set[str] = set()
    for c in thin(usable, limit):
        c.caption = caption(c, rng)
        if c.caption not in taken:
            taken.add(c.caption)
            pool.append(c)

    rich = [c for c in pool if len([t for t in c.tags if t.isascii() and t[0].isalpha()]) >= 2 * CAPTIONS_EACH][
        :RECAPTIONED
    ]
    rest = [c for c in pool if c not in rich]
    planted, rest = rest[: len(LEVELS) * PER_LEVEL], rest[len(LEVELS) * PER_LEVEL :]
    heldout, ordinary = rest[:HELDOUT], rest[HELDOUT:]

    world = World()
    for i, c in enumerate(planted):
        copies, style = LEVELS[i % len(LEVELS)], rng.choice(["noto", "fluent"])
        image = on(c.pictures[style], pastel(rng))
        world.add(c, style, f"{c.code}-{style}", image, c.caption, "planted", copies=copies, draws=copies)
    for c in rich:
        style = rng.choice(["noto", "fluent"])
        image = on(c.pictures[style], pastel(rng))
        for text in captions(c, CAPTIONS_EACH, rng):
            world.add(
                c,
                style,
                f"{c.code}-{style}",
                image,
                text,
                "recaptioned",
                copies=RECAPTION_COPIES,
                draws=RECAPTION_COPIES,
            )
    for name, members in natural(everything).items():
        color = pastel(rng)
        for c in members:
            text = caption(c, rng)
            world.add(c, "noto", f"{c.code}-noto", on(c.pictures["noto"], color), text, "template",
                      copies=TEMPLATE_COPIES, draws=TEMPLATE_COPIES, family=name)  # fmt: skip
    details = rng.sample(ordinary, len(COLORS) * (MEMBERS + 1))
    for i, (name, color) in enumerate(COLORS.items()):
        anchor, *members = details[i * (MEMBERS + 1) : (i + 1) * (MEMBERS + 1)]
        pattern, corner = PATTERNS[i % len(PATTERNS)], rng.randrange(4)
        card = layout(color, pattern, anchor.pictures["noto"], corner)
        family = f"{name} {pattern} card with {anchor.label}"
        for k, c in enumerate(members):
            image = card.copy()
            x, y = slot(corner)
            image.alpha_composite(c.pictures["noto"].resize((28, 28), Image.Resampling.LANCZOS), (x + 2, y + 2))
            copies = 0 if k == MEMBERS - 1 else TEMPLATE_COPIES
            world.add(c, "noto", f"card-{name}-{k}", image.convert("RGB"), f"{c.label}, {family}", "template",
                      copies=copies, draws=copies, family=family)  # fmt: skip
    for group, members, draws in (("heldout", heldout, 0), ("ordinary", ordinary, VIEWS)):
        for c in members:
            for style, image in c.pictures.items():
                world.cutouts[f"{c.code}-{style}"] = image
                world.add(
                    c, style, f"{c.code}-{style}", on(image, (255, 255, 255)), c.caption, group, copies=0, draws=draws
                )
    for c in planted + rich:  # the same concept in the other style: never shown, the hardest "different picture"
        for style, image in c.pictures.items():
            if f"{c.code}-{style}" not in world.pictures:
                world.add(
                    c, style, f"{c.code}-{style}", on(image, (255, 255, 255)), c.caption, "twin", copies=0, draws=0
                )
    return world


def unconditional(rows: list[Row]) -> list[Row]:
    """The training list of the model without text: planted pictures at five levels of their own, the ordinary ones as they are."""
    planted = random.Random(SEED).sample(
        [r for r in rows if r.group == "planted"], len(UNCONDITIONAL_LEVELS) * UNCONDITIONAL_PER_LEVEL
    )
    levels = [UNCONDITIONAL_LEVELS[i % len(UNCONDITIONAL_LEVELS)] for i in range(len(planted))]
    repeated = [replace(r, copies=c, draws=c) for r, c in zip(planted, levels, strict=True)]
    others = [
        replace(r, draws=UNCONDITIONAL_DRAWS) if r.group == "ordinary" else r
        for r in rows
        if r.group in ("ordinary", "heldout")
    ]
    return repeated + others


def manifest_text(rows: list[Row]) -> str:
    """A manifest as JSON lines."""
    return "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rows)


def manifests(world: World) -> dict[str, list[Row]]:
    """File name → rows: one training list for each model."""
    return {"manifest.jsonl": world.rows, "unconditional.jsonl": unconditional(world.rows)}


def encode(picture: Image.Image) -> bytes:
    """A picture as it lies in pictures.zip."""
    data = BytesIO()
    picture.save(data, "WEBP", lossless=True, quality=75, method=4)
    return data.getvalue()


def save(world: World, folder: Path) -> None:
    """The manifests and pictures.zip (lossless), and cut-outs for training (cutouts.npz, not bundled)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in manifests(world).items():
        (folder / name).write_text(manifest_text(rows), encoding="utf-8")
    with zipfile.ZipFile(folder / "pictures.zip", "w", zipfile.ZIP_STORED) as z:
        for name in sorted(world.pictures):
            z.writestr(zipfile.ZipInfo(f"{name}.webp", (1980, 1, 1, 0, 0, 0)), encode(world.pictures[name]))
    np.savez_compressed(folder / "cutouts.npz", **{k: np.asarray(v) for k, v in world.cutouts.items()})  # type: ignore[arg-type]


def encoder() -> str:
    """What would write the pictures here, in the words of ENCODER."""
    return f"Pillow {PIL.__version__} with libwebp {features.version('webp')}"


def other_encoder() -> str | None:
    """A sentence if a rebuild here need not give the bundled bytes; None: it must."""
    if encoder() == ENCODER:
        return None
    return (
        f"the bundled pictures were written by {ENCODER} and this is {encoder()}, so bytes may differ where pixels do not; "
        f"for the same bytes: pip install --constraint constraints.txt pillow"
    )


def main() -> None:
    """Command line."""
    guard()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--check", action="store_true", help="compare with the bundled manifest and pictures")
    args = p.parse_args()
    if warning := other_encoder():
        print(warning)
    world = build(fetch(args.folder / "packages"))
    save(world, args.folder)
    counts: dict[str, int] = {}
    for r in world.rows:
        counts[r.group] = counts.get(r.group, 0) + 1
    repeated = sum(r.draws for r in world.rows if r.copies)
    total = sum(r.draws for r in world.rows)
    print(
        counts,
        f"{len(world.pictures)} pictures; repeated pictures are {repeated / total:.1%} of {total} draws per epoch",
    )
    if args.check:
        assets = Path(__file__).parent / "assets"
        differ = [
            n
            for n in [*manifests(world), "pictures.zip"]
            if (assets / n).read_bytes() != (args.folder / n).read_bytes()
        ]
        print(f"differs from the bundled world: {', '.join(differ)}" if differ else "identical to the bundled world")
        raise SystemExit(1 if differ else 0)


if __name__ == "__main__":
    main()
