"""FAPM: which numbers of a change are pruned."""

from __future__ import annotations

import pytest
import torch

from keeptune.experiments.fapm import forgetting, kept

W, CHANGE = (torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_what_is_pruned_is_the_order_of_the_criterion_whatever_signs_and_scales(share: float) -> None:
    """As in the authors' code: the largest scores are kept."""
    stays = kept(W, CHANGE, share)
    scores = CHANGE.abs() - W.abs().mean() * (CHANGE.abs() / W.abs())
    wanted = torch.zeros(600, dtype=torch.bool)
    wanted[scores.flatten().argsort(descending=True)[: round(600 * (1 - share))]] = True
    assert torch.equal(stays.flatten(), wanted)
    assert torch.equal(kept(-4 * W, CHANGE / 8, share), stays)
    assert torch.equal(kept(W.T, CHANGE.T, share).T, stays)
    assert not (kept(W, CHANGE, min(share + 0.1, 1)) & ~stays).any()  # a larger share prunes these and more
    assert torch.equal(kept(torch.ones_like(W), CHANGE, share), stays) == (share in (0, 1))  # not by size alone


def test_zeros_of_the_weight_go_first_and_no_change_has_no_score() -> None:
    scores = forgetting(torch.tensor([0.0, 0.0, 0.1, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert scores.tolist() == [0, -torch.inf, pytest.approx(1 - 0.275 / 0.1), 0]
    assert not forgetting(torch.zeros(2), torch.tensor([0.0, 1.0])).isnan().any()
