"""Do explanations hold? Delete or replace the words that each method ranks highest, and see what becomes of the score and the copies.

    python bench/explanations.py                        about 10 minutes on 2 cores; writes docs/explanations.md
    python bench/explanations.py --only pictures        copies alone, when another descriptor or image-text score is to judge them
    python bench/explanations.py --descriptor pixels    copies by another descriptor than the world's own
    python bench/explanations.py --fidelity none        without an image-text score

Planted captions of the bundled world whose picture was shown 48, 24 and 10 times per epoch. The default method was chosen on the
first two levels; the third one was looked at afterwards. Scores: first step, four seeds. Copies: DDIM 50, four seeds, the caption
with one word less, for the level of 48. Words without a letter are not deleted; a caption counts for k only if words are left.
Intervals: percentile bootstrap over captions, 2000 resamples; differences are paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from common import DOCS, machine, markdown_table, sample, write_block
from mnemoscope import Explainer, World, load, plugins, suggest
from mnemoscope.demo.world import COPY_FMR, WorldReference
from mnemoscope.explain.words import Word, without

CHOSEN_ON, LOOKED_AT_AFTER = (48, 24), (10,)
METHODS = ("edit", "wen", "gradient-input", "integrated-gradients", "leave-one-out")
COST = {"edit": "2F + B", "wen": "F + B", "gradient-input": "F + B", "integrated-gradients": "9F + 8B",
        "leave-one-out": "(words + 2)·F", "most tokens": "0", "random": "0", "bottom": "2F + B"}  # fmt: skip
DRAWS, KS, SEEDS = 5, (1, 2, 3), 4


@dataclass
class Case:
    """One caption with the orders in which methods would take its words away."""

    caption: str
    picture: str
    copies: int
    words: list[Word]
    orders: dict[str, list[list[int]]]
    values: dict[str, list[float]]


def cases(run: Explainer, world: World, levels: tuple[int, ...], methods: tuple[str, ...] = METHODS) -> list[Case]:
    rows = [r for level in levels for r in world.of("planted", copies=level)]
    captions = [r.caption for r in rows]
    explained = {m: run.explain(captions, m) for m in methods}
    out = []
    for i, row in enumerate(rows):
        keep = [j for j, w in enumerate(explained["wen"][i].words) if any(c.isalnum() for c in w.text)]
        words = [explained["wen"][i].words[j] for j in keep]
        values = {m: [explained[m][i].words[j].value for j in keep] for m in methods}
        values["most tokens"] = [float(len(w.positions)) for w in words]
        orders = {m: [np.argsort(-np.array(v), kind="stable").tolist()] for m, v in values.items()}
        orders["bottom"] = [orders["edit"][0][::-1]]
        rng = np.random.default_rng(i)
        orders["random"] = [rng.permutation(len(words)).tolist() for _ in range(DRAWS)]
        out.append(Case(row.caption, row.picture, row.copies, words, orders, values))
    return out


def drops(run: Explainer, found: list[Case], k: int, put: Callable[[Word], str]) -> dict[str, list[float]]:
    """Method → share of the score that is gone without its k first words, for each caption that has more."""
    usable = [c for c in found if len(c.words) > k]
    texts = {(m, c.caption): [edited(c, order[:k], put) for order in c.orders[m]] for c in usable for m in c.orders}
    asked = list(dict.fromkeys([c.caption for c in usable] + [t for some in texts.values() for t in some]))
    score = dict(zip(asked, run.scores(asked).mean(1).tolist(), strict=True))
    return {
        m: [1 - float(np.mean([score[t] for t in texts[m, c.caption]])) / score[c.caption] for c in usable]
        for m in COST
    }


def edited(case: Case, chosen: list[int], put: Callable[[Word], str]) -> str:
    text = case.caption
    for word in sorted((case.words[j] for j in chosen), key=lambda w: -w.start):
        text = without(text, [word], put(word))
    return text


def interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval."""
    v = np.asarray(values, float)
    means = v[np.random.default_rng(seed).integers(len(v), size=(2000, len(v)))].mean(1)
    return float(v.mean()), *map(float, np.quantile(means, [0.025, 0.975]))


