"""Both ends of a model: a classifier's head, the tokens that the embedding knows, and the loss of a batch's texts.

What is differentiated is the sum of the losses of texts, or a probe of the Fisher:

    L_t = -log p_t[y_t]                       y_t the data's token ("true"), or drawn from p_t ("sampled")      (1)
    L_t = logits_t . v_t                      "probe", a linear loss whose gradient at the logits is v_t        (2)
    v = sqrt(p) ∘ z - p (sqrt(p) . z)         z = ±1, independent for each token and each word                  (3)
    E[v] = 0,  E[v vᵀ] = diag(p) - p pᵀ       as of the gradients p - onehot(y) of (1), y drawn from p          (4)

By (4) the probe is as unbiased for the Fisher as drawn labels are, at the same cost. Its v is never as long as that of
an unlikely label nor as short as that of a certain one, so that its error is smaller (docs/how-it-works.md).
A score is a normal distribution of variance 1/2 under the squared error: v = ±sqrt(2).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key, model_fingerprint, tensor_fingerprint
from keeptune.core.errors import DataError, StatisticsError
from keeptune.data.calibration import Batch
from keeptune.model.blocks import head_of


@dataclass(frozen=True, slots=True)
class Head:
    """A classification head that a base model may lack.

    Args:
        labels: The classes, in the order of its outputs; empty for one that computes a score.
        seed: A base without a head gets a random one; the same seed gives the same.
    """

    labels: tuple[str, ...]
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Fields of a Transformers config."""
        if not self.labels:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self | None:
        """Returns the head of a model, or None for a language model."""
        if not head_of(model):
            return None
        names = model.config.id2label
        return cls(tuple(names[index] for index in sorted(names)) if len(names) > 1 else ())


def body_fingerprint(model: PreTrainedModel) -> str:
    """Returns the fingerprint of a base model without a classifier's head, which belongs to the adapter."""
    return model_fingerprint(model, without=head_of(model))


def head_fingerprint(model: PreTrainedModel) -> str:
    """Returns the fingerprint of a classifier's head: gradients depend on it."""
    heads = {name: model.get_submodule(name).state_dict() for name in head_of(model)}
    return content_key({name: {k: tensor_fingerprint(v) for k, v in state.items()} for name, state in heads.items()})


def refuse_unknown_tokens(model: Any, sequences: Iterable[Sequence[int]], where: str) -> None:
    """Refuses tokens that a model's embedding has no rows for, such as those added to a tokenizer alone.

    Raises:
        DataError: There is one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    if 0 < rows <= largest:  # none here, where DeepSpeed has them
        raise DataError(
            where,
            got=f"the token {largest}",
            wanted=f"ids below {rows}, the rows of the model's embedding",
            next_step="Resize the base to its tokenizer: model.resize_token_embeddings(len(tokenizer)), and save both; "
            "train the new rows by trainable_token_indices.",
        )


def sequence_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Computes each example's loss: cross-entropy, or the squared error of a score.

    Law: summed over examples, it does not depend on how they are batched.

    Args:
        logits: ``(batch, labels)``; one column is a score.
        labels: ``(batch,)``, indices of labels, or the right scores.
        smoothing: Share of the target that is spread over all labels.

    Returns:
        ``(batch,)``, float32.
    """
    if logits.shape[-1] == 1:
        return (logits[:, 0].float() - labels.float()) ** 2
    return functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)


Labels = Literal["true", "sampled", "probe"]
_ROWS = 256  # of logits at a time


@dataclass(frozen=True, slots=True)
class Loss:
    """What is differentiated (:func:`summed_loss`).

    Args:
        labels: ``"true"`` takes the data's tokens (the empirical Fisher), ``"sampled"`` draws them from the model (the
            Fisher), ``"probe"`` takes (2) (the Fisher, with less noise).
        seed: Seed of draws; each text has a stream of its own, whatever batch it is in.
        probes: How many draws, each a backward pass, on one forward pass; statistics are their mean.
    """

    labels: Labels
    seed: int = 0
    probes: int = 1


