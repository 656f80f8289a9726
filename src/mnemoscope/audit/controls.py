"""Can the prompts' wording alone tell the groups apart? The control that belongs beside every AUC.

Published sets of memorized prompts are web-shop titles and the ordinary ones are sentences, so a detector may look
perfect without having looked at the model. Here is what a reader must see next to it: the AUC of a classifier that knows
only the text, on folds that never split a family of near-duplicate prompts, and that of a score which is not even
trained, the share of capitals and digits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from ..errors import UsageError
from ..records import wording
from ..stats import Separation, separation

__all__ = ["TextBaseline", "capitals_and_digits", "near_duplicate_clusters", "text_baseline", "text_scores"]

NEAR = 0.55
"""Cosine distance of character 3–5-grams below which prompts are near-duplicates: two products of one brand, say."""

FOLDS = 5

BLOCK = 512
"""Rows whose similarity to all prompts is in memory at once."""

LARGEST = 10_000
"""Family size up to which average linkage is computed; its distances then take about 1 GB."""


@dataclass(frozen=True)
class TextBaseline:
    """What wording alone achieves; ``controls.json`` of a run holds :meth:`to_json`.

    Attributes:
        prompts: The prompts, in the order of ``scores`` and ``clusters``.
        memorized: Number of prompts labeled so.
        ordinary: Number of the others.
        memorized_clusters: Near-duplicate clusters among them, the number of independent cases.
        ordinary_clusters: The same for the others.
        ngrams: Out-of-fold character n-gram classifier; None where there are too few clusters.
        capitals: Share of capitals and digits, untrained and never flipped; None where there are too few clusters.
        reason: Why something is None, in a sentence; else empty.
        scores: Out-of-fold score of each prompt (to ask what a detector adds to it); empty without ``ngrams``.
        clusters: Near-duplicate cluster of each prompt, for the intervals of the detectors.
    """

    prompts: tuple[str, ...]
    memorized: int
    ordinary: int
    memorized_clusters: int
    ordinary_clusters: int
    ngrams: Separation | None
    capitals: Separation | None
    reason: str
    scores: tuple[float, ...]
    clusters: tuple[int, ...]

    def to_json(self) -> str:
        """Plain values, for readers without this class."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


def text_baseline(
    prompts: Sequence[str],
    labels: Sequence[bool] | np.ndarray,
    *,
    clusters: Sequence[int] | np.ndarray | None = None,
    fpr: float = 0.01,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> TextBaseline:
    """Tell memorized from ordinary prompts by their text, without any image model.

    Args:
        prompts: The prompts whose label is known.
        labels: True for memorized, one per prompt.
        clusters: Near-duplicate clusters; default is :func:`near_duplicate_clusters` of all prompts together.
        fpr: Rate that the TPR stays strictly below.
        resamples: Of the cluster bootstrap.
        confidence: Of its intervals.
        seed: Of folds and resamples. Equal arguments give equal results.

    Raises:
        UsageError: prompts and labels differ in number. Too few prompts are no error: see ``reason``.
    """
    labels = np.asarray(labels, dtype=bool)
    if labels.shape != (len(prompts),):
        raise UsageError(f"{len(prompts)} prompts for {labels.size} labels; give one label per prompt.")
    clusters = near_duplicate_clusters(prompts) if clusters is None else np.asarray(clusters)
    groups = [len(np.unique(clusters[labels])), len(np.unique(clusters[~labels]))]
    scores = text_scores(prompts, labels, clusters, seed=seed) if min(groups) >= FOLDS else np.empty(0)

    def judged(score: np.ndarray) -> Separation:
        return separation(score, labels, clusters, fpr=fpr, resamples=resamples, confidence=confidence, seed=seed)

    return TextBaseline(
        prompts=tuple(prompts),
        memorized=int(labels.sum()),
        ordinary=int((~labels).sum()),
        memorized_clusters=groups[0],
        ordinary_clusters=groups[1],
        ngrams=judged(scores) if len(scores) else None,
        capitals=judged(capitals_and_digits(prompts)) if min(groups) >= 2 else None,
        reason="" if len(scores) else _too_few(*groups),
        scores=tuple(scores.tolist()),
        clusters=tuple(clusters.tolist()),
    )


def _too_few(memorized: int, ordinary: int) -> str:
    return (
        f"The text-only baseline needs {FOLDS} near-duplicate clusters of prompts in each group, and there are "
        f"{memorized} of memorized and {ordinary} of ordinary prompts; add prompts that are worded differently."
    )


def text_scores(
    prompts: Sequence[str], labels: np.ndarray, clusters: np.ndarray, *, seed: int = 0
) -> Float[np.ndarray, " prompt"]:
    """Out-of-fold log-odds of *memorized* from the text: logistic regression on TF-IDF of character 1–5-grams.

    Case is kept, because capitals tell a title from a sentence. Each prompt is judged by a model that has seen neither
    it nor any of its near-duplicates. The model's intercept is taken off: it follows the share of memorized prompts among
    those the model was trained on, which is low just where a large memorized family is held out, and pooled over folds
    that alone can drive the AUC of prompts without any signal to 0.3. Without it, 0 means the same in all folds: the
    intercept is not penalized, hence residuals sum to zero, hence a text that is equally like every other has w·x = 0.
    """
    texts, scores = np.array(prompts, dtype=object), np.empty(len(prompts))
    for train, test in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(texts, labels, clusters):
        grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), lowercase=False, sublinear_tf=True)
        model = LogisticRegression(C=10, max_iter=1000).fit(grams.fit_transform(texts[train]), labels[train])
        scores[test] = model.decision_function(grams.transform(texts[test])) - model.intercept_
    return scores


