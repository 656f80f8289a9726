"""Studies of InvMM (Ma et al., ICCV 2025) on models of which it is known what they were shown, and how often.

Pictures that were not reproduced within the budget are censored: their score is more than anything that was reproduced, and among
themselves they are ordered by nothing. So ranks put them all last, together, and no mean of scores is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import spearmanr

from .. import stats
from ..audit.measures import Measured, Picture, measured
from ..demo.world import Row, World
from ..errors import UsageError
from ..measure import base
from ..measure.invmm import InvMM, varied
from ..models import identity
from ..models.base import Condition, Target, noise_from_seeds
from ..models.load import load
from ..plugins import BUNDLED
from ..records.schema import FORMAT
from ..records.store import write_whole
from ..report import svg
from .pages import Finding, alone, machine, table

MEMBERSHIP = ("denoising-loss", "secmi", "flipd", "critical-noise")
"""Cheap measures that are compared with InvMM on the same pictures."""

NATURAL = 4096
"""Samples of plain noise for brute force."""

NATURAL_PROMPT = 256
"""The same for each caption of a model with text."""

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.0)
"""Scales at which noise is drawn that was found at another one."""

SCREENED = (0.3, 0.5)
"""Shares of the pictures that a screen lets through."""

BATCH = 64


@dataclass(frozen=True)
class Case:
    """A picture and what the model's training made of it."""

    row: Row
    picture: Picture

    @property
    def copies(self) -> int:
        """How often it stands in an epoch; 0: held out."""
        return self.row.copies if self.row.group == "planted" else 0


def cases(world: World, work: Path, n: int, *, captions: bool) -> list[Case]:
    """The first n pictures of each level, and twice as many held-out ones, as files in ``work``."""
    rows = [row for level in world.levels for row in world.of("planted", copies=level)[:n]]
    held = {row.concept: row for row in reversed(world.of("heldout"))}  # one picture of each
    return as_files(world, rows + list(held.values())[: 2 * n], work, captions=captions)


def as_files(world: World, rows: Sequence[Row], work: Path, *, captions: bool = False) -> list[Case]:
    """Pictures of these rows as files in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    found = []
    for row, image in zip(rows, world.pictures([r.picture for r in rows]), strict=True):
        file = work / f"{row.picture}.png"
        if not file.exists():
            Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(file)
        found.append(Case(row, Picture(file, row.caption if captions else None)))
    return found


def setting(model: str, *, name: str = "improved") -> tuple[World, Target, InvMM]:
    """World, target and method of a bundled model."""
    if model not in BUNDLED:
        raise UsageError(f"{model} is no model of which is known what it was shown; use one of {', '.join(BUNDLED)}.")
    world, target = World(BUNDLED[model]), load(model)
    return world, target, method_on(world, target, name)


def method_on(world: World, target: Target, name: str = "improved") -> InvMM:
    """InvMM as the studies use it: similarity, and what of it is the same picture, are the bundled world's."""
    return InvMM(target, world.reference.descriptor, varied(target, name), beta=world.same_picture)


def plain_drawings(method: InvMM, n: int) -> Iterator[torch.Tensor]:
    """What n plain noises lead to in a model without text, some pictures at a time; always the same noises."""
    target = method.target
    for start in range(0, n, BATCH):
        noise = noise_from_seeds(range(start, start + BATCH), 1, target.latent_shape).to(target.device)
        yield method.drawn(noise, None, None)


def results(method: InvMM, some: Sequence[Case], out: Path, companions: Sequence[str] = ()) -> list[Measured]:
    """Measure what has not been measured yet."""

    def told(done: int, asked: int, m: Measured) -> None:
        print(f"{done}/{asked} {Path(m.image).name} {m.score:.4f} (paid {m.result['paid']:.4f})", flush=True)

    cheap = [base.build(name) for name in companions]
    return measured(method, [c.picture for c in some], out, progress=told, companions=cheap)


# Score against number of copies


