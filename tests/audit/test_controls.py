"""The text-only baseline: it must find wording where there is some, nothing where there is none, and never cheat."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform
from sklearn.feature_extraction.text import TfidfVectorizer

from mnemoscope import stats
from mnemoscope.audit import controls
from mnemoscope.audit.controls import capitals_and_digits, near_duplicate_clusters, text_baseline, text_scores
from mnemoscope.errors import UsageError

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def words(rng, n):
    return [" ".join("".join(rng.choice(SYLLABLES, rng.integers(2, 4))) for _ in range(6)) for _ in range(n)]


def product(rng, i):
    return f"Carpet Foundations {rng.choice(['Red', 'Blue', 'Gray'])} Number {i:02} Living Room Collection"


def same_partition(a, b):
    """Whether two labelings put the same prompts together."""
    pairs = len(set(zip(np.asarray(a).tolist(), np.asarray(b).tolist(), strict=True)))
    return len(set(np.asarray(a).tolist())) == len(set(np.asarray(b).tolist())) == pairs


# Near-duplicates


def test_families_by_hand():
    prompts = [
        "Wall view 002 of the museum",
        "a cat asleep on a chair",
        "Wall view 003 of the museum",
        "wall  view 002 of the museum ",
        "",
        "a cat asleep on a chair",
        " ",
    ]
    assert near_duplicate_clusters(prompts).tolist() == [0, 1, 0, 0, 2, 1, 2]


@pytest.mark.parametrize("prompts", [[], [""], ["", " "], ["a"], ["é", "é", "🦊"], ["x" * 10_000, "\0"]])
def test_families_of_odd_prompts(prompts):
    family = near_duplicate_clusters(prompts)
    assert family.shape == (len(prompts),)
    assert same_partition(family, [" ".join(p.split()) for p in prompts])


def everything_at_once(texts):
    """The definition: one dense matrix, one linkage."""
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(texts)
    distance = np.clip(1 - (grams @ grams.T).toarray(), 0, None)
    np.fill_diagonal(distance, 0)
    return fcluster(linkage(squareform(distance, checks=False), "average"), 0.55, "distance")


@pytest.mark.parametrize("block", [7, 512])
def test_families_are_average_linkage_of_all_prompts(block, monkeypatch):
    monkeypatch.setattr(controls, "BLOCK", block)
    rng = np.random.default_rng(5)
    # Chains of prompts that change word by word: near neighbors, far ends, so that components and families differ.
    prompts = []
    for text in words(rng, 12):
        parts = text.split()
        for _ in range(8):
            prompts.append(" ".join(parts))
            parts[rng.integers(len(parts))] = words(rng, 1)[0].split()[0]
    prompts = list(dict.fromkeys(prompts))
    rng.shuffle(prompts)
    family = near_duplicate_clusters(prompts)
    assert same_partition(family, everything_at_once(prompts))
    component = controls._components(controls._grams(prompts), controls.NEAR)
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(prompts)
    near_pairs = (grams @ grams.T).toarray() > 0.45
    assert same_partition(component, connected_components(near_pairs)[1])
    assert len(set(component)) < len(set(family)) < len(prompts)  # else nothing was tested
    monkeypatch.setattr(controls, "LARGEST", 1)  # a component that is too large stays one family
    assert same_partition(near_duplicate_clusters(prompts), component)
    monkeypatch.undo()
    order = rng.permutation(len(prompts))
    assert same_partition(near_duplicate_clusters([prompts[i] for i in order]), family[order])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("ab c", max_size=12), min_size=1, max_size=12))
def test_equal_texts_are_one_family_and_numbers_follow_appearance(prompts):
    family = near_duplicate_clusters(prompts).tolist()
    by_text = {}
    for prompt, number in zip(prompts, family, strict=True):
        assert by_text.setdefault(" ".join(prompt.split()), number) == number
    assert list(dict.fromkeys(family)) == list(range(len(set(family))))


# The untrained score


def test_capitals_and_digits_by_hand():
    assert capitals_and_digits(["", "abc", "ABC", "Ab 1", "ÄÖ é½"]).tolist() == [0, 0, 1, 0.5, 0.4]


# The baseline


def test_titles_are_told_from_sentences():
    rng = np.random.default_rng(1)
    prompts = [w.title() for w in words(rng, 40)] + words(rng, 60)
    found = text_baseline(prompts, [True] * 40 + [False] * 60, resamples=50)
    assert found.ngrams.auc.value > 0.99
    assert found.ngrams.tpr.value > 0.9
    assert found.capitals.auc.value == 1.0
    assert (found.memorized, found.ordinary, found.reason) == (40, 60, "")
    upside_down = text_baseline(prompts, [False] * 40 + [True] * 60, resamples=10)
    assert upside_down.capitals.auc.value == 0.0  # never flipped


@pytest.mark.parametrize("largest", [1, 30])
def test_the_same_source_gives_nothing(largest):
    """Also where one family holds most memorized prompts, so that folds know very different shares of them."""
    rng = np.random.default_rng(2)
    labels, families = np.arange(110) < 45, np.arange(110)
    families[:largest] = 0
    found = [stats.auc(text_scores(words(rng, 110), labels, families), labels) for _ in range(10)]
    # One list has a standard error of 0.1, ten have 0.03; with the intercept left in, the second case gives 0.3.
    assert np.mean(found) == pytest.approx(0.5, abs=0.11)


def test_folds_never_split_a_family():
    """Families of near-duplicates with labels thrown by a coin: whoever splits them sees a perfect text classifier."""
    rng = np.random.default_rng(3)
    stems = words(rng, 60)
    prompts = [f"{stem} number {i}" for stem in stems for i in range(5)]
    labels = np.repeat(rng.random(60) < 0.5, 5)
    families = near_duplicate_clusters(prompts)
    assert same_partition(families, np.repeat(np.arange(60), 5))
    assert stats.auc(text_scores(prompts, labels, np.arange(300)), labels) > 0.95
    assert stats.auc(text_scores(prompts, labels, families), labels) == pytest.approx(0.5, abs=0.15)
    found = text_baseline(prompts, labels, resamples=30)
    assert found.ngrams.auc.value == pytest.approx(0.5, abs=0.15)
    assert found.memorized_clusters + found.ordinary_clusters == 60


def test_families_are_found_across_the_groups():
    # The same template in both groups: one family, so that no fold learns a label from its twin.
    rng = np.random.default_rng(4)
    prompts = [product(rng, i) for i in range(10)] + words(rng, 20)
    labels = [i % 2 == 0 for i in range(30)]
    found = text_baseline(prompts, labels, resamples=10)
    assert len(set(found.clusters[:10])) == 1
    assert (found.memorized_clusters, found.ordinary_clusters) == (11, 11)


@pytest.mark.parametrize("memorized", [0, 1, 4])
def test_too_few_families_get_a_reason(memorized):
    rng = np.random.default_rng(6)
    prompts = words(rng, memorized + 30)
    found = text_baseline(prompts, [True] * memorized + [False] * 30, resamples=10)
    assert found.ngrams is None
    assert found.scores == ()
    assert f"5 near-duplicate clusters of prompts in each group, and there are {memorized} of memorized" in found.reason
    assert (found.capitals is None) == (memorized < 2)
    assert len(found.clusters) == memorized + 30


def test_many_prompts_of_one_family_are_too_few():
    rng = np.random.default_rng(7)
    prompts = [product(rng, i) for i in range(40)] + words(rng, 40)
    found = text_baseline(prompts, [True] * 40 + [False] * 40, resamples=10)
    assert (found.ngrams, found.capitals) == (None, None)
    assert "there are 1 of memorized and 40 of ordinary prompts" in found.reason


def test_the_least_that_is_enough():
    rng = np.random.default_rng(8)
    found = text_baseline(words(rng, 10), [True] * 5 + [False] * 5, resamples=10)
    assert found.reason == ""
    assert len(found.scores) == 10
    assert "only 5 clusters" in found.ngrams.auc.note or "5 independent cases" in found.ngrams.auc.note


def test_it_repeats_and_is_stored_as_plain_values():
    rng = np.random.default_rng(9)
    prompts, labels = words(rng, 60), np.arange(60) % 3 == 0
    found = text_baseline(prompts, labels, resamples=20, seed=3)
    assert text_baseline(prompts, labels.tolist(), resamples=20, seed=3) == found
    stored = json.loads(found.to_json())
    assert stored["prompts"] == prompts
    assert stored["ngrams"]["auc"]["value"] == stats.auc(stored["scores"], labels)
    assert len(stored["clusters"]) == 60
    assert found.ngrams == stats.separation(found.scores, labels, found.clusters, resamples=20, seed=3)


def test_labels_must_match():
    with pytest.raises(UsageError, match="2 prompts for 3 labels"):
        text_baseline(["a", "b"], [True, False, True])
