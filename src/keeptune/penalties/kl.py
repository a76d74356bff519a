"""KL to the base on knowledge data: hold what the model says, not the weights it says it with.

    P = strength mean_i KL(p_base(. | x_<i) || p(. | x_<i))          over the learned tokens i of a batch      (1)

in nats per token, the measure of forgetting itself where penalties on the weights are its second order. The batch is
another one at every optimiser step; it costs a forward and backward pass of ``batch_size`` texts, and a forward pass
of the base where its answer is not kept from an earlier round.

The base is the model as it starts: its factors are put in for the pass, whatever the anchor. (Without its adapter a
model with a residual anchor is not the base.) Padding, prompts, the
first token of a text and dropout do not enter. Which texts come at which step follows from the seed and the number of
the step, which is in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from keeptune.core.errors import PlanError
from keeptune.core.options import Range
from keeptune.data.calibration import Calibration
from keeptune.penalties.base import Penalty
from keeptune.statistics.request import DataRole

_IDS, _LENGTHS, _LEARNED, _STEP = "ids", "lengths", "learned", "step"


@dataclass(frozen=True, slots=True, eq=False)
class TextBatch:
    """Texts that the model is run on in a step.

    Args:
        number: Equal numbers are equal batches, throughout a training.
        input_ids: ``(texts, length)``.
        attention_mask: 1 for a token, 0 for padding.
        learned: True for a token that is predicted, which the first of a text never is.
    """

    number: int
    input_ids: Tensor
    attention_mask: Tensor
    learned: Tensor


def kl_divergence(base: Tensor, now: Tensor) -> Tensor:
    """Computes KL(base || now) of each row, in nats, from log-probabilities ``(rows, classes)``.

    Laws: never negative, to rounding; 0 where both are the same; a constant added to all logits of a row changes
    nothing.
    """
    return (base.exp() * (base - now)).sum(dim=-1)


def text_batch(ids: Tensor, lengths: Tensor, learned: Tensor, *, size: int, seed: int, step: int) -> TextBatch:
    """Returns the texts of a step: all texts in an order drawn once, ``size`` at a time, over and over.

    Laws: equal steps give equal batches; every text comes once in ``ceil(texts / size)`` steps.

    Args:
        ids: Token ids of all texts, ``(texts, length)``, filled up at the right.
        lengths: Tokens of each text.
        learned: Which tokens the model is held on, as ``ids``.
        size: Texts in a batch.
        seed: Seed of the order.
        step: Number of the step, from 0.
    """
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    number = step % -(-len(ids) // size)
    rows = order[number * size : (number + 1) * size].to(ids.device)
    longest = int(lengths[rows].max())
    mask = torch.arange(longest, device=ids.device) < lengths[rows, None]
    held = mask & learned[rows, :longest]
    held[:, 0] = False
    return TextBatch(
        number=number,
        input_ids=ids[rows, :longest].long(),
        attention_mask=mask.long(),
        learned=held,
    )


@dataclass(frozen=True)
class Kl(Penalty):
    """KL to the base on knowledge data, a batch per optimiser step.

    The engine runs the model (training/output_passes.py); the gradient is autograd's.

    Args:
        kept_mib: How much memory the base's answers may take, so that they are computed once; 0 computes them at
            every step.
        strength: What a nat per token weighs against a nat of the task's loss.
        batch_size: Texts per step.
        seed: Seed of their order.
    """

    name = "kl"
    paper = "Li and Hoiem, Learning without Forgetting, 1606.09282 (in spirit)"
    state: ClassVar[tuple[str, ...]] = (_STEP,)
    ranges = {
        "strength": Range(least=0),
        "batch_size": Range(least=1),
        "kept_mib": Range(least=0),
        "seed": Range(least=0),
    }

    kept_mib: int = 256
    strength: float = 1.0
    batch_size: int = 8
    seed: int = 0

    @property
    def data(self) -> frozenset[DataRole]:
        """The knowledge: the tokens themselves, without statistics."""
        return frozenset({"knowledge"})

    def texts(self, data: Mapping[DataRole, Calibration]) -> Mapping[str, Tensor]:
        """Returns the tokens of the knowledge, in their order, saved with the plan.

        Raises:
            PlanError: There is no knowledge, or no text of it has two tokens.
        """
        if "knowledge" not in data:
            raise PlanError(
                "penalty kl",
                got="no knowledge",
                wanted="texts on which the model is held to the base",
                next_step="Add `knowledge`.",
            )
        knowledge = data["knowledge"]
        long = [index for index, ids in enumerate(knowledge.sequences) if len(ids) > 1]
        if not long:
            raise PlanError(
                "penalty kl",
                got="knowledge of single tokens",
                wanted="texts of two tokens or more",
                next_step="Take longer texts.",
            )
        texts = [torch.tensor(knowledge.sequences[index], dtype=torch.int32) for index in long]
        ids = pad_sequence(texts, True, knowledge.pad_id)
        learned = torch.ones_like(ids, dtype=torch.bool)
        if knowledge.learned:
            learned = pad_sequence([torch.tensor(knowledge.learned[index]) for index in long], True, True)
        lengths = torch.tensor(list(map(len, texts)))
        return {_IDS: ids, _LENGTHS: lengths, _LEARNED: learned, _STEP: torch.zeros(1, dtype=torch.float64)}

    def batch(self, tensors: Mapping[str, Tensor]) -> TextBatch:
        """Returns the texts of this step."""
        return text_batch(
            tensors[_IDS],
            tensors[_LENGTHS],
            tensors[_LEARNED],
            size=self.batch_size,
            seed=self.seed,
            step=int(tensors[_STEP]),
        )

    def update(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Goes on to the next batch."""
        tensors[_STEP].add_(1)
        return {}