def percent(values: list[float]) -> str:
    mean, low, high = (100 * x for x in interval(values))
    return f"{mean:.0f} % [{low:.0f}, {high:.0f}]"


def score_table(run: Explainer, found: list[Case], near: Callable[[Word], str]) -> tuple[str, dict]:
    by_k = {f"delete {k}": drops(run, found, k, lambda w: "") for k in KS}
    by_k["replace 1"] = drops(run, found, 1, near)
    rows, facts = [], {}
    for m in COST:
        cells = [percent(values[m]) for values in by_k.values()]
        against = [a - b for a, b in zip(by_k["delete 1"][m], by_k["delete 1"]["random"], strict=True)]
        agreement = [
            float(spearmanr(c.values[m], c.values["leave-one-out"]).statistic)
            for c in found
            if m in c.values and len(set(c.values[m])) > 1 and len(c.words) > 2
        ]
        rho = f"{np.mean(agreement):.2f}" if agreement else "–"
        rows.append([m, *cells, "–" if m == "random" else percent(against), rho, COST[m]])
        facts[m] = {name: interval(values[m]) for name, values in by_k.items()}
        facts[m] |= {"minus random, delete 1": interval(against), "rank correlation": float(np.mean(agreement or [0]))}
    columns = ["words by", *by_k, "delete 1, minus random", "ρ with leave-one-out", "per prompt and seed"]
    facts["captions"] = len(found)
    return markdown_table(columns, rows), facts


def suggestions(run: Explainer, found: list[Case], world: World) -> tuple[dict[str, str], dict]:
    """Edited captions of those above the threshold, and what finding them cost."""
    explained = run.explain([c.caption for c in found], calibration=world.thresholds)
    words = world.ordinary_words
    made = [suggest(run, e, among=words) for e in explained if e.above]
    facts = {
        "captions": len(found),
        "above": len(made),
        "brought under": sum(s.under for s in made),
        "by one edit": sum(s.under and len(s.edits) == 1 for s in made),
        "median forwards": float(np.median([s.forwards for s in made])),
    }
    return {s.prompt: s.text for s in made if s.under}, facts


def copies_table(target, found, suggested, reference, near, fidelity) -> tuple[str, dict]:
    """Generated pictures: the whole caption, and the caption after one edit."""
    variants = {"the whole caption": lambda c: c.caption}
    for m in ("edit", "wen", "leave-one-out", "random", "bottom"):
        variants[f"without {m}'s word"] = lambda c, m=m: edited(c, c.orders[m][0][:1], lambda w: "")
    variants["edit's word replaced"] = lambda c: edited(c, c.orders["edit"][0][:1], near)
    variants["as suggested"] = lambda c: suggested.get(c.caption)
    usable = [c for c in found if len(c.words) > 1]
    texts = list(dict.fromkeys(t for c in usable for v in variants.values() if (t := v(c)) is not None))
    noise = target.noise(range(SEEDS))
    shown: dict[str, torch.Tensor] = {}
    for start in range(0, len(texts), 16):
        part = texts[start : start + 16]
        pictures = sample(target, noise.repeat(len(part), 1, 1, 1), [t for t in part for _ in range(SEEDS)])
        shown |= dict(zip(part, pictures.split(SEEDS), strict=True))
        print(f"{min(start + 16, len(texts))}/{len(texts)} captions sampled", flush=True)
    rows, facts = [], {}
    for name, variant in variants.items():
        copied, likeness, fit = [], [], []
        for c in usable:
            if (text := variant(c)) is None:
                continue
            pictures = shown[text]
            matches = reference.nearest(pictures)
            copied.append(np.mean([bool(m.copy_found) and m.reference == c.picture for m in matches]))
            likeness.append(float(reference.similarities(pictures)[:, reference.ids.index(c.picture)].mean()))
            if fidelity is not None:
                fit.append(float(fidelity(pictures, [c.caption] * len(pictures)).mean()))
        own, seen = interval(likeness), interval(fit) if fit else None
        told = "not tested" if seen is None else f"{seen[0]:.3f} [{seen[1]:.3f}, {seen[2]:.3f}]"
        rows.append([name, str(len(copied)), percent(copied), f"{own[0]:.2f} [{own[1]:.2f}, {own[2]:.2f}]", told])
        facts[name] = {"captions": len(copied), "copied": interval(copied), "likeness": own, "fidelity": seen}
    named = "not tested" if fidelity is None else fidelity.name
    columns = ["prompt", "captions", "copies found (share of samples)", f"{reference.name} to the own picture",
               f"fit to the whole caption ({named})"]  # fmt: skip
    return markdown_table(columns, rows), facts


