"""What the improved preset of InvMM costs and how steady it is, beside the official one, on models of which it is known what they hold.

    python bench/invmm.py                 about half an hour on 2 cores; goes on where it was stopped; writes docs/benchmark.md
    python bench/invmm.py --few           of a model that was shown few pictures
    python bench/invmm.py --text          memorized pictures of the bundled text model, with captions
    python bench/invmm.py --foreign       photographs and static, which no model of emoji was shown

Pictures of the highest level (memorized), of those between, and held-out ones. F and B are counted, so they are those of any machine.
Spread is the standard deviation over seeds; costs are compared picture by picture. The trained pictures together tell whether the presets
put pictures in the order of their copies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from common import DOCS, machine, markdown_table, write_block
from mnemoscope import World, load
from mnemoscope.audit.measures import Measured, Picture, measured
from mnemoscope.lab.sizes import rows_of as size_study_rows
from mnemoscope.lab.stored import as_files, cases, method_on, setting
from mnemoscope.measure.invmm import InvMM

MODELS = {"": "demo-unconditional", "text": "demo", "foreign": "demo-unconditional"}
"""The bundled model of each option; ``--few`` has a model of its own."""

FEW = Path("build/lab/sizes-48/pipeline")
"""The model that was shown 48 pictures and nothing else, of ``python -m mnemoscope.lab sizes demo-unconditional``."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pictures", type=int, default=2, help="of each kind")
    p.add_argument("--seeds", type=int, default=3)
    for which in ("few", "text", "foreign"):
        p.add_argument(f"--{which}", dest="which", action="store_const", const=which, default="")
    p.add_argument("--work", type=Path, default=Path("build/bench-invmm"))
    args = p.parse_args()
    args.work /= args.which
    kinds: dict[str, list[Picture]] = {}
    found: dict[tuple[str, str], list[list[Measured]]] = {}
    for name in ("official", "improved"):
        kinds, copies, method = chosen(args.which, name, args.pictures, args.work / "pictures")
        for kind, pictures in kinds.items():
            # A seed of its own for each repetition: draws come from a picture's id, and ids from its setting.
            for seed in range(args.seeds if kind == "memorized" else 1):
                out = args.work / f"{name}-{kind}-{seed}"
                found.setdefault((name, kind), []).append(measured(method, repeated(pictures, out, seed), out))
                print(name, kind, seed, [(m.score, m.result["forwards"]) for m in found[name, kind][-1]], flush=True)
    facts: dict[str, Any] = {"machine": machine(), "kinds": {k: len(v) for k, v in kinds.items()}}
    rows: list[list[str]] = []
    for kind in kinds:
        cost = {n: np.array([[m.result["forwards"] + m.result["backwards"] for m in r] for r in found[n, kind]]).mean(0)
                for n in ("official", "improved")}  # fmt: skip
        share = cost["improved"] / cost["official"]
        scores = {n: np.array([[m.result["nats"] if m.result["passed"] else np.nan for m in r] for r in found[n, kind]])
                  for n in ("official", "improved")}  # fmt: skip
        rows.append([
            kind, *(f"{cost[n].mean():.0f}" for n in cost), f"{share.mean():.0%} ({share.min():.0%} to {share.max():.0%})",
            *(f"{np.isfinite(s).sum()} of {s.size}" for s in scores.values()), *(nats(s) for s in scores.values()),
        ])  # fmt: skip
        facts[kind] = {n: {"cost": cost[n].tolist(), "nats": np.nan_to_num(scores[n], nan=-1).tolist()} for n in cost}
    few_pictures = f"the model that was shown {FEW.parent.name.split('-')[1]} pictures and nothing else"
    which = few_pictures if args.which == "few" else f"`{MODELS[args.which]}`"
    option = f"--{args.which} " if args.which else ""
    text = "\n\n".join([
        f"Measured by `python bench/invmm.py {option}--pictures {args.pictures}` on {machine()}: {which}, "
        f"{args.pictures} pictures of each kind or level"
        + (f", {args.seeds} seeds of the memorized ones." if "memorized" in kinds else "."),
        markdown_table(["pictures", "F + B, official", "F + B, improved", "share, picture by picture", "reproduced, official", "improved",
                        "nats, official", "improved"], rows),
        "Nats are of pictures that were reproduced: mean, and standard deviation over seeds where there are several."
        + (ranked(found, copies, facts) if copies else ""),
    ])  # fmt: skip
    write_block(DOCS / "benchmark.md", f"measured-invmm{'-' if args.which else ''}{args.which}", text, facts)