def copies(model: str, work: Path, n: int) -> Finding:
    """Spearman's ρ of score and ln(copies), and two AUCs: often against once, trained against held out."""
    world, target, method = setting(model)
    some = cases(world, work / "pictures", n, captions=target.has_text)
    found = results(method, some, work / model)
    scores = np.array([m.score for m in found])
    dose = np.array([c.copies for c in some])
    lowest, highest = world.levels[0], world.levels[-1]
    trained = dose > 0
    rho = stats.clustered(_rho, np.stack([scores[trained], np.log(dose[trained])], 1), np.arange(int(trained.sum())))
    ends = np.isin(dose, (lowest, highest))
    often = stats.cluster_bootstrap(stats.auc, _low_is_stored(scores[ends]), dose[ends] == highest)
    member = stats.cluster_bootstrap(stats.auc, _low_is_stored(scores), trained)
    rows = []
    for level in [*world.levels[::-1], 0]:
        at = [m for m, c in zip(found, some, strict=True) if c.copies == level]
        rows.append(_level_row(f"{level} copies" if level else "held out", at))
    text = "\n\n".join([
        measured_by("copies", model, method, some, n),
        table(["copies per epoch", "reproduced", "nats per dimension: least, median, most", "nats in all, median", "F + B, median"], rows),
        f"Spearman's ρ of score and ln(copies), trained pictures: {_words(rho)}. AUC of {highest} copies against {lowest}: "
        f"{_words(often)}; of trained against held-out pictures: {_words(member)}.",
    ])  # fmt: skip
    facts = {
        "model": target.identity()["fingerprint"], "preset": asdict(method.preset), "beta": method.beta, "machine": machine(),
        "rho": _plain(rho), "often_against_once": _plain(often), "trained_against_heldout": _plain(member),
        "pictures": [{"picture": c.row.picture, "copies": c.copies, "score": finite(m.score), "paid": m.result["paid"],
                      "forwards": m.result["forwards"], "backwards": m.result["backwards"]} for c, m in zip(some, found, strict=True)],
    }  # fmt: skip
    points = [(c.copies, m) for c, m in zip(some, found, strict=True)]
    _write_levels(work / f"levels-{model}.json", method, some, found)
    return Finding(f"copies-{model}", "stored.md", text, facts, _strips(points, [*world.levels[::-1], 0]))


def _write_levels(file: Path, method: InvMM, some: Sequence[Case], found: Sequence[Measured]) -> None:
    """Scores by dose as pages of measured pictures read them; the package carries one such file for a model."""
    levels: dict[int, list[float | None]] = {}
    for case, m in zip(some, found, strict=True):
        levels.setdefault(case.copies, []).append(finite(m.score))
    facts = {
        "format": FORMAT, "target": method.target.identity(), "preset": asdict(method.preset), "beta": method.beta,
        "descriptor": method.descriptor.identity(), "levels": levels,
        "prompts": "caption" if method.target.has_text else "none",
    }  # fmt: skip
    write_whole(file, (json.dumps(identity.plain(facts), indent=1) + "\n").encode())


def _rho(rows: np.ndarray) -> float:
    if len(set(rows[:, 0])) < 2 or len(set(rows[:, 1])) < 2:
        return 0.0
    return float(spearmanr(rows[:, 0], rows[:, 1]).statistic)


def _low_is_stored(scores: np.ndarray) -> np.ndarray:
    """Higher is more stored; censored ones all lowest."""
    return np.where(np.isfinite(scores), -scores, -1e9)


