"""The arithmetic of evidence: hand-made cases, references, properties, and coverage by simulation."""

from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, mannwhitneyu, norm
from sklearn.metrics import roc_auc_score, roc_curve

from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.stats import (
    Interval,
    auc,
    balanced_accuracy,
    benjamini_hochberg,
    borderline,
    clopper_pearson,
    cluster_bootstrap,
    conformal_p,
    least_ordinary,
    realized_fpr,
    roc,
    rounding,
    separation,
    threshold_at_fpr,
    tpr_at_fpr,
    tpr_at_nearest_fpr,
    upper_bound,
)

relaxed = settings(deadline=None, max_examples=60)
few_values = st.integers(-4, 4).map(float)  # so that ties are the rule
any_value = st.floats(-1e6, 1e6) | few_values | st.sampled_from([np.inf, -np.inf])
rates = st.floats(0.02, 0.9) | st.sampled_from([0.01, 0.05, 0.07, 0.29, 1 / 3, 1 / 7, 1 / 49])


@st.composite
def labeled(draw, values=any_value):
    """Scores and labels with both classes."""
    positive = draw(st.lists(values, min_size=1, max_size=15))
    negative = draw(st.lists(values, min_size=1, max_size=15))
    order = draw(st.permutations(range(len(positive) + len(negative))))
    scores, labels = np.array(positive + negative), np.array([True] * len(positive) + [False] * len(negative))
    return scores[order], labels[order]


# ROC


def tied(seed=0, n=400):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    return np.round(rng.normal(size=n) + labels, 1), labels


def test_roc_is_scikit_learns_on_ties():
    scores, labels = tied()
    fpr, tpr, at = roc_curve(labels, scores, drop_intermediate=False)
    ours = roc(scores, labels)
    np.testing.assert_array_equal(ours.fpr, fpr)
    np.testing.assert_array_equal(ours.tpr, tpr)
    np.testing.assert_array_equal(ours.threshold, at)


@relaxed
@given(labeled())
def test_every_roc_point_counts_what_it_says(data):
    scores, labels = data
    curve = roc(scores, labels)
    for fpr, tpr, at in zip(curve.fpr[1:], curve.tpr[1:], curve.threshold[1:], strict=True):
        assert fpr == np.mean(scores[~labels] >= at)
        assert tpr == np.mean(scores[labels] >= at)
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)


def test_auc_is_scikit_learns_and_mann_whitneys():
    scores, labels = tied()
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    u = mannwhitneyu(scores[labels], scores[~labels]).statistic
    assert auc(scores, labels) == pytest.approx(u / labels.sum() / (~labels).sum(), abs=1e-12)


@relaxed
@given(labeled())
def test_auc_counts_pairs_with_ties_half(data):
    scores, labels = data
    a, b = scores[labels][:, None], scores[~labels][None]
    assert auc(scores, labels) == pytest.approx(np.mean((a > b) + (a == b) / 2), abs=1e-12)


@relaxed
@given(labeled(), rates)
def test_monotone_transforms_change_nothing(data, fpr):
    scores, labels = data
    bent = np.arctan(scores / 10)  # strictly increasing and finite at ±∞
    assume(len(np.unique(bent)) == len(np.unique(scores)))
    for statistic in (auc, balanced_accuracy, partial(tpr_at_fpr, fpr=fpr), partial(tpr_at_nearest_fpr, fpr=fpr)):
        assert statistic(bent, labels) == statistic(scores, labels)
    assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels), abs=1e-12)


def five_hundred(*positives):
    """500 ordinary scores 1 … 500, and these memorized ones."""
    return [*range(1, 501), *positives], [False] * 500 + [True] * len(positives)


def test_tpr_allows_four_of_500_and_not_five():
    # 495.5 outscores all but 5 ordinary prompts, which is exactly 1 % and too many; 496.5 all but 4.
    scores, labels = five_hundred(1000, 1000, 496.5, 495.5)
    assert tpr_at_fpr(scores, labels, 0.01) == 0.75
    assert tpr_at_nearest_fpr(scores, labels, 0.01) == 1.0


def test_tpr_moves_ties_together():
    # Calling 496 calls the fifth ordinary prompt as well; calling 497 only the fourth.
    assert tpr_at_fpr(*five_hundred(496, 496, 1000), 0.01) == pytest.approx(1 / 3)
    assert tpr_at_fpr(*five_hundred(497, 497, 1000), 0.01) == 1.0
    assert tpr_at_fpr([1.0] * 6, [True] * 3 + [False] * 3, 0.5) == 0.0  # a constant score finds nothing


