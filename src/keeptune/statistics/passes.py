"""A pass over the data, and the sums that are taken on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from keeptune.core.processes import add_up, share, world
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Batch
from keeptune.model.runner import Runner, Taps
from keeptune.model.summed_loss import Loss
from keeptune.statistics.request import Accumulator, RowRequest

# A statistic and a target of the site where it is measured.
Measured = tuple[RowRequest, Target]


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over the data: statistics with equal passes are measured together."""

    source: str
    examples_alone: bool
    loss: Loss | None


def shares(measured: Sequence[Measured], sum_bytes: int) -> list[list[Measured]]:
    """Splits statistics into shares whose sums take no more memory than given, or than the largest one (first fit)."""
    sizes = [8 * request.numbers(target) for request, target in measured]
    most = max([sum_bytes, *sizes])
    room = [0] * len(measured)
    parts: list[list[Measured]] = [[] for _ in measured]
    for one, size in zip(measured, sizes, strict=True):
        place = next(i for i, used in enumerate(room) if used + size <= most)
        room[place] += size
        parts[place].append(one)
    return [part for part in parts if part]


def run_pass(
    runner: Runner,
    batches: Sequence[Batch],
    need: Pass,
    measured: Sequence[Measured],
    deliver: Callable[[RowRequest, Target, Accumulator], None],
    *,
    title: str,
) -> None:
    """Sums statistics in one pass over the data; each sum is delivered and freed once its module is done.

    Several processes divide the batches, but for examples that are alone; all deliver all sums of all batches.
    """
    taps, sums = Taps(), dict[Measured, Callable[[], Accumulator]]()
    own = batches if need.examples_alone else share(batches)
    for request, target in measured:
        weight = partial(read_weight, runner.model, target)
        # A sum takes memory from its first rows on.
        sums[request, target] = cache(partial(request.accumulator, target, runner.device, weight))
        # A process without a batch passes one all the same, so that modules are done in one order on all.
        add = partial(_add, sums[request, target]) if own else _ignore
        taps.sinks(request.kind).setdefault(request.site(target), []).append(add)

    def done(names: set[str]) -> None:
        for request, target in [one for one in sums if one[0].site(one[1]) in names]:
            total = sums.pop((request, target))()
            if world() > 1 and not need.examples_alone:
                _add_up(total)
            deliver(request, target, total)
        # The sinks hold their sums too.
        for kind in (taps.forward, taps.backward, taps.joint, taps.texts):
            for name in names & set(kind):
                kind[name].clear()

    runner.run(own or batches[:1], taps, need.loss if taps.with_gradients else None, title=title, done=done)


def _add(total: Callable[[], Accumulator], *rows: Any) -> None:
    total().add(*rows)


def _ignore(*_: Any) -> None:
    """Adds no rows."""


def _add_up(total: Accumulator) -> None:
    """Merges the sums of all processes."""
    tokens = torch.tensor(float(total.tokens), dtype=torch.float64)
    for part in (*total.sums, tokens):
        add_up(part)
    total.tokens = int(tokens)
