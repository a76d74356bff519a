"""The laws of the energy share, against the singular values themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keeptune.linalg.decompositions import top_energy

quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(W: Tensor, k: int) -> float:
    squares = torch.linalg.svdvals(W.double()) ** 2
    return float(squares[:k].sum() / squares.sum())


@quick
@given(m=st.integers(1, 9), n=st.integers(1, 9), k=st.integers(1, 11), seed=seeds)
def test_it_is_the_share_of_the_largest_squared_singular_values(m: int, n: int, k: int, seed: int) -> None:
    W = normal(m, n, seed=seed)
    assert top_energy(W, k) == pytest.approx(by_singular_values(W, k), abs=1e-12)
    assert top_energy(W.T, k) == pytest.approx(top_energy(W, k), abs=1e-12)
    assert 0 < top_energy(W, k) <= 1


def test_known_values() -> None:
    W = torch.zeros(4, 7)
    W[0, 2], W[1, 0], W[3, 6] = 3, -2, 1
    assert [top_energy(W, k) for k in (1, 2, 3, 9)] == pytest.approx([9 / 14, 13 / 14, 1, 1], abs=1e-15)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
def test_the_scale_of_the_weights_does_not_matter(scale: float) -> None:
    W = normal(6, 9)
    assert top_energy(W * scale, 2) == pytest.approx(by_singular_values(W, 2), rel=1e-5)


def test_a_low_rank_matrix_has_all_in_its_rank() -> None:
    W = normal(40, 3) @ normal(3, 30, seed=1)
    assert top_energy(W, 3) == pytest.approx(1, abs=1e-12)
    assert top_energy(W, 2) < 0.99


def test_a_matrix_of_zeros_has_no_energy_to_share() -> None:
    assert math.isnan(top_energy(torch.zeros(3, 4), 1))


def test_fewer_than_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 0"):
        top_energy(torch.eye(2), 0)