def test_nearest_point_may_exceed_the_stated_rate():
    # One of 60 is 1.7 %, nearer to 1 % than none.
    scores, labels = [*range(60), 58.5], [False] * 60 + [True]
    assert tpr_at_nearest_fpr(scores, labels, 0.01) == 1.0
    assert tpr_at_fpr(scores, labels, 0.01) == 0.0


@relaxed
@given(labeled(), rates)
def test_tpr_is_the_best_threshold_that_keeps_the_rate(data, fpr):
    scores, labels = data
    cuts = [*np.unique(scores), None]
    called = [np.zeros(len(scores), bool) if cut is None else scores >= cut for cut in cuts]
    best = max(np.mean(c[labels]) for c in called if np.mean(c[~labels]) < fpr)
    assert tpr_at_fpr(scores, labels, fpr) == best


def test_balanced_accuracy_by_hand():
    # Cut between 2 and 3: one of four memorized missed, no false positive.
    assert balanced_accuracy([1, 2, 0, 3, 4, 5], [0, 0, 1, 1, 1, 1]) == 1 - 0.25 / 2
    assert balanced_accuracy([1, 2, 3, 4], [1, 1, 0, 0]) == 0.5  # never below chance


# Cluster bootstrap


def test_resamples_keep_clusters_whole_and_classes_apart():
    labels = np.array([0] * 6 + [1] * 5, bool)
    clusters = np.array(list("aabbcc" + "acdde"))  # a and c occur in both classes
    seen = []

    def spy(scores, resampled):
        seen.append(np.bincount(scores.astype(int), minlength=11))
        assert np.array_equal(labels[scores.astype(int)], resampled)
        return 0.5

    cluster_bootstrap(spy, np.arange(11.0), labels, clusters, resamples=50)
    whole, *resampled = np.array(seen)
    assert (whole == 1).all()
    units = [[0, 1], [2, 3], [4, 5], [6], [7], [8, 9], [10]]
    for times in resampled:
        assert all(len(set(times[u])) == 1 for u in units)
        drawn = [times[u[0]] for u in units]
        assert (sum(drawn[:3]), sum(drawn[3:])) == (3, 4)
    assert len({tuple(t) for t in resampled}) > 20


@relaxed
@given(labeled(st.floats(-5, 5) | few_values), st.integers(0, 3))
def test_interval_contains_its_value_and_stays_a_share(data, seed):
    scores, labels = data
    assume(min(labels.sum(), (~labels).sum()) >= 2)
    for statistic in (auc, tpr_at_fpr, balanced_accuracy):
        found = cluster_bootstrap(statistic, scores, labels, resamples=20, seed=seed)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.value == statistic(scores, labels)


def test_bootstrap_repeats_and_needs_no_names():
    scores, labels = tied()
    draw = partial(cluster_bootstrap, auc, scores, labels, resamples=40)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() == draw(np.arange(len(scores))) == draw([f"prompt {i:03}" for i in range(len(scores))])


def test_bootstrap_width_is_the_binomial_one():
    # For scores 0 and 1 the AUC is (1 + TPR − FPR)/2, whose standard error is known.
    rng = np.random.default_rng(0)
    labels = np.arange(600) < 300
    scores = (rng.random(600) < np.where(labels, 0.7, 0.4)).astype(float)
    p, q = scores[labels].mean(), scores[~labels].mean()
    error = np.sqrt((p * (1 - p) + q * (1 - q)) / 300) / 2
    found = cluster_bootstrap(auc, scores, labels, resamples=1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_two_scores_are_compared_on_the_same_resamples():
    scores, labels = tied()
    both = np.stack([scores, scores], axis=1)

    def difference(s, y):
        return auc(s[:, 0], y) - auc(s[:, 1], y)

    same = cluster_bootstrap(difference, both, labels, resamples=30, share=False)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_perfect_separation_is_not_certainty():
    # The bootstrap would say [1, 1]. Twelve pairs in the right order allow an AUC down to 0.025^(1/12).
    scores, labels = [*range(20), *range(100, 112)], [0] * 20 + [1] * 12
    found = cluster_bootstrap(auc, scores, labels, resamples=50)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 12))
    assert "12 independent cases" in found.note
    upside_down = cluster_bootstrap(auc, -np.array(scores, float), labels, resamples=50)
    assert (upside_down.low, upside_down.high) == pytest.approx((0, 1 - 0.025 ** (1 / 12)))


