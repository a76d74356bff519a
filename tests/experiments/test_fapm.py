"""FAPM: which numbers of a change are pruned."""

from __future__ import annotations

import pytest
import torch
from tests.reference.fapm_reference import kept
from torch import Tensor

from keeptune.experiments.fapm import forgetting, pruned

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """W and a change of it, with zeros in each and in both."""
    generator = torch.Generator().manual_seed(0)
    W, change = torch.randn(20, 30, generator=generator), 0.01 * torch.randn(20, 30, generator=generator)
    W[0, :5], change[0, 3:8] = 0, 0
    return W, change


@pytest.mark.parametrize("share", SHARES)
def test_what_is_pruned_is_the_order_of_the_criterion(pair: tuple[Tensor, Tensor], share: float) -> None:
    W, change = pair
    found, scores = pruned(W, change, share), forgetting(W, change)
    gone = (found == 0) & (change != 0)
    assert torch.equal(found[~gone], change[~gone])
    assert abs(int(gone.sum()) - round(share * change.numel())) <= int((change == 0).sum())
    if gone.any() and not gone.all():
        assert scores[gone].max() <= scores[~gone & (change != 0)].min() if share < 1 else True
    assert not scores.isnan().any()


def test_nothing_is_pruned_at_0_everything_at_1_and_more_at_a_larger_share(pair: tuple[Tensor, Tensor]) -> None:
    W, change = pair
    assert torch.equal(pruned(W, change, 0), change)
    assert not pruned(W, change, 1).any()
    left = [pruned(W, change, share) != 0 for share in SHARES]
    assert all(bool((few <= many).all()) for many, few in zip(left, left[1:], strict=False))
    assert not torch.equal(pruned(W, change, 0.5), pruned(torch.ones_like(W), change, 0.5))  # by size alone


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_neither_scales_nor_signs_move_it(pair: tuple[Tensor, Tensor], share: float) -> None:
    W, change = pair
    wanted = pruned(W, change, share) != 0
    assert torch.equal(pruned(4 * W, change, share) != 0, wanted)
    assert torch.equal(pruned(W, -change / 8, share) != 0, wanted)
    assert torch.equal(pruned(W.abs(), change, share) != 0, wanted)
    assert torch.equal(pruned(W.T, change.T, share).T != 0, wanted)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_it_is_the_authors(share: float) -> None:
    W, change = (torch.randn(50, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (1, 2))
    assert pruned(W, change, share).tolist() == kept(W.tolist(), change.tolist(), round(50 * (1 - share)))
