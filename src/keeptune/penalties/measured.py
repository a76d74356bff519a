"""What penalties have in common that are measured on the knowledge: how much of it, which labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keeptune.core.options import Options, Range
from keeptune.penalties.base import Penalty
from keeptune.statistics.covariance import TokenCount
from keeptune.statistics.request import DataRole, Labels


@dataclass(frozen=True, kw_only=True)
class Draws(Options):
    """Options of what gradients are taken of.

    Args:
        labels: What gradients are taken of: ``"probe"`` and ``"sampled"`` are the Fisher, by random signs or by labels
            drawn from the model itself, which is noisier; ``"true"`` takes the data's tokens (the empirical Fisher).
        probes: How many draws of signs or labels are averaged: a backward pass each, on one forward pass.
        label_seed: Seed of the draws.
    """

    ranges = {"probes": Range(least=1)}

    labels: Labels = "probe"
    probes: int = 1
    label_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.labels != "true" or self.probes == 1, "probes", "1 with `labels: true`, which are not drawn")


@dataclass(frozen=True, kw_only=True)
class MeasuredPenalty(Draws, Penalty):
    """A penalty that is measured on the knowledge.

    Args:
        batches: How many batches of each knowledge set are used; None is all of it.
        batch_size: Examples per batch; only ``batches`` depends on it.
    """

    ranges = dict.fromkeys(("batches", "batch_size"), Range(least=1))

    batches: int | None = None
    batch_size: int = 8

    @property
    def draws(self) -> dict[str, Any]:
        """The options of requests that say what is drawn, of which examples."""
        return {"seed": self.label_seed, "probes": self.probes, "examples": self.examples}

    @property
    def data(self) -> frozenset[DataRole]:
        """The knowledge."""
        return frozenset({"knowledge"})

    @property
    def examples(self) -> int | None:
        """How many examples of each knowledge set are used; None is all."""
        return None if self.batches is None else self.batches * self.batch_size

    @property
    def count(self) -> TokenCount:
        """The request for the number of tokens."""
        return TokenCount("knowledge", examples=self.examples)
