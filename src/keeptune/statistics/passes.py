"""A pass over the data, and the sums that are taken on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from keeptune.core.offload import device_of
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Batch
from keeptune.model.runner import Runner, Taps
from keeptune.model.summed_loss import Loss
from keeptune.statistics.request import RowRequest
from keeptune.statistics.running_mean import Accumulator

# A statistic and a target of the site where it is measured.
Measured = tuple[RowRequest, Target]


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over the data: statistics with equal passes are measured together."""

    source: str
    examples_alone: bool
    loss: Loss | None


def shares(measured: Sequence[Measured]) -> list[list[Measured]]:
    """Splits statistics into shares whose sums together are no larger than the largest single one (first fit)."""
    sizes = [request.numbers(target) for request, target in measured]
    room = [0] * len(measured)
    parts: list[list[Measured]] = [[] for _ in measured]
    for one, size in zip(measured, sizes, strict=True):
        place = next(i for i, used in enumerate(room) if used + size <= max(sizes))
        room[place] += size
        parts[place].append(one)
    return [part for part in parts if part]


def run_pass(
    runner: Runner, batches: Sequence[Batch], need: Pass, measured: Sequence[Measured], *, title: str
) -> list[Accumulator]:
    """Sums statistics in one pass over the data."""
    model = runner.model
    totals: list[Accumulator] = []
    taps = Taps()
    for request, target in measured:
        total = request.accumulator(target, device_of(model), partial(read_weight, model, target))
        taps.sinks(request.kind).setdefault(request.site(target), []).append(total.add)
        totals.append(total)
    if need.loss is None or not taps.with_gradients:
        runner.forward(batches, taps.forward, title=title)
    else:
        runner.backward(batches, taps, need.loss, title=title)
    return totals