def reference_of(world: World, descriptor: str | None) -> WorldReference:
    """The world's reference set, or the same pictures under another descriptor, calibrated in the same way."""
    if descriptor is None:
        return world.reference
    made = WorldReference(world, world.shown, plugins.build("descriptor", descriptor))
    made.calibrate(world.pictures(world.different), fmr=COPY_FMR)
    return made


def scores_block(run: Explainer, world: World, near: Callable[[Word], str], show: Callable[..., None]) -> None:
    first, after = cases(run, world, CHOSEN_ON), cases(run, world, LOOKED_AT_AFTER)
    (table, facts), (checked, checked_facts) = (score_table(run, some, near) for some in (first, after))
    text = "\n\n".join([
        f"Measured by `python bench/explanations.py` on {machine()}. Share of the score (first step, {SEEDS} seeds) that is gone when "
        f"the words a method ranks highest are deleted, or replaced by the nearest word of ordinary captions; means over captions with "
        f"95 % intervals. *most tokens* ranks words by their number of tokens, *bottom* takes the words that `edit` ranks lowest, "
        f"*random* is the mean of {DRAWS} draws.",
        f"The {len(first)} captions whose pictures were shown 48 or 24 times per epoch, on which the default was chosen:",
        table,
        f"The {len(after)} captions of the level of 10, which had no part in the choice:",
        checked,
    ])  # fmt: skip
    show("measured-explanations", text, {"machine": machine(), "chosen on": facts, "looked at after": checked_facts})


def pictures_block(
    run: Explainer, world: World, near: Callable[[Word], str], show: Callable[..., None], args: argparse.Namespace
) -> None:
    fidelity = None if args.fidelity == "none" else plugins.build("caption_score", args.fidelity)
    reference = reference_of(world, args.descriptor)
    found = cases(run, world, CHOSEN_ON[:1], ("edit", "wen", "leave-one-out"))
    suggested, cost = suggestions(run, found, world)
    copies, facts = copies_table(run.target, found, suggested, reference, near, fidelity)
    options = f" --descriptor {args.descriptor}" if args.descriptor else ""
    text = "\n\n".join([
        f"Measured by `python bench/explanations.py --only pictures{options}` on {machine()}. Pictures (DDIM 50, {SEEDS} seeds) of the "
        f"{len(found)} captions of the level of 48, as they are and after one edit; means over captions with 95 % intervals. A copy is the "
        f"caption's own picture as nearest reference, above {reference.threshold:.3f} by {reference.name}.",
        copies,
        f"Suggested edits: {cost['above']} of the {cost['captions']} captions are above the threshold at 1 % FPR; "
        f"{cost['brought under']} of these were brought under it, {cost['by one edit']} by a single edit, for "
        f"{cost['median forwards']:g} forwards (median).",
    ])  # fmt: skip
    show("measured-edited-pictures", text, {"machine": machine(), "copies": facts, "suggestions": cost})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--only", choices=["scores", "pictures"], help="one of the two blocks")
    p.add_argument("--descriptor", help="another descriptor than the world's own")
    p.add_argument("--fidelity", default="world-captions", help="an installed image-text score, or none")
    p.add_argument("--print", action="store_true", help="print instead of writing the page")
    args = p.parse_args()
    world, target = World(), load(args.model)
    words, neighbor = world.ordinary_words, {}

    def near(word: Word) -> str:
        if word.text not in neighbor:
            neighbor[word.text] = target.neighbors([word.text], 1, words)[0][0]
        return neighbor[word.text]

    def show(name: str, text: str, facts: dict) -> None:
        print(text) if args.print else write_block(DOCS / "explanations.md", name, text, facts)

    run = Explainer(target, seeds=SEEDS)
    if args.only != "pictures":
        scores_block(run, world, near, show)
    if args.only != "scores":
        pictures_block(run, world, near, show, args)


if __name__ == "__main__":
    main()