def test_few_clusters_are_said_and_one_is_refused():
    scores, labels = [1, 3, 2, 4, 0, 5], [0, 0, 0, 1, 1, 1]
    assert "only 3 clusters" in cluster_bootstrap(auc, scores, labels, resamples=20).note
    with pytest.raises(UsageError, match="1 independent clusters of memorized and 3 of ordinary"):
        cluster_bootstrap(auc, scores, labels, [0, 1, 2, 9, 9, 9])
    assert cluster_bootstrap(auc, *tied(), resamples=20).note == ""


def difference_of_means(scores, labels):
    return float(scores[labels].mean() - scores[~labels].mean())


def test_coverage_of_clustered_means():
    """95 % intervals hold what they promise when prompts come in families; resampling prompts does not."""
    rng, trials = np.random.default_rng(7), 200
    labels, family = np.repeat([False, True], 120), np.repeat(np.arange(60), 4)
    hits = {"families": 0, "prompts": 0}
    for i in range(trials):
        scores = rng.normal(size=60)[family] + 0.5 * rng.normal(size=240) + labels
        for name, clusters in (("families", family), ("prompts", None)):
            found = cluster_bootstrap(difference_of_means, scores, labels, clusters, resamples=150, seed=i, share=False)
            hits[name] += found.low <= 1 <= found.high
    assert 0.89 <= hits["families"] / trials <= 0.99  # 0.95 within about four standard errors, low for 30 families
    assert hits["prompts"] / trials < 0.8


def test_coverage_of_the_auc():
    rng, trials, truth = np.random.default_rng(3), 100, norm.cdf(1 / np.sqrt(2))
    labels = np.repeat([False, True], 40)
    hits = 0
    for i in range(trials):
        found = cluster_bootstrap(auc, rng.normal(size=80) + labels, labels, resamples=100, seed=i)
        hits += found.low <= truth <= found.high
    assert 0.85 <= hits / trials < 1


def test_separation_is_both_numbers_and_stores_plainly():
    scores, labels = tied()
    clusters = np.arange(len(scores)) // 2
    both = separation(scores, labels, clusters, fpr=0.05, resamples=30, seed=4)
    assert both.auc == cluster_bootstrap(auc, scores, labels, clusters, resamples=30, seed=4)
    at_five = partial(tpr_at_fpr, fpr=0.05)
    assert both.tpr == cluster_bootstrap(at_five, scores, labels, clusters, resamples=30, seed=4)
    assert Interval(**asdict(both)["auc"]) == both.auc
    assert str(Interval(0.97912, 0.97, 0.98)) == "0.979 [0.970, 0.980]"


@relaxed
@given(labeled(), rates, st.integers(0, 99))
def test_separation_counts_pairs_and_levels_once_and_gets_the_same(case, fpr, seed):
    scores, labels = case
    assume(min(sum(labels), len(labels) - sum(labels)) >= 2)
    found = separation(scores, labels, fpr=fpr, resamples=8, seed=seed)
    assert found.auc == cluster_bootstrap(auc, scores, labels, resamples=8, seed=seed)
    assert found.tpr == cluster_bootstrap(partial(tpr_at_fpr, fpr=fpr), scores, labels, resamples=8, seed=seed)


# Shares


def test_clopper_pearson_is_the_beta_law():
    found = clopper_pearson(3, 20)
    assert (found.low, found.high) == pytest.approx((beta.ppf(0.025, 3, 18), beta.ppf(0.975, 4, 17)))
    assert (clopper_pearson(0, 20).low, clopper_pearson(20, 20).high) == (0, 1)


def test_upper_bounds_that_policies_rely_on():
    for k, n, bound in ((0, 100, 0.0295), (0, 300, 0.0099), (0, 500, 0.0060), (1, 300, 0.0157)):
        assert upper_bound(k, n).high == pytest.approx(bound, abs=5e-5)
    assert upper_bound(0, 299).high <= 0.01 < upper_bound(0, 298).high
    assert upper_bound(0, 598).high <= 0.005 < upper_bound(0, 597).high
    assert upper_bound(5, 5).high == 1
    assert upper_bound(2, 50).low == 0


