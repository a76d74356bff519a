"""Gram matrices: those of the definition, summed without loss."""

from __future__ import annotations

import pytest
import torch
from tests.models import relative
from torch import Tensor

from keeptune.linalg.gram import add_gram, symmetric


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# add_gram


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 260, 264, 300])
def test_add_gram_is_the_gram_matrix(n: int) -> None:
    """Below and above the size from which only the upper blocks are formed, divisible by them or not."""
    X = normal(37, n).float()
    total = torch.zeros(n, n, dtype=torch.float64)
    add_gram(total, X)
    assert relative(symmetric(total), X.double().T @ X.double()) < 1e-6


@pytest.mark.parametrize("n", [12, 270])
def test_add_gram_adds_to_what_is_there(n: int) -> None:
    X, Y = normal(20, n), normal(9, n, seed=1)
    total = torch.zeros(n, n, dtype=torch.float64)
    add_gram(total, X)
    add_gram(total, Y)
    assert relative(symmetric(total), X.T @ X + Y.T @ Y) < 1e-6


def test_a_long_sum_loses_nothing_to_a_large_start() -> None:
    """In float32, 1e8 + 1 is 1e8: the sum is kept in float64."""
    total = torch.full((2, 2), 1e8, dtype=torch.float64)
    for _ in range(3):
        add_gram(total, torch.ones(1, 2))
    assert torch.equal(total, torch.full((2, 2), 1e8 + 3, dtype=torch.float64))


def test_half_precision_rows_are_multiplied_in_float32() -> None:
    X = (normal(50, 6) * 300).to(torch.float16)  # squares overflow float16
    total = torch.zeros(6, 6, dtype=torch.float64)
    add_gram(total, X)
    assert relative(total, X.double().T @ X.double()) < 1e-6


def test_no_rows_add_nothing() -> None:
    total = torch.eye(4, dtype=torch.float64)
    add_gram(total, torch.zeros(0, 4))
    assert torch.equal(total, torch.eye(4, dtype=torch.float64))


def test_symmetric_reads_the_upper_triangle_only() -> None:
    full = normal(5, 5)
    full = full + full.T
    assert torch.equal(symmetric(torch.triu(full) + torch.tril(normal(5, 5, seed=1), -1)), full)
