"""The account of a run: what would be fetched, trained and scored, with memory (bytes) and work (operations).

None stands for what cannot be known without the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from keeptune.pipeline.dry_run.estimate import TrainingMemory
from keeptune.pipeline.dry_run.model_shapes import ModelShape


@dataclass(frozen=True)
class Need:
    """A model, data file or benchmark that a run needs; what is not ``at_hand`` is fetched."""

    what: str  # model, task, knowledge or benchmark
    name: str  # its path, or its name on the hub
    at_hand: bool
    size: int | None = None  # bytes
    revision: str | None = None  # on the hub; None is the newest


@dataclass(frozen=True)
class Trained:
    """What would be trained."""

    method: str
    targets: int  # linear maps; 0 for all weights
    roles: tuple[str, ...]
    numbers: int  # trained numbers, a classifier's head among them
    assumed: bool  # the numbers rest on ranks that data decide
    examples: int | None  # of the task and of replay
    batch: int  # examples to an optimiser step, on one device
    steps: int | None
    length: float  # tokens of an example: a mean where ``measured``, else the most there can be
    measured: bool

    @property
    def tokens(self) -> float | None:
        """Tokens over all steps; a bound where ``length`` is one."""
        return None if self.steps is None else self.steps * self.batch * self.length


@dataclass(frozen=True)
class Scored:
    """A benchmark that would be scored."""

    name: str
    role: str
    items: int | None
    metric: str
    length: float  # tokens of an item, all its choices together: a mean where ``measured``, else the most
    measured: bool


@dataclass(frozen=True)
class DryRun:
    """The account of a run."""

    device: str
    shape: ModelShape
    needs: tuple[Need, ...]
    train: Trained
    score: tuple[Scored, ...]
    memory: TrainingMemory  # at the peak of training
    sums: int  # of the statistics, beside the base's weights
    cache: int  # keys and values at the peak of scoring, beside the base's weights
    work: Mapping[str, float | None]  # of ``statistics``, ``train`` and ``score``
    bounds: frozenset[str]  # which of these are upper bounds
    notes: tuple[str, ...]  # what the estimates leave out

    @property
    def whole_work(self) -> float | None:
        """Work of the whole run."""
        known = [work for work in self.work.values() if work is not None]
        return sum(known) if len(known) == len(self.work) else None
