"""A pass over the data, and the sums that are taken on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from keeptune.core.target import Target, read_weight
from keeptune.data.calibration import Batch
from keeptune.model.runner import Labels, ResidentRunner, Taps
from keeptune.statistics.request import Accumulator, Request

__all__ = ["Pass", "Site", "run_wave", "shares"]

Site = tuple[Request, Target]


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over the data: sites with equal passes are served together."""

    source: str
    examples_alone: bool
    labels: Labels | None
    seed: int


def shares(sites: Sequence[Site]) -> list[list[Site]]:
    """Split sites into shares whose sums together are no larger than the largest single one (first fit).

    Args:
        sites: The sites.

    Returns:
        The shares.
    """
    sizes = [request.numbers(target) for request, target in sites]
    room = [0] * len(sites)
    shares: list[list[Site]] = [[] for _ in sites]
    for site, size in zip(sites, sizes, strict=True):
        place = next(i for i, used in enumerate(room) if used + size <= max(sizes))
        room[place] += size
        shares[place].append(site)
    return [share for share in shares if share]


def run_wave(
    runner: ResidentRunner, batches: Sequence[Batch], need: Pass, wave: Sequence[Site], *, title: str
) -> list[Accumulator]:
    """Sum what sites need in one pass over the data.

    Args:
        runner: Runs the model.
        batches: The data.
        need: The pass.
        wave: The sites.
        title: Of the bar.

    Returns:
        A sum per site.
    """
    model = runner.model
    totals: list[Accumulator] = []
    taps = Taps()
    for request, target in wave:
        total = request.accumulator(target, model.device, partial(read_weight, model, target))
        kinds: Any = {
            "forward": taps.inputs,
            "backward": taps.gradients,
            "joint": taps.pairs,
            "texts": taps.texts,
        }
        sinks = kinds[request.kind]
        sinks.setdefault(request.site(target), []).append(total.add)
        totals.append(total)
    if need.labels is None or not taps.backward:
        runner.forward(batches, taps.inputs, title=title)
    else:
        runner.backward(batches, taps, labels=need.labels, seed=need.seed, title=title)
    return totals