@relaxed
@given(st.integers(1, 40), st.floats(0.001, 0.999), st.sampled_from([0.8, 0.95]))
def test_exact_intervals_cover_exactly(n, p, confidence):
    k = np.arange(n + 1)
    chance = binom.pmf(k, n, p)
    two = [clopper_pearson(int(i), n, confidence) for i in k]
    one = [upper_bound(int(i), n, confidence) for i in k]
    assert sum(c for c, i in zip(chance, two, strict=True) if i.low <= p <= i.high) >= confidence - 1e-9
    assert sum(c for c, i in zip(chance, one, strict=True) if p <= i.high) >= confidence - 1e-9


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_shares(k, n):
    with pytest.raises(UsageError, match=f"{k} of {n} is no share"):
        clopper_pearson(k, n)


# p-values


def test_conformal_p_by_hand():
    ordinary = [3.0, 1.0, 2.0, 2.0]
    assert conformal_p([0, 1, 2, 2.5, 3, 4, np.inf, -np.inf], ordinary).tolist() == [
        1, 1, 4 / 5, 2 / 5, 2 / 5, 1 / 5, 1 / 5, 1,
    ]  # fmt: skip
    assert conformal_p([], ordinary).shape == (0,)
    with pytest.raises(UsageError, match="calibrate"):
        conformal_p([1.0], [])


@relaxed
@given(st.lists(any_value, min_size=2, max_size=25), st.floats(0.001, 1))
def test_p_values_are_super_uniform_under_exchangeability(scores, alpha):
    """Whichever of the scores is taken as the new one: at most α of the choices give p ≤ α. Exact, ties included."""
    p = [conformal_p([s], scores[:i] + scores[i + 1 :])[0] for i, s in enumerate(scores)]
    assert np.mean(np.array(p) <= alpha) <= alpha + 1e-12


def step_up(p):
    """Benjamini & Hochberg 1995, word for word: the smallest q at which each hypothesis is rejected."""
    m = len(p)
    return [min(1, min(p[j] * m / sum(q <= p[j] for q in p) for j in range(m) if p[j] >= p[i])) for i in range(m)]


