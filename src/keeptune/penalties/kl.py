"""KL to the base on knowledge data: hold what the model says, not the weights it says it with.

    D = mean_i KL(p_base(. | x_<i) || p(. | x_<i))           over the learned tokens i of a batch of texts       (1)
    P = k strength D                                         at every k-th optimiser step                        (2)
    P = g p D / budget, g from 1 to k                        p, and a limit on ∇P: penalties/budget.py           (3)

D is in nats per token, the measure of forgetting itself where penalties on the weights are its second order. A batch
costs a forward and backward pass of ``batch_size`` texts, and a forward pass of the base; taken at every k-th step, it
counts k times. A quarter of the texts, 64 at most, is never trained on. With a budget there is no strength to choose:
the controller meets it in what is measured, D on the batch times the ratio of what held-out texts lose to what those of
training do. The verdict at the end is the KL on all that are held out.

Most can be lost in the first steps. A budget with k above 1 has its first batch at the second step, before which D is
0; then each waits one step more than the last, up to k. While it is overdrawn a batch comes at every step: where
gradients are clipped, as by default, one at every k-th step has a k-th of the say at most, however high p is, and the
budget would stay overdrawn.

What is chosen adds a quarter to a step, by tokens: a backward pass counts as two, so that a text of knowledge takes 4.5
passes (with a check of held-out ones) and one of the task 3. Batches have 128 to 512 tokens; where the least are too
many, they come at every k-th step, 8 at most.

The base is the model as it starts: its factors are put in for the pass, whatever the anchor. (Without its adapter a
model with a residual anchor is not the base.) Padding, prompts, the
first token of a text and dropout do not enter. Which texts come at which step follows from the seed and the number of
the step, which is in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from keeptune.core.errors import PlanError
from keeptune.core.options import Range
from keeptune.data.calibration import Calibration
from keeptune.penalties.base import Penalty
from keeptune.penalties.budget import GAIN, ascended, excess, verdict
from keeptune.statistics.request import DataRole

_IDS, _LENGTHS, _LEARNED = "ids", "lengths", "learned"
_BATCH, _GAP, _WAIT = "batch", "steps it stands for", "steps until it"
_MULTIPLIER, _PRESSURE = "log multiplier", "log pressure"
_SIZE, _EVERY, _LAST, _HELD, _TRAINED = "size", "every", "last", "mean held out", "mean trained on"
_QUICK, _SLOW = 0.5, 0.2  # how much the last batch counts in means of D
_LEAST, _MOST = 128, 512  # tokens of a batch whose size is chosen
_COST, _SHARE, _RAREST = 4.5 / 3, 0.25, 8
_FEWEST, _HELD_OUT, _MOST_HELD_OUT = 8, 4, 64  # of so many texts on, one of so many, up to so many


class TextBatch(NamedTuple):
    """Texts, ``(texts, length)``; a token that is predicted is learned, which the first of a text never is."""

    input_ids: Tensor
    attention_mask: Tensor
    learned: Tensor


def kl_divergence(base: Tensor, now: Tensor) -> Tensor:
    """Computes KL(base || now) of each row, in nats, from log-probabilities ``(rows, classes)``.

    Laws: never negative, to rounding; 0 where both are the same; a constant added to all logits of a row changes
    nothing.
    """
    return (base.exp() * (base - now)).sum(dim=-1)


def kl_and_slope(base: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the KL of each row and its derivative by the logits, ``p - p_base``, without autograd.

    Law: they are autograd's.

    Args:
        base: Log-probabilities of the base, ``(rows, classes)``.
        logits: Of the model now, ``(rows, classes)``, of any floating dtype.
    """
    now = logits.float().log_softmax(dim=-1)
    return kl_divergence(base, now), now.exp_().sub_(base.exp())


def held_out(texts: int, seed: int) -> list[int]:
    """Returns which texts are only measured: a quarter, 64 at most, drawn once; none of fewer than eight.

    Drawn, since texts may come in turns: those that a chat model writes are plain ones and conversations. A few texts
    lose many times what most do: of a tuned SmolLM2's own, the mean of 16 is within a fifth of that of all for 79 draws
    of 100, that of 64 for 98.
    """
    return _divided(texts, seed)[0]


