"""The norm of a rescaled change equals that of the dense difference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.rescaled import Rescaled


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 3])
def test_rows_of_new_lengths(rank: int) -> None:
    W, B, A = drawn(0, 7, 5).double(), drawn(1, 7, rank).double(), drawn(2, rank, 5).double()
    lengths = 0.5 + drawn(3, 7).double().abs()
    tuned = W + B @ A
    tuned = tuned * (lengths / tuned.norm(dim=1))[:, None]
    change = Rescaled(W, LowRank(B, A), lengths)
    assert change.norm() == pytest.approx(float((tuned - W).norm()), rel=1e-12)
    torch.testing.assert_close(change.dense(), tuned - W)


def test_lengths_of_the_sum_leave_the_low_rank_change() -> None:
    W, change = drawn(0, 7, 5).double(), LowRank(1e-4 * drawn(1, 7, 2).double(), drawn(2, 2, 5).double())
    lengths = (W + change.dense()).norm(dim=1)
    assert Rescaled(W, change, lengths).norm() == pytest.approx(float(change.dense().norm()), rel=1e-6)
    still = LowRank(torch.zeros(7, 2), drawn(2, 2, 5))
    assert Rescaled(W, still, W.norm(dim=1)).norm() == pytest.approx(0, abs=1e-12)


def test_a_row_of_zeros_is_no_division_by_zero() -> None:
    W = torch.zeros(2, 3)
    assert Rescaled(W, LowRank(torch.zeros(2, 1), torch.zeros(1, 3)), torch.ones(2)).norm() == 0
