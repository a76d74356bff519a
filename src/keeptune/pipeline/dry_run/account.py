"""The account of a run: what would be fetched, trained and scored, with memory and work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from keeptune.pipeline.dry_run.estimate import TrainingMemory
from keeptune.pipeline.dry_run.model_shapes import ModelShape

__all__ = ["DryRun", "Need", "Scored", "Trained"]


@dataclass(frozen=True)
class Need:
    """A model, data file or benchmark that a run needs.

    Args:
        what: ``model``, ``task``, ``knowledge`` or ``benchmark``.
        name: Its path or name on the hub.
        at_hand: It is on this machine.
        size: Bytes; None where they are not known.
        revision: The revision on the hub that the recipe names; None is the newest.
    """

    what: str
    name: str
    at_hand: bool
    size: int | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Trained:
    """What would be trained.

    Args:
        method: Its name.
        targets: Number of linear maps; 0 for all weights.
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
        role: Its role.
        items: Number of items; None where it is not known.
        metric: Its metric.
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
    """The account of a run.

    Args:
        device: The device that the recipe names.
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

    device: str
    shape: ModelShape
    needs: tuple[Need, ...]
    train: Trained
    score: tuple[Scored, ...]
    memory: TrainingMemory
    sums: int
    cache: int
    work: Mapping[str, float | None]
    bounds: frozenset[str]
    notes: tuple[str, ...]

    @property
    def whole_work(self) -> float | None:
        """Floating-point operations of the whole run; None where a part is not known."""
        known = [work for work in self.work.values() if work is not None]
        return sum(known) if len(known) == len(self.work) else None