def trained_on(texts: int, *, size: int, seed: int, number: int) -> list[int]:
    """Returns the texts of a batch: all that are not held out, in an order drawn once, ``size`` at a time.

    Laws: equal numbers give equal batches; every such text comes once in a round of batches.
    """
    left = _divided(texts, seed)[1]
    first = number % -(-len(left) // size) * size
    return left[first : first + size]


def _divided(texts: int, seed: int) -> tuple[list[int], list[int]]:
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(seed)).tolist()
    kept = min(texts // _HELD_OUT, _MOST_HELD_OUT) if texts >= _FEWEST else 0
    return order[:kept], order[kept:]


@dataclass(frozen=True)
class Kl(Penalty):
    """KL to the base on knowledge data, with a strength or a budget.

    The engine runs the model (training/output_passes.py).

    Args:
        strength: What a nat per token weighs against a nat of the task's loss.
        budget: In its place, the nats per token that may be lost on the knowledge.
        every: At which optimiser steps: 4 is every fourth, weighed fourfold; with a budget it comes to that step by
            step, and to each step again while that is overdrawn; None chooses it at the first step.
        batch_size: Texts of such a step; None chooses: as many as add a quarter to a step, of 128 to 512 tokens.
        seed: Seed of their order, and of which are held out.
    """

    name = "kl"
    paper = "Li and Hoiem, Learning without Forgetting, 1606.09282 (in spirit)"
    state: ClassVar[tuple[str, ...]] = (
        _BATCH,
        _GAP,
        _WAIT,
        _SIZE,
        _EVERY,
        _MULTIPLIER,
        _PRESSURE,
        _LAST,
        _HELD,
        _TRAINED,
    )
    once = True
    ranges = {
        "strength": Range(least=0),
        "budget": Range(above=0),
        "every": Range(least=1),
        "batch_size": Range(least=1),
        "seed": Range(least=0),
    }

    strength: float = 1.0
    budget: float | None = None
    every: int | None = 1
    batch_size: int | None = 8
    seed: int = 0

    @property
    def data(self) -> frozenset[DataRole]:
        """The knowledge: the tokens themselves, without statistics."""
        return frozenset({"knowledge"})

    def texts(self, data: Mapping[DataRole, Calibration]) -> Mapping[str, Tensor]:
        """Returns the tokens of the knowledge, in their order, saved with the plan, and the controller's state.

        Raises:
            PlanError: There is no knowledge, or no text of it has two tokens.
        """
        knowledge = data.get("knowledge")
        long = [] if knowledge is None else [i for i, ids in enumerate(knowledge.sequences) if len(ids) > 1]
        if knowledge is None or not long:
            raise PlanError(
                "penalty kl",
                got="no knowledge" if knowledge is None else "knowledge of single tokens",
                wanted="texts of two tokens or more, on which the model is held to the base",
                next_step="Add `knowledge`.",
            )
        texts = [torch.tensor(knowledge.sequences[index], dtype=torch.int32) for index in long]
        ids = pad_sequence(texts, True, knowledge.pad_id)
        learned = torch.ones_like(ids, dtype=torch.bool)
        if knowledge.learned:
            learned = pad_sequence([torch.tensor(knowledge.learned[index]) for index in long], True, True)
        state = dict.fromkeys(self.state, 0.0) | {_LAST: self.budget or 0.0}
        state |= {_SIZE: float(self.batch_size or 0), **self._paced(self.every or 0)}
        held = {name: torch.tensor([value], dtype=torch.float64) for name, value in state.items()}
        return {_IDS: ids, _LENGTHS: torch.tensor(list(map(len, texts))), _LEARNED: learned, **held}

    def weight(self, tensors: Mapping[str, Tensor]) -> float:
        """Returns what D counts in this step, of (2) or (3); 0 at a step that has none."""
        if int(tensors[_WAIT]):
            return 0.0
        strength = self.strength if self.budget is None else float(tensors[_PRESSURE].exp()) / self.budget
        return int(tensors[_GAP]) * strength

    def chosen(self, mean: float, tokens: float) -> tuple[int, int]:
        """Returns the texts of a batch, and k.

        Args:
            mean: Mean length of the texts, in tokens.
            tokens: Tokens of the task in a step; 0 where that is not known, and every step is taken.
        """
        room = _SHARE / _COST * tokens * (self.every or 1)
        size = self.batch_size or max(round(max(min(room, _MOST), _LEAST) / mean), 1)
        return size, self.every or (min(math.ceil(size * mean / room), _RAREST) if tokens else 1)

    def choose(self, tensors: Mapping[str, Tensor], tokens: int) -> None:
        """Chooses the texts of a batch and k at the first step, from how many tokens of the task it has."""
        size, every = self.chosen(float(tensors[_LENGTHS].double().mean()), tokens)
        for name, value in {_SIZE: size, **self._paced(every)}.items():
            tensors[name].fill_(value)

    def _paced(self, every: int) -> dict[str, float]:
        """Returns k and where it starts from; nothing of a budget is lost before the second step."""
        gap, wait = (every, 0) if self.budget is None else (1, int(every > 1))
        return {_EVERY: float(every), _GAP: float(gap), _WAIT: float(wait)}

    def undecided(self, tensors: Mapping[str, Tensor]) -> bool:
        """Returns whether these are still to be chosen."""
        return not (int(tensors[_SIZE]) and int(tensors[_EVERY]))

    def batch(self, tensors: Mapping[str, Tensor]) -> TextBatch:
        """Returns the texts of this step."""
        size, number = int(tensors[_SIZE]), int(tensors[_BATCH])
        return _rows(tensors, trained_on(len(tensors[_IDS]), size=size, seed=self.seed, number=number))

    def check(self, tensors: Mapping[str, Tensor]) -> TextBatch | None:
        """Returns the held-out texts that a budget is measured on in this step, a quarter of a batch.

        None in the first round, where no text of a batch has been trained on yet, and where none is held out.
        """
        if self.budget is None:
            return None
        texts, batch, number = len(tensors[_IDS]), int(tensors[_SIZE]), int(tensors[_BATCH])
        rows, size = held_out(texts, self.seed), max(batch // 4, 1)
        if not rows or number * batch < texts - len(rows):
            return None
        first = number * size
        return _rows(tensors, [rows[(first + index) % len(rows)] for index in range(min(size, len(rows)))])

    def held_out(self, tensors: Mapping[str, Tensor]) -> Iterator[TextBatch]:
        """Yields the texts of the verdict; where none is held out, those of training."""
        rows = held_out(len(tensors[_IDS]), self.seed) or [*range(len(tensors[_IDS]))]
        for first in range(0, len(rows), size := max(int(tensors[_SIZE]), 1)):
            yield _rows(tensors, rows[first : first + size])

    def update(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Goes on to the next step, and after a measurement takes that of the controller."""
        weight = self.weight(tensors) if "" in values else 0.0
        if not weight:
            tensors[_WAIT].sub_(1).clamp_(min=0)
            return {}
        logs = {"kl_to_base": values[""] / weight}
        if self.budget is not None:
            logs |= self._controlled(tensors, values, logs["kl_to_base"], self.budget)
        tensors[_BATCH].add_(1)
        tensors[_WAIT].copy_(tensors[_GAP] - 1)
        return logs

    def _controlled(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], measured: Tensor, budget: float
    ) -> dict[str, Tensor]:
        """Takes the controller's step of (3), and returns what is logged of it."""
        logs = {"kl_budget": tensors[_PRESSURE].new_tensor(budget), "multiplier": tensors[_PRESSURE][0].exp()}
        trained = measured.to(tensors[_LAST])
        tensors[_LAST].lerp_(trained.expand(1), _QUICK)
        ratio = 1.0
        if "held_out" in values:
            logs["kl_held_out"] = held = values["held_out"]
            first = not float(tensors[_TRAINED])
            for name, value in ((_TRAINED, trained), (_HELD, held)):
                tensors[name].lerp_(value.to(trained).expand(1), 1.0 if first else _SLOW)
            ratio = float(tensors[_HELD] / tensors[_TRAINED].clamp_min(torch.finfo(torch.float64).tiny))
        c = excess(tensors[_LAST] * ratio, budget)
        tensors[_MULTIPLIER].copy_(ascended(tensors[_MULTIPLIER], c, int(tensors[_GAP])))
        tensors[_PRESSURE].copy_(tensors[_MULTIPLIER] + GAIN * c)
        tensors[_GAP].copy_(torch.minimum(tensors[_GAP] + 1, tensors[_EVERY]) if c <= 0 else torch.ones_like(c))
        return logs

    def conclude(self, tensors: Mapping[str, Tensor], last: Mapping[str, float]) -> list[str]:
        """Returns the KL on the texts that were held out, with the verdict on the budget."""
        if "held_out/kl" not in last:
            return []
        measured, low, high, texts = (last[f"held_out/{key}"] for key in ("kl", "low", "high", "texts"))
        held = "held-out texts" if held_out(len(tensors[_IDS]), self.seed) else "texts, which are those it was held on"
        said = f"penalty kl: {measured:.2g} nats per token ({low:.2g} to {high:.2g}) lost on {texts:.0f} {held}"
        if self.budget is None:
            return [said]
        found = verdict(measured, self.budget)
        advice = ": try a lower learning rate, more texts, or a larger batch_size" if found == "overdrawn" else ""
        return [f"{said}, of {self.budget:g}: {found}{advice}"]


def _rows(tensors: Mapping[str, Tensor], rows: list[int]) -> TextBatch:
    longest = int(tensors[_LENGTHS][rows].max())
    ids, learned = tensors[_IDS][rows, :longest].long(), tensors[_LEARNED][rows, :longest]
    mask = torch.arange(longest, device=ids.device) < tensors[_LENGTHS][rows, None]
    held = mask & learned
    held[:, 0] = False
    return TextBatch(input_ids=ids, attention_mask=mask.long(), learned=held)