def capitals_and_digits(prompts: Sequence[str]) -> Float[np.ndarray, " prompt"]:
    """The share of a prompt's characters that are capitals or digits; 0 for an empty prompt."""
    return np.array(wording.capitals_and_digits(prompts), dtype=float)


def near_duplicate_clusters(prompts: Sequence[str], *, distance: float = NEAR) -> Int[np.ndarray, " prompt"]:
    """Families of near-duplicate prompts: average linkage of their character 3–5-grams, cut at a cosine ``distance``.

    Prompts that differ in white space only count as one text. Average linkage never joins across the connected
    components of the graph of near pairs, since an average cannot lie below its smallest term; so it runs in each of
    them alone, and memory stays bounded: a block of rows, plus the distances within one component. A component of more
    than ``LARGEST`` texts stays one family, which makes folds and intervals cautious rather than bold.

    Returns:
        The number of each prompt's family, counted from 0 in the order of first appearance.
    """
    texts = [" ".join(p.split()) for p in prompts]
    order = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    grams = _grams(list(order))
    component = _components(grams, distance)
    family = np.zeros(len(order), dtype=int)
    total = 0
    for members in _groups(component):
        family[members] = total + _average_linkage(grams[members], distance)
        total = family[members].max() + 1
    return _by_first_appearance(family[[order[t] for t in texts]])


def _grams(texts: list[str]) -> csr_array:
    """TF-IDF rows of unit length; a text without characters has an empty row, near to nothing."""
    if not any(texts):
        return csr_array((len(texts), 1))
    return csr_array(TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(texts))


def _components(grams: csr_array, distance: float) -> Int[np.ndarray, " text"]:
    """Connected components of the graph whose edges are pairs nearer than ``distance``."""
    n = grams.shape[0]
    nodes = component = np.arange(n)
    for start in range(0, n, BLOCK):
        similar = coo_array(grams[start : start + BLOCK] @ grams.T)
        near = similar.data >= 1 - distance - 1e-9  # an edge too many does no harm: linkage decides
        # What is known so far is kept as one edge from each text to the first of its component.
        rows = np.concatenate([similar.row[near] + start, nodes])
        columns = np.concatenate([similar.col[near], component])
        label = connected_components(coo_array((np.ones(len(rows), bool), (rows, columns)), (n, n)), directed=False)[1]
        component = np.unique(label, return_index=True)[1][label]
    return component


def _average_linkage(grams: csr_array, distance: float) -> Int[np.ndarray, " text"]:
    """Clusters of one component, from 0."""
    n = grams.shape[0]
    if n == 1 or n > LARGEST:
        return np.zeros(n, dtype=int)
    condensed = np.empty(n * (n - 1) // 2)
    filled = 0
    for start in range(0, n, BLOCK):
        for i, row in enumerate((grams[start : start + BLOCK] @ grams.T).toarray(), start):
            condensed[filled : filled + n - 1 - i] = 1 - row[i + 1 :]
            filled += n - 1 - i
    np.maximum(condensed, 0, out=condensed)  # equal texts: rounding must not go below zero
    return fcluster(linkage(condensed, "average"), distance, "distance") - 1


def _groups(component: np.ndarray) -> list[np.ndarray]:
    """The members of each component."""
    by_component = np.argsort(component, kind="stable")
    return np.split(by_component, np.flatnonzero(np.diff(component[by_component])) + 1) if len(component) else []


def _by_first_appearance(family: np.ndarray) -> Int[np.ndarray, " prompt"]:
    _, first, label = np.unique(family, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[label]