@relaxed
@given(st.lists(st.floats(0, 1) | st.sampled_from([0.01, 0.5]), min_size=1, max_size=12))
def test_benjamini_hochberg(p):
    adjusted = benjamini_hochberg(p)
    np.testing.assert_allclose(adjusted, step_up(p), rtol=1e-9)
    assert (adjusted >= np.array(p) - 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    smaller = [p[0] / 2, *p[1:]]
    assert (benjamini_hochberg(smaller) <= adjusted + 1e-12).all()


def test_benjamini_hochberg_refuses_what_is_no_p_value():
    with pytest.raises(UsageError, match=r"1\.5 is no p-value"):
        benjamini_hochberg([0.1, 1.5])
    assert benjamini_hochberg([]).shape == (0,)


# Thresholds


@relaxed
@given(st.lists(any_value, min_size=1, max_size=60), rates, any_value)
def test_above_threshold_is_p_at_most_the_rate(ordinary, fpr, score):
    assume(len(ordinary) >= least_ordinary(fpr))
    found = threshold_at_fpr(ordinary, fpr)
    for s in (score, *ordinary):
        assert (s > found.value) == (conformal_p([s], ordinary)[0] <= fpr)
    assert np.mean(np.array(ordinary) > found.value) <= fpr  # on the calibration data itself
    assert found.value in ordinary
    assert found.interval.low <= found.value <= found.interval.high
    assert found.realized.low <= found.realized.value <= min(found.realized.high, fpr + 1e-12)


@relaxed
@given(rates)
def test_the_least_number_of_prompts(fpr):
    n = least_ordinary(fpr)
    threshold_at_fpr(range(n), fpr)
    with pytest.raises(UsageError, match=f"{n - 1} ordinary scores cannot state .* at least {n}"):
        threshold_at_fpr(range(n - 1), fpr)


def test_too_few_prompts_names_both_cures():
    assert least_ordinary(0.01) == 99
    with pytest.raises(
        UsageError, match=r"60 ordinary scores .* 0\.01: give at least 99, or state a rate of 0\.017 or"
    ):
        threshold_at_fpr(range(60), 0.01)
    assert threshold_at_fpr(range(60), 0.017).value == 59
    with pytest.raises(UsageError, match=r"0 ordinary scores .* give at least 99\.$"):
        threshold_at_fpr([], 0.01)


def test_a_threshold_may_have_no_upper_bound():
    bare = threshold_at_fpr(range(99), 0.01)
    assert (bare.value, bare.interval.high) == (98, np.inf)
    assert "too few for an upper bound" in bare.interval.note
    rich = threshold_at_fpr(range(2000), 0.01)
    assert rich.value == 1980
    # Ranks l and u with P(l ≤ Binomial(2000, 0.99) < u) ≥ 0.95, about 1980 ± 1.96·√19.8.
    assert (rich.interval.low, rich.interval.high) == pytest.approx((1971, 1988), abs=2)
    assert rich.interval.note == ""


def test_coverage_of_the_thresholds_interval_and_of_the_realized_rate():
    """Uniform scores: the quantile is 1 − fpr, and a threshold t has a true rate of 1 − t. Both laws are exact."""
    rng, trials, fpr = np.random.default_rng(11), 400, 0.05
    quantile = rate = 0
    true_rates = []
    for _ in range(trials):
        found = threshold_at_fpr(rng.random(200), fpr)
        quantile += found.interval.low <= 1 - fpr <= found.interval.high
        rate += found.realized.low <= 1 - found.value <= found.realized.high
        true_rates.append(1 - found.value)
    assert 0.92 <= quantile / trials <= 0.99  # at least 0.95 by theory, a little more because ranks are whole
    assert 0.92 <= rate / trials <= 0.98
    # On average over calibration sets the promise holds: 10/201.
    assert np.mean(true_rates) == pytest.approx(10 / 201, abs=4 * np.std(true_rates) / np.sqrt(trials))
    assert realized_fpr(200, fpr).value == 10 / 201


# Rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_half_of_the_digits(dtype):
    assert rounding(str(dtype)) == pytest.approx(torch.finfo(dtype).eps ** 0.5)


def test_rounding_knows_its_dtypes():
    with pytest.raises(UnknownName, match="Did you mean 'float32'"):
        rounding("float23")


def test_borderline_is_symmetric_about_the_threshold():
    assert borderline(2.0, 2.0, 0.0)
    assert borderline(2.0 * (1 + 1e-4), 2.0, 2e-4)
    assert borderline(2.0 * (1 - 1e-4), 2.0, 2e-4)
    assert not borderline(2.0 * (1 + 3e-4), 2.0, 2e-4)
    assert not borderline(np.inf, 2.0, 0.1)


# Guards


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: auc([1, np.nan, 2, np.nan], [0, 1, 1, 0]), "score 1 of 4 is NaN (2 in all)"),
        (lambda: cluster_bootstrap(auc, np.array([[1, 2], [np.nan, 1]]), [0, 1]), "score 1 of 2 is NaN"),
        (lambda: conformal_p([np.nan], [1.0]), "score 0 of 1 is NaN"),
        (lambda: conformal_p([1.0], [np.nan]), "ordinary score 0 of 1 is NaN"),
        (lambda: threshold_at_fpr([1.0, np.nan], 0.5), "ordinary score 1 of 2 is NaN"),
        (lambda: benjamini_hochberg([np.nan]), "p-value 0 of 1 is NaN"),
        (lambda: borderline(np.nan, 1.0, 0.1), "score 0 of 1 is NaN"),
        (lambda: auc([1, 2], [0, 1, 1]), "2 scores for 3 labels"),
        (lambda: auc(np.ones((2, 2)), [0, 1]), "shape (2, 2)"),
        (lambda: auc([1, 2], [1, 1]), "2 memorized and 0 ordinary"),
        (lambda: auc([], []), "0 memorized and 0 ordinary"),
        (lambda: auc([1, 2], [1, 2]), "labels must be True (memorized) or False (ordinary), not"),
        (lambda: cluster_bootstrap(auc, [1, 2], [0, 1], [1, 2, 3]), "2 labels for 3 clusters"),
        (lambda: cluster_bootstrap(auc, *tied(), resamples=0), "resamples = 0"),
        (lambda: cluster_bootstrap(auc, *tied(), confidence=95.0), "confidence = 95 is not a rate"),
        (lambda: tpr_at_fpr(*tied(), 1.0), "fpr = 1 is not a rate"),
        (lambda: tpr_at_nearest_fpr(*tied(), 0.0), "fpr = 0 is not a rate"),
        (lambda: threshold_at_fpr([1.0] * 200, 5.0), "fpr = 5 is not a rate"),
    ],
)
def test_what_users_can_do_wrong_gets_a_sentence(call, sentence):
    with pytest.raises(UsageError) as caught:
        call()
    assert sentence in str(caught.value)
