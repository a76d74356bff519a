"""Probes of the Fisher at the logits: unbiased, steady, and the same whatever the batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from keeptune.data.calibration import Batch, Calibration
from keeptune.model.head import Labels, Loss, probe, summed_loss

LOGITS = torch.tensor([[0.0, 1.0, -1.0, 2.0, 9.0, -torch.inf], [3.0, 0.0, 0.0, 0.0, -2.0, 1.0]], dtype=torch.float64)


def fisher(logits: Tensor) -> Tensor:
    """``diag(p) - p pᵀ``, ``(rows, V, V)``."""
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def gradient(logits: Tensor, batch: Batch, loss: Loss, draw: int = 0) -> Tensor:
    logits = logits.clone().requires_grad_()
    torch.autograd.backward(summed_loss(logits, batch, loss, draw))
    assert logits.grad is not None
    return logits.grad


def texts(*sequences: tuple[int, ...], labels: tuple[int, ...] | None = None) -> Batch:
    (batch,) = Calibration(sequences, 0, labels=labels).batches()
    return batch


def test_the_mean_over_all_signs_is_the_fisher_of_the_logits() -> None:
    signs = torch.tensor(list(itertools.product([True, False], repeat=LOGITS.shape[1])))
    found, naive = torch.zeros(2, 6, 6, dtype=torch.float64), torch.zeros(2, 6, 6, dtype=torch.float64)
    for row in signs:
        v = probe(LOGITS, row.expand_as(LOGITS))
        assert v.sum(-1).abs().max() < 1e-12  # logits may all be moved alike
        root = LOGITS.softmax(-1).sqrt() * torch.where(row, 1.0, -1.0)
        found += v[:, :, None] * v[:, None, :] / len(signs)
        naive += root[:, :, None] * root[:, None, :] / len(signs)
    torch.testing.assert_close(found, fisher(LOGITS))
    assert (naive - fisher(LOGITS)).abs().max() > 0.1


@pytest.mark.parametrize("labels", ["probe", "sampled"])
def test_the_mean_over_draws_is_the_fisher_of_the_logits(labels: Labels) -> None:
    logits = torch.randn(1, 3, 70, generator=torch.Generator().manual_seed(0)) * 2  # more than the 64 signs of a number
    batch, mean = texts((5, 9, 11)), torch.zeros(2, 70, 70)
    for seed in range(3000):
        g = gradient(logits, batch, Loss(labels, seed))[0]
        assert not g[-1].any()  # the last token predicts none
        mean += g[:-1, :, None] * g[:-1, None, :] / 3000
    assert float((mean - fisher(logits[0, :-1])).norm() / fisher(logits[0, :-1]).norm()) < 0.15


def test_the_probe_of_a_score_has_the_variance_of_its_density_at_once() -> None:
    """(f - y)² is -log of a normal density of variance 1/2, whose Fisher is 2."""
    batch = texts((5, 9), labels=(0,))
    logits = torch.tensor([[3.0]])
    probed = [float(gradient(logits, batch, Loss("probe", seed))) for seed in range(200)]
    drawn = [float(gradient(logits, batch, Loss("sampled", seed))) for seed in range(4000)]
    assert {round(g * g, 5) for g in probed} == {2.0}
    assert abs(sum(probed)) < 60
    assert sum(g * g for g in drawn) / len(drawn) == pytest.approx(2, abs=0.15)


def test_a_classifier_is_probed_as_a_word_is() -> None:
    logits, batch = LOGITS[1:, :3].float(), texts((5, 9), labels=(0,))
    found = [gradient(logits, batch, Loss("probe", seed))[0] for seed in range(2000)]
    mean = torch.stack([g[:, None] * g[None, :] for g in found]).mean(0)
    torch.testing.assert_close(mean, fisher(logits)[0], atol=0.02, rtol=0)


def test_a_text_has_its_own_stream_whatever_the_batch_the_padding_or_the_draws_before() -> None:
    logits = torch.randn(2, 5, 100, generator=torch.Generator().manual_seed(0))
    long, short, loss = (5, 9, 11, 20, 4), (7, 30, 8), Loss("probe", 3, probes=2)
    together = [gradient(logits, texts(long, short), loss, draw) for draw in range(2)]
    for draw in reversed(range(2)):
        alone = gradient(logits[1:, :3], texts(short), loss, draw)[0]
        assert torch.equal(together[draw][1, :3], alone)
        assert torch.equal(together[draw][0], gradient(logits[:1], texts(long), loss, draw)[0])
    assert not torch.equal(*together)
    assert not torch.equal(together[0], gradient(logits, texts(long, short), Loss("probe", 4)))


def test_float32_is_enough_for_a_large_vocabulary() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 256_000, generator=draw)
    logits[0, 7] = 40.0  # certain
    signs = torch.rand(logits.shape, generator=draw) < 0.5
    found, wanted = probe(logits, signs).double(), probe(logits.double(), signs)
    assert (found - wanted).norm(dim=1).max() < 5e-5  # next to a gradient of about 1
    assert found.sum(1).abs().max() < 1e-3
