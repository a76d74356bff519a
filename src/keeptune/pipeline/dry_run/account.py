"""What a dry run tells: what would be fetched, trained and scored, with memory and work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from keeptune.pipeline.dry_run.estimate import TrainingMemory
from keeptune.pipeline.dry_run.model_shapes import ModelShape

__all__ = ["DryRun", "Named", "Part", "Scored", "Trained"]


@dataclass(frozen=True)
class Named:
    """Something that a run needs.

    Args:
        what: ``model``, ``task``, ``knowledge`` or ``benchmark``.
        name: Its path or name on the hub.
        revision: Asked for; None is the newest.
        size: Bytes; None where they are not known.
        at_hand: It is on this machine.
    """

    what: str
    name: str
    revision: str | None
    size: int | None
    at_hand: bool


@dataclass(frozen=True)
class Trained:
    """What would be trained.

    Args:
        method: Its name.
        targets: How many linear maps; 0 for all weights.
        roles: Theirs.
        numbers: T, trained numbers, a classifier's head among them.
        assumed: T rests on ranks that data decide.
        examples: Of the task and of replay; None where they are not known.
        batch: Examples to an optimiser step, on one device.
        steps: Optimiser steps; None where examples are not known.
        length: Tokens of an example: a mean, or the most there can be.
        measured: ``length`` is a mean over examples.
    """

    method: str
    targets: int
    roles: tuple[str, ...]
    numbers: int
    assumed: bool
    examples: int | None
    batch: int
    steps: int | None
    length: float
    measured: bool

    @property
    def tokens(self) -> float | None:
        """Tokens over all steps; a bound where ``length`` is one."""
        return None if self.steps is None else self.steps * self.batch * self.length


@dataclass(frozen=True)
class Scored:
    """A benchmark.

    Args:
        name: Its name.
        role: What it measures.
        items: How many; None where they are not known.
        metric: What they are scored by.
        length: Tokens of an item, all its choices together: a mean, or the most a sequence can have.
        measured: ``length`` is a mean over items.
    """

    name: str
    role: str
    items: int | None
    metric: str
    length: float
    measured: bool


@dataclass(frozen=True)
class DryRun:
    """What a run would do and take.

    Args:
        shape: The model's.
        needs: The model, data and benchmarks.
        train: What is trained.
        score: The benchmarks.
        memory: Bytes at the peak of training.
        sums: Bytes of the statistics' sums, beside the base's weights.
        cache: Bytes of keys and values at the peak of scoring, beside the base's weights.
        work: Floating-point operations of ``statistics``, ``train`` and ``score``; None where not known.
        bounds: Which of these are upper bounds.
        notes: What the estimates leave out.
    """

    shape: ModelShape
    needs: tuple[Named, ...]
    train: Trained
    score: tuple[Scored, ...]
    memory: TrainingMemory
    sums: int
    cache: int
    work: Mapping[str, float | None]
    bounds: frozenset[str]
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes at the peak of the whole run."""
        base = self.shape.size * self.shape.parameters
        return max(self.memory.total, base + self.sums, base + self.cache)


@dataclass(frozen=True)
class Part:
    """Runs that take the same.

    Args:
        name: Of a method of a comparison or of a stage; empty for the run of a recipe.
        runs: How many, over rates and seeds.
        dry: What one of them would do.
    """

    name: str
    runs: int
    dry: DryRun