def summed_loss(logits: Tensor, batch: Batch, loss: Loss, draw: int = 0) -> Tensor:
    """Sums (1) or (2) over the tokens to be learned, in nats; of a classifier, over the texts.

    Law: the loss of a batch is the sum of the losses of its texts, whatever the padding. Without a loss mask or labels,
    whole texts are learned but for their first token.

    Args:
        logits: ``(batch, length, vocabulary)``, or a classifier's ``(batch, labels)``.
        batch: Tokens, with a loss mask or with labels or neither.
        loss: What is summed.
        draw: Which of its draws, from 0.

    Raises:
        StatisticsError: The batch has no labels for a classifier.
    """
    if logits.ndim == 2 and batch.labels is None:
        raise StatisticsError(
            "statistics",
            got="texts without labels for a classifier, whose gradients are requested",
            wanted="labels",
            next_step="Pass task data; of knowledge, take a form without gradients (laplace: delta-act).",
        )
    streams = _streams(batch, loss.seed, draw)
    if batch.labels is not None and logits.ndim == 2:
        if loss.labels == "probe":
            return _probed(logits.float(), ((stream, 1) for stream in streams))
        wanted = batch.labels
        if loss.labels == "sampled":
            wanted = drawn_labels(
                logits, batch, torch.ones_like(batch.labels, dtype=torch.long)[:, None], loss.seed, draw
            )
        return sequence_losses(logits, wanted.to(logits.device)).sum()
    whole = batch.attention_mask if batch.loss_mask is None else batch.loss_mask
    # The first token of a text is never predicted.
    learned = whole[:, 1:].bool() & batch.attention_mask[:, :-1].bool()
    chosen = logits[:, :-1][learned.to(logits.device)].float()
    if loss.labels == "probe":
        return _probed(chosen, zip(streams, learned.sum(1).tolist(), strict=True))
    wanted = batch.input_ids[:, 1:][learned]
    if loss.labels == "sampled":
        wanted = drawn_labels(chosen, batch, learned, loss.seed, draw)
    return functional.cross_entropy(chosen, wanted.to(logits.device), reduction="sum")


def probe(logits: Tensor, signs: Tensor) -> Tensor:
    """Computes v (3) of each row, ``(rows, vocabulary)``; of one column, a score's ±sqrt(2).

    Law: the mean of ``v vᵀ`` over all signs is ``diag(p) - p pᵀ``.

    Args:
        logits: ``(rows, vocabulary)``, float32 or float64.
        signs: z, of the same shape, true for 1 and false for -1.
    """
    if logits.shape[-1] == 1:
        return torch.where(signs, 1.0, -1.0).to(logits) * math.sqrt(2)
    p = logits.softmax(dim=-1)
    root = p.sqrt()
    v = torch.where(signs, root, root.neg())
    return v.addcmul_(p, v.sum(dim=-1, keepdim=True), value=-1)


def _probed(logits: Tensor, streams: Iterable[tuple[torch.Generator, int]]) -> Tensor:
    """Returns (2) summed over rows ``(rows, vocabulary)``; each stream draws the signs of its number of rows."""
    # 64 signs a number, drawn on the CPU so that devices agree.
    words, v = -(-logits.shape[-1] // 64), torch.empty_like(logits, requires_grad=False)
    drawn = [torch.empty(rows, words, dtype=torch.int64).random_(-(2**63), None, generator=g) for g, rows in streams]
    packed = torch.cat(drawn).view(torch.uint8).to(logits.device)
    places = torch.arange(8, dtype=torch.uint8, device=logits.device)
    with torch.no_grad():
        for part, bits, own in zip(*(torch.split(rows, _ROWS) for rows in (v, packed, logits)), strict=True):
            signs = (bits[..., None] >> places & 1).bool().flatten(1)
            part.copy_(probe(own, signs[:, : logits.shape[-1]]))
    return (logits * v).sum()


def drawn_labels(logits: Tensor, batch: Batch, learned: Tensor, seed: int, draw: int = 0) -> Tensor:
    """Draws ``(labels,)`` from logits ``(labels, classes)``; a text has its own stream, whatever batch it is in.

    Of one column, a score, it is the score with noise: the squared error is, but for a constant, the negative
    log-density of a normal distribution of variance 1/2.
    """
    counts = learned.sum(1).tolist()
    streams = zip(counts, _streams(batch, seed, draw), strict=True)
    if logits.shape[-1] == 1:
        noise = torch.cat([torch.randn(count, generator=stream) for count, stream in streams])
        return logits.detach()[:, 0].float() + noise.to(logits.device) / math.sqrt(2)
    uniform = torch.cat([torch.rand(count, generator=stream) for count, stream in streams])
    edges = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    labels = torch.searchsorted(edges, uniform.to(edges)[:, None]).squeeze(1)
    return labels.clamp_max(logits.shape[-1] - 1)


def _streams(batch: Batch, seed: int, draw: int) -> Iterator[torch.Generator]:
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        text = f"{seed}{f'.{draw}' if draw else ''}:{ids[mask.bool()].tolist()}"
        stream = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        yield torch.Generator().manual_seed(stream)
