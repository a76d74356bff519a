"""The loss of a batch as the sum of the losses of its texts, with the data's labels or labels drawn from the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from keeptune.core.errors import StatisticsError
from keeptune.data.calibration import Batch
from keeptune.model.head import sequence_losses

Labels = Literal["true", "sampled"]


def summed_loss(logits: Tensor, batch: Batch, *, labels: Labels, seed: int) -> Tensor:
    """Sums the cross-entropy over the tokens to be learned, in nats; of a classifier, the loss over the texts.

    Law: the loss of a batch is the sum of the losses of its texts, whatever the padding. Without a loss mask or labels,
    whole texts are learned but for their first token; labels are the data's tokens or drawn ones.

    Args:
        logits: ``(batch, length, vocabulary)``, or a classifier's ``(batch, labels)``.
        batch: Tokens, with a loss mask or with labels or neither.
        labels: ``"true"`` or ``"sampled"``.
        seed: Seed of the drawn labels.

    Raises:
        StatisticsError: The batch has no labels for a classifier.
    """
    if batch.labels is not None and logits.ndim == 2:
        wanted = batch.labels if labels == "true" else drawn_classes(logits, batch, seed)
        return sequence_losses(logits, wanted.to(logits.device)).sum()
    if logits.ndim == 2:
        raise StatisticsError(
            "statistics",
            got="texts without labels for a classifier, whose gradients are requested",
            wanted="labels",
            next_step="Pass task data; of knowledge, take a form without gradients (keep: drift, laplace: delta-act).",
        )
    whole = batch.attention_mask if batch.loss_mask is None else batch.loss_mask
    # The first token of a text is never predicted.
    learned = whole[:, 1:].bool() & batch.attention_mask[:, :-1].bool()
    chosen = logits[:, :-1][learned.to(logits.device)].float()
    wanted = batch.input_ids[:, 1:][learned] if labels == "true" else drawn_labels(chosen, batch, learned, seed)
    return functional.cross_entropy(chosen, wanted.to(logits.device), reduction="sum")


def drawn_labels(logits: Tensor, batch: Batch, learned: Tensor, seed: int) -> Tensor:
    """Draws ``(labels,)`` from logits ``(labels, vocabulary)``; a text has its own stream, whatever batch it is in."""
    streams = zip(_streams(batch, seed), learned, strict=True)
    parts = [torch.rand(int(wanted.sum()), generator=stream) for stream, wanted in streams]
    return _drawn(logits, torch.cat(parts))


def drawn_classes(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """Draws ``(batch,)`` labels or scores from a classifier's logits ``(batch, labels)``; one column is a score.

    The squared error is, but for a constant, the negative log-density of a normal distribution of variance 1/2.
    """
    if logits.shape[-1] == 1:
        noise = torch.cat([torch.randn(1, generator=stream) for stream in _streams(batch, seed)])
        return logits.detach()[:, 0].float() + noise.to(logits.device) / math.sqrt(2)
    return _drawn(logits, torch.cat([torch.rand(1, generator=stream) for stream in _streams(batch, seed)]))


def _streams(batch: Batch, seed: int) -> Iterator[torch.Generator]:
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        text = f"{seed}:{ids[mask.bool()].tolist()}"
        stream = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        yield torch.Generator().manual_seed(stream)


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    edges = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    labels = torch.searchsorted(edges, uniform.to(edges)[:, None]).squeeze(1)
    return labels.clamp_max(logits.shape[-1] - 1)
