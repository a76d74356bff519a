"""Requests: a method says which statistics of a target it needs; a request's content is its cache key.

A new statistic is a file with one frozen dataclass: a :class:`RowRequest` (of inputs), a :class:`GradientRequest` (of
output gradients, or of both) or a :class:`ModelRequest` (of the whole model). Behind rows stands a sum, mostly one
running mean over tokens (:class:`RunningMean`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError, need_finite
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.model.head import Labels as Labels
from keeptune.model.head import Loss
from keeptune.statistics.store import Source, StatStore

DataRole = Literal["knowledge", "task"]
WeightReader = Callable[[], Tensor]
# Of a field that earlier versions did not have: at its default it is no part of the key, so that stores stay good.
ADDED: Final = {"added": True}


@dataclass(frozen=True, slots=True)
class Request(ABC):
    """Names a statistic; two equal requests are the same statistic.

    Args:
        data: Which data the statistic is taken over.
        examples: How many examples of each set of the data are used, the first ones; None is all. No part of the key:
            the data's fingerprint is that of the examples used.
    """

    data: DataRole
    examples: int | None = dataclasses.field(default=None, kw_only=True)
    version: ClassVar[int] = 1

    @abstractmethod
    def site(self, target: Target) -> str:
        """Returns the name of the module where it is measured; targets with equal sites share one entry."""

    def entry(self, target: Target, source: Source) -> dict[str, Any]:
        """Returns all that determines the statistic, ready for JSON; its content key names the entry in the store."""
        # What is not compared (tensors) has its fingerprint in another field.
        fields = {f: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare and f.name != "examples"}
        return {
            "request": {f.name: value for f, value in fields.items() if f.metadata != ADDED or value != f.default},
            "class": type(self).__name__,
            "version": self.version,
            "site": self.site(target),
            "source": source,
        }


@dataclass(frozen=True, slots=True)
class RowRequest(Request):
    """A sum over the rows of tokens; by default over the inputs of an input group, in a forward pass."""

    examples_alone: ClassVar[bool] = False  # in their order: each process makes all of such a sum

    @property
    def loss(self) -> Loss | None:
        """The loss whose gradients are taken; None without one."""
        return None

    def site(self, target: Target) -> str:
        """Returns the input group: q, k and v share one entry."""
        return target.input_group

    @abstractmethod
    def numbers(self, target: Target) -> int:
        """Returns how many numbers the sum holds in memory, in float64; a float32 counts half."""

    def kept(self, target: Target) -> int:
        """Returns how many bytes the store keeps: float32 numbers, by default as many as the sum has."""
        return 4 * self.numbers(target)

    @abstractmethod
    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns an empty sum; ``weight`` reads the target's weight, ``(m, n)`` float32, for sums that need it."""


@dataclass(frozen=True, slots=True)
class GradientRequest(RowRequest):
    """A sum over output gradients δ = d loss / d y of the loss summed over the learned tokens, at a target of its own.

    Without prompts and completions whole texts are learned, all tokens but the first.

    Args:
        labels: ``"true"`` takes the data's tokens (empirical Fisher), ``"sampled"`` the model's own (Fisher),
            ``"probe"`` random signs in their place (the Fisher, with less noise).
        seed: Seed of the draws.
        probes: How many draws are averaged.
    """

    labels: Labels
    seed: int = dataclasses.field(default=0, kw_only=True)
    probes: int = dataclasses.field(default=1, kw_only=True, metadata=ADDED)

    @property
    def loss(self) -> Loss:
        """The loss whose gradients are taken."""
        return Loss(self.labels, self.seed, self.probes)

    def site(self, target: Target) -> str:
        """Returns the target itself: every map has outputs of its own."""
        return target.name


@dataclass(frozen=True, slots=True)
class ModelRequest(Request):
    """A statistic of the whole model, which all targets share; it makes its own passes, text by text.

    Attributes:
        by_text: The entry only lists entries of texts, each of which is looked up again.
    """

    by_text: ClassVar[bool] = False

    def site(self, target: Target) -> str:
        """Returns the one entry of all targets."""
        return "model"

    @abstractmethod
    def measure(
        self, model: PreTrainedModel, data: Calibration, store: StatStore, source: Source
    ) -> Mapping[str, Tensor]:
        """Measures the statistic; returns the parts of the entry by name, ``""`` the entry itself, stored last.

        Each text's result goes to the store, so that an interrupted run resumes and data sets share texts.
        """


class UnseenError(StatisticsError):
    """No token of the data reached a module."""


def checked_result(total: RunningMean, module: str) -> Tensor:
    """Returns the result of a sum of a module, on the CPU.

    Raises:
        UnseenError: No token was added.
        StatisticsError: The result is NaN or infinite somewhere.
    """
    if total.tokens == 0:
        raise UnseenError(
            module,
            got="no tokens",
            wanted="at least one unpadded token",
            next_step="The data never reached this module; leave it out of the targets.",
        )
    value = total.result()
    need_finite(value.isfinite(), module, "activations or gradients", StatisticsError)
    return value


@dataclass
class RunningMean:
    """The mean over tokens of what rows contribute, summed in float64; ``tokens`` is how many rows were added.

    Laws: the result does not depend on how rows are split over calls or over sums that are added up, nor on their
    order (to float64 rounding of the sum).

    Args:
        shape: Shape of the mean.
        device: Where the sum is kept.
        add_terms: Adds the contributions of the rows of one batch to the sum, in place: ``add_terms(total, *rows)``.
        finish: Turns the mean into the statistic.
        dtype: Of the mean.
    """

    shape: tuple[int, ...]
    device: torch.device
    add_terms: Callable[..., None]
    finish: Callable[[Tensor], Tensor] = lambda mean: mean
    dtype: torch.dtype = torch.float32
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)

    def add(self, rows: Tensor, *more: Any) -> None:
        """Adds rows ``(tokens, features)`` of a batch, and what a pass hands over beside them: gradients, lengths."""
        batch = (part.to(self.device) if isinstance(part, Tensor) else part for part in (rows, *more))
        self.add_terms(self.total, *batch)
        self.tokens += rows.shape[0]

    def result(self) -> Tensor:
        """Returns the mean on the CPU."""
        mean = torch.empty_like(self.total, dtype=self.dtype)
        for start in range(0, len(mean), 256):  # a float64 copy of the whole would be the peak of memory
            mean[start : start + 256] = self.total[start : start + 256] / self.tokens
        return self.finish(mean).cpu()