def _level_row(name: str, found: Sequence[Measured]) -> list[str]:
    passed = sorted(m.score for m in found if math.isfinite(m.score))
    middle = sorted(m.score for m in found)[(len(found) - 1) // 2] if found else math.inf
    nats = [m.result["nats"] for m in found if m.score == middle and m.result["nats"] is not None]
    cost = sorted(m.result["forwards"] + m.result["backwards"] for m in found)
    return [
        name, f"{len(passed)} of {len(found)}",
        _spread(passed, middle, len(found)),
        f"{nats[0]:.1f}" if nats else "–", f"{cost[(len(cost) - 1) // 2]}" if cost else "–",
    ]  # fmt: skip


def _spread(passed: Sequence[float], middle: float, n: int) -> str:
    """Least, median and most; the most of those reproduced where others were not."""
    if not passed:
        return "–"
    return f"{passed[0]:.4f}, {or_censored(middle)}, {passed[-1]:.4f}" + (" (reproduced)" if len(passed) < n else "")


# The bound against brute force


def replication(model: str, work: Path, n: int) -> Finding:
    """Share of plain noises that lead to each picture, beside what its score says it is at least."""
    world, target, method = setting(model)
    some = [c for c in cases(world, work / "pictures", n, captions=target.has_text) if c.copies]
    found = results(method, some, work / model)
    samples = NATURAL_PROMPT if target.has_text else NATURAL
    hits = (_prompted if target.has_text else _plain_hits)(world, method, some, found, samples)
    rows, facts, holds = [], [], 0
    for case, m, k in zip(some, found, hits, strict=True):
        least = m.result["at_least"]
        facts.append(
            {"picture": case.row.picture, "copies": case.copies, "nats": m.result["nats"], "at_least": least, "hits": k}
        )
        if least is not None and k is not None:
            seen = stats.clopper_pearson(k, samples)
            holds += least <= seen.high
            rows.append([
                case.row.picture, str(case.copies), f"{m.result['nats']:.2f}", "{}/{}".format(*m.result["succeeded"]),
                f"{least:.2g}", f"{k / samples:.2%} [{seen.low:.2%}, {seen.high:.2%}]",
            ])  # fmt: skip
    told = [f for f in facts if f["at_least"] is not None and f["hits"] is not None]
    rank = spearmanr([f["nats"] for f in told], [f["hits"] for f in told]).statistic if len(told) > 2 else math.nan
    text = "\n\n".join([
        measured_by("replication", model, method, some, n) + f" {samples} samples of plain noise by the sampler of the tests"
        + (", for each picture with its caption and the guidance scale of its score." if target.has_text else "."),
        table(["picture", "copies", "nats", "fresh draws", "plain noise leads to it in at least", "and in fact in"], rows),
        f"The bound holds for {holds} of {len(told)} pictures that were reproduced (at the upper end of the 95 % interval). "
        f"Spearman's ρ of nats and observed rate: {rank:.2f}.",
    ])  # fmt: skip
    return Finding(
        f"replication-{model}", "stored.md", text, {"samples": samples, "pictures": facts, "rho": finite(float(rank))}
    )


def _plain_hits(
    world: World, method: InvMM, some: Sequence[Case], found: Sequence[Measured], samples: int
) -> list[int | None]:
    """How many of the same samples are each of the pictures."""
    hits = torch.zeros(len(some), dtype=torch.long)
    own = method.descriptor(world.pictures([c.row.picture for c in some]))
    for drawings in plain_drawings(method, samples):
        hits += (method.descriptor(drawings) @ own.T >= method.beta).sum(0).cpu()
    return [*hits.tolist()]


def _prompted(
    world: World, method: InvMM, some: Sequence[Case], found: Sequence[Measured], samples: int
) -> list[int | None]:
    """How many samples of each picture's own caption are that picture; of those that were not reproduced, none are drawn."""
    target = method.target
    hits: list[int | None] = []
    noise = noise_from_seeds(range(samples), 1, target.latent_shape).to(target.device)
    for case, m in zip(some, found, strict=True):
        if not m.result["passed"]:
            hits.append(None)
            continue
        own = method.descriptor(world.pictures([case.row.picture]))[0]
        cond = target.encode([case.row.caption])
        pictures = [method.drawn(part, cond.expand(len(part)), m.result["scale"]) for part in noise.split(BATCH)]
        hits.append(sum(int((method.descriptor(part) @ own >= method.beta).sum()) for part in pictures))
    return hits


# Memorization is not membership


def membership(model: str, work: Path, n: int) -> Finding:
    """On the same pictures: who tells members from others, and who tells often from once?"""
    world, target, method = setting(model)
    some = cases(world, work / "pictures", n, captions=target.has_text)
    found = results(method, some, work / model, MEMBERSHIP)
    dose = np.array([c.copies for c in some])
    lowest, highest = world.levels[0], world.levels[-1]
    scores = {"InvMM": _low_is_stored(np.array([m.score for m in found]))}
    for name in MEMBERSHIP:
        sign = -1.0 if base.build(name).low_is_stored else 1.0
        values = np.array([np.nan if (v := m.companions.get(name)) is None else v for m in found], float)
        scores[name] = np.nan_to_num(sign * values, nan=-1e9)
    once = np.isin(dose, (lowest, 0))
    ends = np.isin(dose, (lowest, highest))
    rows, facts = [], {}
    for name, s in scores.items():
        of = {
            "member": stats.cluster_bootstrap(stats.auc, s, dose > 0),
            "once": stats.cluster_bootstrap(stats.auc, s[once], dose[once] > 0),
            "often": stats.cluster_bootstrap(stats.auc, s[ends], dose[ends] == highest),
        }
        rows.append([name, *(_words(v) for v in of.values())])
        facts[name] = {k: _plain(v) for k, v in of.items()}
    few = "1 copy" if lowest == 1 else f"{lowest} copies"
    passed = np.array([m.result["passed"] for m in found])
    screened = [_missed(name, scores[name], passed) for name in MEMBERSHIP]
    text = "\n\n".join([
        measured_by("membership", model, method, some, n),
        table(["measure", "AUC, trained against held out", f"AUC, {few} per epoch against held out",
               f"AUC, {highest} copies against {lowest}"], rows),
        f"As a screen: of the {int(passed.sum())} pictures that InvMM reproduced, how many are among those that the cheap "
        f"measure finds most suspicious?",
        table(["screen", *(f"share of {share:g}" for share in SCREENED)], screened),
    ])  # fmt: skip
    return Finding(f"membership-{model}", "stored.md", text, facts)


def _missed(name: str, scores: np.ndarray, passed: np.ndarray) -> list[str]:
    """What a screen lets through of the pictures that were reproduced, at each share."""
    order = np.argsort(-scores, kind="stable")
    cells = []
    for share in SCREENED:
        k = int(passed[order[: math.ceil(share * len(order) - 1e-9)]].sum())
        seen = stats.clopper_pearson(k, max(1, int(passed.sum())))
        cells.append(f"{k} of {int(passed.sum())} [{seen.low:.0%}, {seen.high:.0%}]")
    return [name, *cells]


# Score against training steps


def training_steps(folder: str, work: Path, n: int) -> Finding:
    """The same pictures in checkpoints of one training."""
    checkpoints = _doubling(Path(folder))
    if not checkpoints:
        raise UsageError(f"{folder} holds no pipelines; name the checkpoints folder of mnemoscope.demo.train.")
    world = World("unconditional")
    some = cases(world, work / "pictures", n, captions=False)
    rows: list[list[str]] = []
    facts: dict[str, dict[int, list[float | None]]] = {}
    lines: dict[str, list[tuple[int, Sequence[float]]]] = {}
    for checkpoint in checkpoints:
        method = method_on(world, load(str(checkpoint), dtype="float32"))
        found = results(method, some, work / f"steps-{checkpoint.name}")
        row = []
        for level in [*world.levels[::-1], 0]:
            at = [m.score for m, c in zip(found, some, strict=True) if c.copies == level]
            row.append(cell(at))
            facts.setdefault(checkpoint.name, {})[level] = [finite(v) for v in at]
            lines.setdefault(f"{level} copies" if level else "held out", []).append((int(checkpoint.name), at))
        rows.append([str(int(checkpoint.name)), *row])
    text = "\n\n".join([
        measured_by("steps", folder, method, some, n),
        table(["training steps", *(f"{k} copies" if k else "held out" for k in [*world.levels[::-1], 0])], rows),
        "Each cell: pictures reproduced, and the median score in nats per dimension.",
    ])  # fmt: skip
    return Finding("training-steps", "stored.md", text, facts, courses(lines, "training steps"))


def _doubling(folder: Path) -> list[Path]:
    """Pipelines in folders named by their step, each at least twice as late as the one before, and the last."""
    known = sorted(folder.iterdir()) if folder.is_dir() else []
    every = [p for p in known if p.name.isdigit() and (p / "model_index.json").exists()]
    chosen = every[:1]
    for p in every:
        if int(p.name) >= 2 * int(chosen[-1].name):
            chosen.append(p)
    return list(dict.fromkeys([*chosen, *every[-1:]]))


# Other samplers


def samplers(model: str, work: Path, n: int) -> Finding:
    """Noise that was found with one sampler, drawn with others: does the picture still come?"""
    world, target, method = setting(model)
    some = [c for c in cases(world, work / "pictures", n, captions=target.has_text) if c.copies]
    found = results(method, some, work / model)
    kept = [(c, m) for c, m in zip(some, found, strict=True) if m.result["passed"]]
    tried: dict[str, Callable[[], Target]] = {
        f"DDIM, {k} steps": lambda: target for k in dict.fromkeys((method.preset.steps, 20, 50, 200))
    } | {name: _with_sampler(model, name) for name in ("DPM-Solver++, 20 steps", "Euler, 50 steps", "DDPM, 50 steps")}
    if target.has_text:
        tried |= {f"DDIM, {method.preset.steps} steps, guidance {g:g}": lambda: target for g in GUIDANCE_SCALES}
    rows, facts = [], {}
    for name, made in tried.items():
        parts, rates = name.split(", "), []
        steps = int(parts[1].split()[0])
        noisy = name.startswith("DDPM")  # draws noise of its own, from the target as it is
        other = _on(method, target if noisy else made())
        for case, m in kept:
            noise = load_file(work / model / "pictures" / f"{m.id}.safetensors")
            eps = noise_from_seeds(range(32), 2, target.latent_shape)
            x = noise["mu"] + (noise["s"] / 2).exp() * eps
            cond = target.encode([case.row.caption]).expand(len(x)) if target.has_text else None
            scale = float(parts[2].split()[1]) if len(parts) > 2 else m.result["scale"]
            own = method.descriptor(world.pictures([case.row.picture]))[0]
            pictures = _ancestral(target, x, cond, scale, steps) if noisy else other.drawn(x, cond, scale, steps)
            rates.append(float((method.descriptor(pictures) @ own >= method.beta).float().mean()))
        middle = stats.clustered(lambda v: float(np.mean(v)), np.array(rates), np.arange(len(rates)), share=True)
        rows.append([name, _words(middle), f"{sum(r >= 0.5 for r in rates)} of {len(rates)}"])
        facts[name] = rates
    text = "\n\n".join([
        measured_by("samplers", model, method, some, n) + " 32 draws of the noise found for each of the reproduced pictures.",
        table(["sampler", "draws that are the picture", "pictures that most draws lead to"], rows),
    ])  # fmt: skip
    return Finding(f"samplers-{model}", "stored.md", text, facts)


def _on(method: InvMM, target: Target) -> InvMM:
    """The same method on another target."""
    return InvMM(target, method.descriptor, method.preset, beta=method.beta)


def _with_sampler(model: str, name: str) -> Callable[[], Target]:
    """The same model with a sampler of diffusers."""

    def made() -> Target:
        from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

        target: Any = load(model)
        kind = DPMSolverMultistepScheduler if name.startswith("DPM") else EulerDiscreteScheduler
        target._scheduler = kind.from_config(target._scheduler.config)
        return target

    return made


@torch.no_grad()
def _ancestral(target: Any, x: torch.Tensor, cond: Condition | None, scale: float | None, steps: int) -> torch.Tensor:
    """Pictures by DDPM's own sampler, which draws noise at every step."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(target._scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(0)
    null = None if cond is None else target.encode([""]).expand(len(x))
    for t in scheduler.timesteps:
        out = target.output(x, t, cond)
        if scale is not None and scale > 1:
            base = target.output(x, t, null)
            out = base + scale * (out - base)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return target.decode(x)


# Words and drawings


def measured_by(study: str, model: str, method: InvMM, some: Sequence[Case], n: int) -> str:
    """The line above every table: the command, the machine, and what scores depend on."""
    command = f"python -m mnemoscope.lab {study} {model} --pictures {n}"
    return (
        f"Measured by `{command}` on {machine()}: {len(some)} pictures, preset {method.preset.name}, tests by DDIM "
        f"{method.preset.steps}, similarity of at least {method.beta:.3f} ({method.descriptor.name}), 95 % intervals over pictures."
    )


def _words(interval: stats.Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _plain(interval: stats.Interval) -> list[float]:
    return [round(v, 4) for v in (interval.value, interval.low, interval.high)]


def finite(value: float) -> float | None:
    """As JSON knows it: no infinity."""
    return value if math.isfinite(value) else None


def cell(scores: Sequence[float]) -> str:
    """How many of some pictures were reproduced, and their median score."""
    return f"{sum(map(math.isfinite, scores))}/{len(scores)}, {or_censored(sorted(scores)[(len(scores) - 1) // 2])}"


def or_censored(score: float) -> str:
    """A score in words."""
    return f"{score:.4f}" if math.isfinite(score) else "censored"


def _strips(points: Iterable[tuple[int, Measured]], levels: Sequence[int]) -> str:
    """Scores in strips, a row for each level; rings are censored pictures, at what had been paid."""
    points = list(points)
    x = svg.fit([max(m.result["paid"], 1e-5) for _, m in points], 110, 700, log=True)
    marks = [svg.x_axis(x, 40 + 34 * len(levels), "nats per dimension (rings: not reproduced, more than this)", top=20)]
    for i, level in enumerate(levels):
        y = 40 + 34 * i
        marks.append(svg.text(100, y + 4, f"{level} copies" if level else "held out", "label", "end"))
        for k, (_, m) in enumerate([p for p in points if p[0] == level]):
            at = x(max(m.result["paid"], 1e-5))
            marks.append(
                svg.tag("circle", cx=at, cy=y + (k % 5 - 2) * 4, r=4, class_="" if m.result["passed"] else "censored")
            )
    return alone(
        str(
            svg.drawing(720, 90 + 34 * len(levels), "Score against copies", "A strip for each level of copies.", *marks)
        )
    )


def courses(scores: Mapping[str, list[tuple[int, Sequence[float]]]], axis: str) -> str:
    """Scores against something: every picture, and a line through the medians of each kind; rings at the top are censored pictures."""
    every = [(at, v) for points in scores.values() for at, values in points for v in values]
    x = svg.fit([at for at, _ in every], 80, 580, log=False)
    y = svg.fit([max(v, 1e-3) for _, v in every if math.isfinite(v)], 260, 62, log=True)

    def height(score: float) -> float:
        return y(score) if math.isfinite(score) else 42.0

    marks = [
        svg.x_axis(x, 260, axis),
        svg.y_axis(y, 80, ""),
        svg.text(20, 18, "nats per dimension (rings: not reproduced)"),
    ]
    medians = {
        kind: [(x(at), height(sorted(values)[(len(values) - 1) // 2])) for at, values in points]
        for kind, points in scores.items()
    }
    ends = svg.spread([line[-1][1] for line in medians.values()], 15, 30, 260)
    for k, ((kind, points), end) in enumerate(zip(scores.items(), ends, strict=True)):
        marks.append(svg.polyline(medians[kind], f"c{k}"))
        for at, values in points:
            marks += [
                svg.tag("circle", cx=x(at) + 3 * (k - len(scores) / 2), cy=height(v), r=3,
                        class_=f"c{k}" if math.isfinite(v) else f"c{k} open") for v in values
            ]  # fmt: skip
        marks.append(svg.text(596, end + 4, kind, f"c{k}"))
    return alone(str(svg.drawing(720, 310, f"Score against {axis}", "A line for each kind of picture.", *marks)))
