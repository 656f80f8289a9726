"""Tiled ℓ₂ and density against their formulas."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.detect.calibrate import method_of
from mnemoscope.errors import UnknownName, UsageError
from mnemoscope.similarity.density import DensityDetector, density, near_by, tiled_l2
from mnemoscope.similarity.pixels import Pixels


def pictures(n, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_tiled_l2_is_the_largest_tile():
    a, b = pictures(3), pictures(2, seed=1)
    for i, j in itertools.product(range(3), range(2)):
        tiles = (a[i] - b[j]).square().unfold(1, 4, 4).unfold(2, 4, 4).mean((0, 3, 4)).sqrt()
        assert float(tiled_l2(a, b)[i, j]) == pytest.approx(float(tiles.max()), rel=1e-5)


def test_a_change_in_one_tile_is_not_averaged_away():
    a = torch.full((1, 3, 64, 64), 0.5)
    b = a.clone()
    b[..., 48:, 48:] = 1
    assert float(tiled_l2(a, b)) == pytest.approx(0.5)
    assert float(tiled_l2(a, b, tiles=1)) == pytest.approx(0.125)


@pytest.mark.parametrize("size", [(4, 4), (17, 30)])
def test_any_size(size):
    x = pictures(2, 32)[..., : size[0], : size[1]]
    d = tiled_l2(x, x)
    assert d.diag().abs().max() == 0
    assert torch.equal(d, d.T)
    assert 0 < float(d[0, 1]) <= 1


def test_misuse_gets_a_sentence():
    with pytest.raises(UsageError, match="one size"):
        tiled_l2(pictures(1, 16), pictures(1, 8))
    with pytest.raises(UsageError, match="at least 4 px"):
        tiled_l2(pictures(1, 3), pictures(1, 3))
    with pytest.raises(UsageError, match="at least 2 seeds"):
        density(torch.ones(1, 1, dtype=torch.bool))


@given(st.integers(2, 7), st.data())
def test_clique_and_pairs_equal_brute_force(n, data):
    edges = [e for e in itertools.combinations(range(n), 2) if data.draw(st.booleans())]
    near = torch.eye(n, dtype=torch.bool)
    for i, j in edges:
        near[i, j] = near[j, i] = True
    cliques = [
        c for k in range(1, n + 1) for c in itertools.combinations(range(n), k) if all(near[i, j] for i in c for j in c)
    ]
    found = density(near)
    assert found.clique == max(map(len, cliques))
    assert found.pairs == pytest.approx(len(edges) / (n * (n - 1) / 2))


def test_copies_among_generations_are_a_clique():
    x = pictures(6, 32)
    x[:4] = (x[:1] + 0.02 * (pictures(4, 32, seed=3) - 0.5)).clamp(0, 1)
    for near in (tiled_l2(x, x) < 0.1, near_by(x, Pixels(), 0.9)):
        found = density(near)
        assert (found.clique, found.n) == (4, 6)
        assert found.pairs == pytest.approx(6 / 15)


# The detector


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_a_prompt_s_score_is_the_mean_over_pairs():
    x = pictures(5, 32)
    scores = DensityDetector().score(x)
    assert float(scores.mean()) == pytest.approx(float(1 - off_diagonal(tiled_l2(x, x)).mean()), rel=1e-6)
    assert float(scores[2]) == pytest.approx(float(1 - tiled_l2(x[2:3], x)[0, [0, 1, 3, 4]].mean()), rel=1e-6)
    vectors = Pixels()(x)
    scores = DensityDetector("pixels").score(x)
    assert float(scores.mean()) == pytest.approx(float(off_diagonal(vectors @ vectors.T).mean()), rel=1e-5)


@pytest.mark.parametrize(("descriptor", "near"), [("tiled", 0.1), ("pixels", 0.9)])
def test_counted_it_is_the_density_and_the_clique(descriptor, near):
    x = pictures(6, 32)
    x[:4] = (x[:1] + 0.02 * (pictures(4, 32, seed=3) - 0.5)).clamp(0, 1)
    pairs = DensityDetector(descriptor, near=near).score(x)
    assert float(pairs.mean()) == pytest.approx(6 / 15)
    assert pairs.tolist() == pytest.approx([3 / 5] * 4 + [0] * 2)
    clique = DensityDetector(descriptor, near=near, count="clique").score(x)
    assert clique.tolist() == pytest.approx([4 / 6] * 6)


def test_equal_pictures_are_as_dense_as_can_be():
    x = pictures(1, 32).expand(3, -1, -1, -1)
    for options in ({}, {"descriptor": "pixels"}, {"near": 0.1}, {"near": 0.1, "count": "clique"}):
        assert DensityDetector(**options).score(x).tolist() == pytest.approx([1, 1, 1])


def test_what_makes_its_scores_differ_is_plain_and_public():
    made = [
        DensityDetector(),
        DensityDetector(near=0.1),
        DensityDetector(near=0.2),
        DensityDetector(near=0.2, count="clique"),
        DensityDetector("pixels"),
        DensityDetector("pixels", descriptor_options={"side": 8}),
    ]
    methods = [str(method_of(d)) for d in made]
    assert len(set(methods)) == len(methods)
    assert '"side": 8' in method_of(made[-1])["options"]["identity"]


def test_options_that_mean_nothing_get_a_sentence():
    with pytest.raises(UsageError, match="say what near means"):
        DensityDetector(count="clique")
    with pytest.raises(UnknownName, match="Did you mean 'pairs'"):
        DensityDetector(count="pair", near=1)
    with pytest.raises(UnknownName, match=r"no descriptor named 'pixel'. Did you mean 'pixels'"):
        DensityDetector("pixel")
