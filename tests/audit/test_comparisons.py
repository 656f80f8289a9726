"""The control kit: variants of prompts, and a table that takes away what was held fast and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemoscope import stats
from mnemoscope.audit.comparisons import Comparison, Controls, matches, measure, text_strata
from mnemoscope.audit.config import AuditConfig
from mnemoscope.audit.plan import plan
from mnemoscope.audit.prompts import Columns, Prompt, PromptSet, read_prompts
from mnemoscope.audit.run import audit, calibrate
from mnemoscope.audit.variants import with_controls
from mnemoscope.errors import CannotAudit, UnknownName, UsageError
from mnemoscope.models.gaussian import Gaussian
from mnemoscope.records.schema import Manifest, Row, Score
from mnemoscope.records.store import Run, Writer
from mnemoscope.report.discrimination import Baseline
from mnemoscope.report.html import write_json, write_markdown, write_report
from mnemoscope.report.summary import read_summary

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def words(rng: np.random.Generator, n: int) -> list[str]:
    """Texts that no two of have much in common."""
    return [" ".join("".join(rng.choice(SYLLABLES, rng.integers(2, 4))) for _ in range(6)) for _ in range(n)]


def prompt_set(*items: dict[str, Any]) -> PromptSet:
    return read_prompts(list(items))


# Variants


ASKED = (
    {
        "id": "a",
        "prompt": "The Mona Lisa",
        "label": True,
        "swap": "a lady in Paris",
        "family": "louvre",
        "group": "art",
    },
    {"id": "b", "prompt": "a cat", "label": False, "swap": "an animal"},
    {"id": "c", "prompt": "A Dog"},
)


def test_variants_of_labeled_prompts() -> None:
    found = with_controls(prompt_set(*ASKED), ["case-fold", "title-case", "swap"])
    assert [(p.id, p.text, p.group, p.label, p.control, p.origin, p.family) for p in found][3:] == [
        ("a/case-fold", "the mona lisa", "control: case-fold", None, "case-fold", "a", "louvre"),
        ("b/title-case", "A Cat", "control: title-case", None, "title-case", "b", None),
        ("a/swap", "a lady in Paris", "control: swap", None, "swap", "a", "louvre"),
    ]
    assert found.notes == (
        "control case-fold: 1 of 2 prompts add no row, because their text is there already",
        "control title-case: 1 of 2 prompts add no row, because their text is there already",
    )


def test_without_controls_nothing_is_added() -> None:
    prompts = prompt_set(*ASKED)
    assert with_controls(prompts, []) is prompts
    assert len(with_controls(prompts, ["matched", "within-family"])) == 3


@pytest.mark.parametrize(
    ("items", "controls", "says"),
    [
        (ASKED[:1], ["swap"], "labels prompts only as memorized"),
        (ASKED[1:], ["matched"], "labels prompts only as ordinary"),
        (ASKED[2:], ["case-fold"], "labels none as either"),
        (({"prompt": "x", "label": True}, *ASKED[1:]), ["swap"], "has none; add them as a column named swap"),
    ],
)
def test_what_controls_need_is_said(items: Sequence[dict[str, Any]], controls: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        with_controls(prompt_set(*items), controls)


def test_families_and_swaps_are_columns(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("caption,Family,other,swap\nred shoe,shoes,a shoe,\nblue hat,,,hat\n")
    assert [(p.family, p.swap) for p in read_prompts(file)] == [("shoes", None), (None, "hat")]
    assert [(p.family, p.swap) for p in read_prompts(file, Columns(swap="other"))] == [
        ("shoes", "a shoe"),
        (None, None),
    ]
    prompts = [Prompt("1", "x", family="f", swap="y")]
    assert read_prompts(prompts).prompts == tuple(prompts)
    with pytest.raises(UsageError, match="not text"):
        read_prompts([{"prompt": "x", "swap": 3}])


def test_controls_are_a_setting() -> None:
    assert AuditConfig(controls="swap, matched").controls == ["swap", "matched"]
    assert AuditConfig(controls=["swap,matched", "swap"]).controls == ["swap", "matched"]
    with pytest.raises(UnknownName, match=r"no control named 'swop'. Did you mean 'swap'"):
        AuditConfig(controls=["swop"])
    with pytest.raises(UsageError, match="controls is 3, and must be a list of controls: case-fold, title-case, swap"):
        AuditConfig(controls=3)


# The table


def run_of(folder: Path, prompts: Sequence[Prompt], scores: Sequence[float]) -> Run:
    """A finished run whose only score is given, one seed each."""
    run = Run.open(folder, Manifest(status="done", asked=len(prompts)))
    with Writer(run) as writer:
        for i, (p, value) in enumerate(zip(prompts, scores, strict=True)):
            score = {"s": Score(value=float(value), space="eps")}
            writer.append([Row(id=f"{i}", prompt=p.text, seed=0, status="ok", scores=score, **p.facts)])
    return run


def tables_of(run: Run) -> tuple[dict[str, Comparison], dict[str, Comparison]]:
    """By control: of the score, and of the text score."""
    found = measure(run, resamples=60)
    assert found is not None
    own, text = ({c.control: c for c in found.table if c.detector == name} for name in ("s", "ngrams"))
    return own, text


def table_of(run: Run) -> dict[str, Comparison]:
    return tables_of(run)[0]


@pytest.fixture
def labeled() -> Callable[..., list[Prompt]]:
    def make(texts: Sequence[str], memorized: int, **columns: Sequence[Any]) -> list[Prompt]:
        return [
            Prompt(f"p{i}", text, label=i < memorized, **{k: v[i] for k, v in columns.items()})
            for i, text in enumerate(texts)
        ]

    return make


def value(c: Comparison) -> float:
    assert c.auc is not None, c.note
    return c.auc.value


def test_a_score_that_only_sees_the_wording_falls_to_chance(tmp_path: Path, labeled: Callable[..., Any]) -> None:
    """Half of each group are titles, but most memorized prompts are: a score that counts capitals has an AUC for no good reason."""
    rng = np.random.default_rng(0)
    texts, labels = words(rng, 400), np.arange(400) < 100
    titles = np.where(labels, rng.random(400) < 0.8, rng.random(400) < 0.2)
    texts = [t.title() if title else t for t, title in zip(texts, titles, strict=True)]
    style = titles + rng.normal(0, 0.1, 400)
    truth = labels + rng.normal(0, 0.5, 400)
    blind = table_of(run_of(tmp_path / "style", labeled(texts, 100), style))
    assert value(blind["overall"]) == pytest.approx(0.8, abs=0.05)
    # One stratum in five holds titles and others, so some of it is left.
    assert abs(value(blind["given-text"]) - 0.5) < 0.4 * (value(blind["overall"]) - 0.5)
    assert abs(value(blind["matched"]) - 0.5) < 0.4 * (value(blind["overall"]) - 0.5)
    sees, text = tables_of(run_of(tmp_path / "truth", labeled(texts, 100), truth))
    for control in ("overall", "given-text", "matched"):
        assert value(sees[control]) == pytest.approx(stats.auc(truth, labels), abs=0.05)
    assert value(text["overall"]) == pytest.approx(0.8, abs=0.05)
    # The text score itself says how well the controls work.
    assert abs(value(text["given-text"]) - 0.5) < 0.15
    assert abs(value(text["matched"]) - 0.5) < 0.05
    assert 60 < sees["matched"].positives == sees["matched"].negatives < 100


def test_strata_and_matches_by_hand() -> None:
    text = np.arange(10) / 10
    assert text_strata(text).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    text[[1, 7]] = 0.02, 0.68
    labels = np.isin(np.arange(10), [1, 7])
    # 0.02 takes 0.0; 0.68 would take 0.6 or 0.8, and both are farther than 0.2 standard deviations.
    assert matches(text, labels).tolist() == matches(text, ~labels).tolist() == [0, 1]
    # The higher text score chooses first, and what it takes is gone.
    text = np.array([1.0, 0.99, 1.0, 0.98, 0.0, 0.0])
    assert matches(text, np.array([True, True, False, False, False, False])).tolist() == [0, 1, 2, 3]
    assert matches(text, np.arange(6) != 3).tolist() == [1, 3]
    assert matches(np.array([0.0, 1.0]), np.array([True, False])).tolist() == []


def test_pairs_of_one_stratum_only() -> None:
    scores, labels, strata = [5, 1, 4, 3, 9, 8], [1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 2]
    won, pairs = stats.pairs_within(scores, labels, strata)
    assert (won.tolist(), pairs.tolist()) == ([1, 1], [1, 2])
    assert stats.stratified_auc(scores, labels, strata=strata).value == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="no stratum holds memorized and ordinary"):
        stats.stratified_auc(scores, labels, strata=range(6))


@pytest.mark.parametrize("at_once", [7, 256])
def test_one_stratum_is_the_bootstrap_of_the_auc(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "ROWS_AT_ONCE", at_once)
    rng = np.random.default_rng(8)
    labels = np.arange(60) < 25
    for scores in (np.round(rng.normal(labels, 1), 1), labels * 1.0):
        clusters = rng.integers(40, size=60)
        found = stats.stratified_auc(scores, labels, clusters, resamples=200, seed=2)
        assert found == stats.cluster_bootstrap(stats.auc, scores, labels, clusters, resamples=200, seed=2)
    # And of several, the bootstrap of the definition.
    strata = rng.integers(3, size=60)

    def by_definition(columns: np.ndarray, y: np.ndarray) -> float:
        won, pairs = stats.pairs_within(columns[:, 0], y, columns[:, 1])
        return float(won.sum() / pairs.sum())

    both = np.stack([rng.normal(labels, 1), strata], axis=1)
    expected = stats.cluster_bootstrap(by_definition, both, labels, clusters, resamples=50)
    found = stats.stratified_auc(both[:, 0], labels, clusters, strata, resamples=50)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_intervals_of_families() -> None:
    rng = np.random.default_rng(0)
    won, pairs = rng.binomial(7, 0.7, 200).astype(float), np.full(200, 7.0)
    found = stats.bootstrap_ratio(won, pairs)
    assert found.value == pytest.approx(won.sum() / 1400)
    half = 1.96 * won.std() / 7 / 200**0.5
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.01)
    sure = stats.bootstrap_ratio([2, 3], [2, 3])
    assert (sure.value, sure.low, sure.high) == (1.0, *map(pytest.approx, (stats.clopper_pearson(2, 2).low, 1.0)))
    assert "only 3 strata" in stats.bootstrap_ratio([1, 0, 2], [2, 2, 2]).note
    with pytest.raises(UsageError, match="no pair to compare"):
        stats.bootstrap_ratio([], [])


def test_within_families(tmp_path: Path, labeled: Callable[..., Any]) -> None:
    """A score that sees the brand alone separates everything but the members of a brand."""
    rng = np.random.default_rng(1)
    texts = words(rng, 60)
    # Memorized prompts are of brands 0 to 4; so are ten of the ordinary ones.
    family = [f"brand {i % 5}" if i < 30 else None for i in range(60)]
    prompts = labeled(texts, 20, family=family)
    brand = [1.0 if f else 0.0 for f in family]
    found = table_of(run_of(tmp_path / "brand", prompts, brand))
    assert value(found["overall"]) == pytest.approx(0.5 + 0.5 * 30 / 40)
    within = found["within-family"]
    assert (value(within), within.positives, within.negatives, within.note) == (0.5, 20, 10, "5 families of the source")
    # Without the column, near-duplicates are the families; here there are none.
    found = table_of(run_of(tmp_path / "none", labeled(texts, 20), brand))
    assert (found["within-family"].auc, found["within-family"].note) == (None, "no family holds prompts of both labels")
    twins = [f"{stem} number {i}" for stem in words(rng, 6) for i in (1, 2)]
    twins = twins[::2] + twins[1::2]
    found = table_of(run_of(tmp_path / "twins", labeled(twins, 6), [1.0] * 6 + [0.0] * 6))
    assert (value(found["within-family"]), found["within-family"].note) == (1.0, "6 clusters of near-duplicates")


def test_swapped_captions(tmp_path: Path, labeled: Callable[..., Any]) -> None:
    """A score that sees the picture behind any caption is at chance; one that sees the caption is not."""
    rng = np.random.default_rng(2)
    texts, other = words(rng, 40), [*words(rng, 15), *[None] * 25]
    prompts = with_controls(PromptSet(tuple(labeled(texts, 15, swap=other)), "a list"), ["swap"]).prompts
    assert [p.control for p in prompts] == [None] * 40 + ["swap"] * 15
    by_picture = [10.0 + i for i in range(15)] + [0.0] * 25 + [10.0 + i for i in range(15)]
    swap = table_of(run_of(tmp_path / "picture", prompts, by_picture))["swap"]
    assert (value(swap), swap.positives, swap.negatives) == (0.5, 15, 15)
    assert swap.note == "the memorized caption scores higher in 0 of 15 pairs"
    by_caption = [10.0 + i for i in range(15)] + [0.0] * 40
    swap = table_of(run_of(tmp_path / "caption", prompts, by_caption))["swap"]
    assert (value(swap), swap.note) == (1.0, "the memorized caption scores higher in 15 of 15 pairs")


def test_other_letters(tmp_path: Path, labeled: Callable[..., Any]) -> None:
    rng = np.random.default_rng(3)
    texts = [t.title() if i % 3 else t for i, t in enumerate(words(rng, 40))]
    asked = PromptSet(tuple(labeled(texts, 15)), "a list")
    prompts = with_controls(asked, ["case-fold"]).prompts
    # What is in lower case already stands for itself.
    assert sum(p.control is not None for p in prompts) == sum(t != t.lower() for t in texts)
    capitals = [float(any(c.isupper() for c in p.text)) for p in prompts]
    folded = table_of(run_of(tmp_path / "capitals", prompts, capitals))["case-fold"]
    assert (value(folded), folded.positives, folded.negatives) == (0.5, 15, 25)
    truth = [float(p.label if p.control is None else int(p.origin[1:]) < 15) for p in prompts]
    folded = table_of(run_of(tmp_path / "truth", prompts, truth))["case-fold"]
    assert (value(folded), folded.note) == (1.0, "a score moves by 0 on average; the groups' means are 1 apart")


def test_too_few_for_a_text_score(tmp_path: Path, labeled: Callable[..., Any]) -> None:
    run = run_of(tmp_path / "few", labeled(words(np.random.default_rng(4), 12), 3), np.arange(12.0))
    found, text = tables_of(run)
    assert value(found["overall"]) == 0.0
    assert {found[c].note for c in ("given-text", "matched")} == {"there is no text score"}
    assert text == {}
    none = measure(run_of(tmp_path / "one", labeled(["x", "y"], 2), [1.0, 2.0]))
    assert none is None
    alone = table_of(run_of(tmp_path / "alone", labeled(["x", "abcdefgh", "lmnopq"], 1), [1.0, 2.0, 3.0]))
    assert alone["overall"].auc is None
    assert "1 independent clusters of memorized" in alone["overall"].note


def test_the_order_of_rows_does_not_matter(tmp_path: Path, labeled: Callable[..., Any]) -> None:
    rng = np.random.default_rng(5)
    prompts, scores = labeled(words(rng, 60), 20), rng.normal(0, 1, 60)
    turned = rng.permutation(60)
    first = measure(run_of(tmp_path / "first", prompts, scores), resamples=20)
    second = measure(run_of(tmp_path / "second", [prompts[i] for i in turned], scores[turned]), resamples=20)
    assert first == second


# In an audit


@pytest.fixture
def items() -> list[dict[str, Any]]:
    rng = np.random.default_rng(6)
    swaps = words(rng, 12)
    return [
        {"id": f"m{i}", "prompt": text, "label": True, "group": "memorized", "swap": swap}
        for i, (text, swap) in enumerate(zip(words(rng, 12), swaps, strict=True))
    ] + [{"id": f"o{i}", "prompt": text, "label": False, "group": "ordinary"} for i, text in enumerate(words(rng, 30))]


@pytest.fixture
def world(items: list[dict[str, Any]]) -> Gaussian:
    memorized = [i["prompt"] for i in items if i["label"]]
    return Gaussian.world([], memorized, latent_shape=(3, 4, 4))


def test_an_audit_writes_the_table_and_its_report_shows_it(
    world: Gaussian, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = AuditConfig(prompts=items, seeds=2, controls=["swap", "title-case", "matched"], out=str(tmp_path / "run"))
    cost = plan(config, world)
    run = audit(config, target=world)
    # 42 prompts, 42 in other letters, 12 swapped.
    assert (world.forwards, cost.prompts, run.manifest.asked) == (cost.forwards, 96, 192)
    rows = list(run.rows())
    assert {r.control for r in rows} == {None, "swap", "title-case"}
    assert {r.label for r in rows if r.control} == {None}
    summary = read_summary(run.folder)
    assert (len(summary.findings), len(summary.variants)) == (42, 54)
    assert {g.name: g.prompts for g in summary.groups} == {
        "memorized": 12,
        "ordinary": 30,
        "control: swap": 12,
        "control: title-case": 42,
    }
    found = {c.control: c for c in summary.controls if c.detector == "magnitude"}
    assert list(found) == ["overall", "given-text", "matched", "within-family", "swap", "title-case"]
    assert found["overall"].auc == summary.discrimination[0].auc
    assert (found["overall"].positives, found["overall"].negatives) == (12, 30)
    assert value(found["swap"]) > 0.9  # here a swapped caption is an ordinary prompt
    assert value(found["title-case"]) < value(found["overall"])  # and so is one in other letters
    assert "54 prompts made for controls are no part of the numbers above." in summary.untested
    page, plain = write_report(run.folder).read_text(), write_markdown(run.folder).read_text()
    stored = json.loads(write_json(run.folder).read_text())
    for words_ in (
        "against other captions of the same pictures",
        "the memorized caption scores higher in 12 of 12 pairs",
    ):
        assert words_ in page
        assert words_ in plain
    assert "What is left of it under controls" in page
    assert stored["controls"][0]["words"] == "all labeled prompts"


def test_without_controls_there_is_no_table(world: Gaussian, items: list[dict[str, Any]], tmp_path: Path) -> None:
    run = audit(AuditConfig(prompts=items, seeds=1, out=str(tmp_path / "run")), target=world)
    stored = (run.folder / "controls.json").read_bytes()
    assert "table" not in json.loads(stored)
    assert Baseline.parse(stored).table == ()
    assert read_summary(run.folder).controls == ()
    assert "under controls" not in write_report(run.folder).read_text()
    found = measure(run, resamples=20)
    assert found is not None
    assert isinstance(found, Controls)
    # One call gives a finished run its table, in a form that the report reads.
    (run.folder / "controls.json").write_text(found.to_json())
    assert [asdict(c) for c in read_summary(run.folder).controls] == [asdict(c) for c in found.table]


def test_shards_make_the_same_table(world: Gaussian, items: list[dict[str, Any]], tmp_path: Path) -> None:
    common = {"prompts": items, "seeds": 1, "controls": ["swap"]}
    whole = audit(AuditConfig(**common, out=str(tmp_path / "whole")), target=world)
    for k in (1, 0):
        parts = audit(AuditConfig(**common, out=str(tmp_path / "parts"), shard=f"{k}/2"), target=world)
    assert (parts.folder / "controls.json").read_bytes() == (whole.folder / "controls.json").read_bytes()


def test_a_calibration_adds_no_variants(world: Gaussian, items: list[dict[str, Any]], tmp_path: Path) -> None:
    config = AuditConfig(prompts=items[12:], seeds=1, controls=["swap"], out=str(tmp_path / "run"))
    run, found = calibrate(config, target=world, fpr=0.1)
    assert len(found["magnitude"].record.scores) == run.manifest.asked == 30


def test_a_model_without_text_has_no_controls(tmp_path: Path) -> None:
    silent = Gaussian.tiny(latent_shape=(3, 4, 4), has_text=False)
    config = AuditConfig(controls=["matched"], detectors=["density"], images=True, out=str(tmp_path / "run"))
    with pytest.raises(CannotAudit, match="no prompts to make controls of"):
        audit(config, target=silent)


def test_few_pairs_are_not_certainty() -> None:
    """Some resamples hold no pair of one stratum; those that do are all won, so the exact bound stands in."""
    labels, strata = [True, True, False, False], [0, 1, 0, 2]
    found = stats.stratified_auc([3, 3, 1, 1], labels, strata=strata)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025**0.5)