def ranked(found: dict[tuple[str, str], list[list[Measured]]], copies: dict[str, int], facts: dict[str, Any]) -> str:
    """Whether both presets put trained pictures in the order of their copies."""
    ranks = {}
    for name in ("official", "improved"):
        trained = [m for kind in ("memorized", "between") for m in found[name, kind][0]]
        scores = np.array([m.score for m in trained])  # infinite: censored, all last together
        dose = np.log([copies[Path(m.image).name] for m in trained])
        facts[f"rho {name}"] = ranks[name] = float(spearmanr(scores, dose).statistic)
    return (
        f" Spearman's ρ of score and ln(copies) over {len(trained)} trained pictures: official {ranks['official']:.2f}, improved "
        f"{ranks['improved']:.2f}."
    )


def chosen(which: str, name: str, n: int, work: Path) -> tuple[dict[str, list[Picture]], dict[str, int], InvMM]:
    """Pictures of a model by kind, copies of the trained ones by file name, and the method."""
    if which == "few":
        return few(name, n, work)
    world, target, method = setting(MODELS[which], name=name)
    if which == "foreign":
        return {"photographs": photographs(work, n), "static": static(work, n)}, {}, method
    every = cases(world, work, n, captions=target.has_text)
    memorized = [c.picture for c in every if c.copies == world.levels[-1]]
    if which == "text":  # seven guidance scales: a picture that official does not find soon costs it 270,000 passes
        return {"memorized": memorized}, {}, method
    kinds = {
        "memorized": memorized,
        "between": [c.picture for c in every if 0 < c.copies < world.levels[-1]],
        "held out": [c.picture for c in every if not c.copies][:n],
    }
    return kinds, {c.picture.file.name: c.copies for c in every}, method


def photographs(work: Path, n: int) -> list[Picture]:
    """A temple and a flower, the sample pictures of scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    found = []
    work.mkdir(parents=True, exist_ok=True)
    for name in ("china", "flower")[:n]:
        file = work / f"{name}.png"
        if not file.exists():
            Image.fromarray(load_sample_image(f"{name}.jpg")).save(file)
        found.append(Picture(file, None))
    return found


def static(work: Path, n: int) -> list[Picture]:
    """Every pixel drawn by itself: what an autoencoder of pictures cannot even hold."""
    from PIL import Image

    found = []
    for k in range(n):
        file = work / f"static-{k}.png"
        if not file.exists():
            Image.fromarray(np.random.default_rng(k).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        found.append(Picture(file, None))
    return found


def few(name: str, n: int, work: Path) -> tuple[dict[str, list[Picture]], dict[str, int], InvMM]:
    """The same of the model that was shown few pictures."""
    if not FEW.exists():
        raise SystemExit(f"{FEW} is missing; make it with: python -m mnemoscope.lab sizes demo-unconditional")
    world = World("unconditional")
    method = method_on(world, load(str(FEW), dtype="float32"), name)
    shown, held = size_study_rows(world)
    kinds = {"memorized": as_files(world, shown[:n], work), "held out": as_files(world, held[:n], work)}
    return {kind: [c.picture for c in some] for kind, some in kinds.items()}, {}, method


def nats(scores: np.ndarray) -> str:
    """Mean of the pictures that were reproduced, and their standard deviation over seeds where there is one."""
    if not np.isfinite(scores).any():
        return "–"
    again = scores[:, np.isfinite(scores).sum(0) > 1]
    spread = f" ± {np.nanmean(np.nanstd(again, axis=0, ddof=1)):.1f}" if again.size else ""
    return f"{np.nanmean(scores):.1f}{spread}"


def repeated(pictures: list[Picture], out: Path, seed: int) -> list[Picture]:
    """The same pictures in files that differ in a comment, so that their ids, and with them all draws, differ."""
    from PIL import Image, PngImagePlugin

    out.mkdir(parents=True, exist_ok=True)
    copies = []
    for picture in pictures:
        file, note = out / picture.file.name, PngImagePlugin.PngInfo()
        note.add_text("seed", str(seed))
        if not file.exists():
            Image.open(picture.file).save(file, pnginfo=note)
        copies.append(Picture(file, picture.caption))
    return copies


if __name__ == "__main__":
    main()
