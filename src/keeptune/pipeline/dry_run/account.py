"""The account of a run: what would be fetched, trained and scored, with memory (bytes) and work (operations).

None stands for what cannot be known without the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
    longest: int  # tokens of the longest sequence
    batch: int  # sequences in a forward pass, at most
    measured: bool


@dataclass(frozen=True)
class DryRun:
    """The account of a run."""

    device: str
    shape: ModelShape  # as the checkpoint has it
    quantised: bool  # by the recipe, or as the checkpoint is
    needs: tuple[Need, ...]
    train: Trained
    score: tuple[Scored, ...]
    memory: Mapping[str, Mapping[str, int]]  # bytes by part at the peak of each stage: ``plan``, ``training``, ...
    disk: Mapping[str, Mapping[str, int]]  # bytes written by part: ``store``, ``plan``, ``checkpoints``, ``results``
    work: Mapping[str, float | None]  # operations of ``knowledge`` (writing it), ``statistics``, ``train``, ``score``
    bounds: frozenset[str]  # which of these are upper bounds
    notes: tuple[str, ...]  # what the estimates leave out

    @property
    def peak(self) -> str:
        """The stage that takes most memory, and so what the run needs."""
        return max(self.memory, key=lambda stage: sum(self.memory[stage].values()))

    @property
    def whole_work(self) -> float | None:
        """Work of the whole run."""
        known = [work for work in self.work.values() if work is not None]
        return sum(known) if len(known) == len(self.work) else None

    def plain(self) -> dict[str, Any]:
        """Returns the account as plain values, for ``--json``: bytes and operations."""
        memory, disk = (
            {name: {"total": sum(parts.values()), "parts": dict(parts)} for name, parts in amounts.items()}
            for amounts in (self.memory, self.disk)
        )
        return {
            "device": self.device,
            "model": {key: getattr(self.shape, key) for key in ("name", "source", "dtype", "parameters")},
            "needs": [asdict(need) for need in self.needs],
            "train": asdict(self.train) | {"tokens": self.train.tokens},
            "score": [asdict(one) for one in self.score],
            "memory": memory | {"peak": {"stage": self.peak, "total": memory[self.peak]["total"]}},
            "disk": disk,
            "operations": {"total": self.whole_work, "parts": dict(self.work), "bounds": sorted(self.bounds)},
            "notes": list(self.notes),
        }
