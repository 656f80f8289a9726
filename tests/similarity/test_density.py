"""Tiled ℓ₂ and density against their formulas."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemoscope.errors import UsageError
from mnemoscope.similarity.density import density, near_by, tiled_l2
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
