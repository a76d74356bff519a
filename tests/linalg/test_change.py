"""The norm of a change equals that of the dense difference, whatever the form it was measured in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.change import change_norm, rescaled_change_norm


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_dense_norm_is_that_of_the_difference() -> None:
    W, D = drawn(0, 7, 5), 1e-3 * drawn(1, 7, 5)
    assert change_norm(W.double(), W.double() + D.double()) == pytest.approx(float(D.double().norm()), rel=1e-9)
    assert change_norm(W, W) == 0


@pytest.mark.parametrize("rank", [1, 3])
def test_rows_of_new_lengths(rank: int) -> None:
    W, B, A = drawn(0, 7, 5).double(), drawn(1, 7, rank).double(), drawn(2, rank, 5).double()
    lengths = 0.5 + drawn(3, 7).double().abs()
    tuned = W + B @ A
    tuned = tuned * (lengths / tuned.norm(dim=1))[:, None]
    found = rescaled_change_norm(W, LowRank(B, A), lengths)
    assert found == pytest.approx(float((tuned - W).norm()), rel=1e-12)


def test_lengths_of_the_sum_leave_the_low_rank_change() -> None:
    W, change = drawn(0, 7, 5).double(), LowRank(1e-4 * drawn(1, 7, 2).double(), drawn(2, 2, 5).double())
    lengths = (W + change.dense()).norm(dim=1)
    assert rescaled_change_norm(W, change, lengths) == pytest.approx(float(change.dense().norm()), rel=1e-6)
    still = LowRank(torch.zeros(7, 2), drawn(2, 2, 5))
    assert rescaled_change_norm(W, still, W.norm(dim=1)) == pytest.approx(0, abs=1e-12)


def test_a_row_of_zeros_is_no_division_by_zero() -> None:
    W = torch.zeros(2, 3)
    assert rescaled_change_norm(W, LowRank(torch.zeros(2, 1), torch.zeros(1, 3)), torch.ones(2)) == 0
