"""Collects what methods request, once, in passes over the data: what the store has is not computed again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.errors import StatisticsError, named
from keeptune.core.processes import add_up, by_first, gathered, held_by_first, is_first, share, world
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Batch, Calibration
from keeptune.model.blocks import is_nested
from keeptune.model.head import Loss, head_fingerprint, refuse_unknown_tokens
from keeptune.model.runner import Runner, Taps
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution
from keeptune.statistics.request import (
    DataRole,
    ModelRequest,
    Request,
    RowRequest,
    RunningMean,
    UnseenError,
    checked_result,
)
from keeptune.statistics.store import Source, StatStore
from keeptune.statistics.store_use import refuse_larger

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Collected statistics of a set of targets.

    Args:
        store: Where the values are.
        sources: Model and data, by :func:`source_name`.
        requests: Per target name.
        unseen: Experts that no token reached, with what was requested of them: they have no such statistics, and
            nothing is guessed in their place.
        memo: The last result of :meth:`StatsView.derive` for each function.
        counts: How many tokens are learned, by :func:`source_name`.
    """

    store: StatStore
    sources: Mapping[str, Source]
    requests: Mapping[str, frozenset[Request]]
    unseen: Mapping[str, frozenset[Request]] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict, compare=False)
    counts: Mapping[str, int] = field(default_factory=dict)

    def view(self, target: Target) -> StatsView:
        """Returns the statistics that one target requested."""
        return StatsView(target, self)


@dataclass(frozen=True, slots=True)
class StatsView:
    """The statistics one target requested; anything else is refused. Values are read from the store one at a time."""

    target: Target
    statistics: Statistics

    def __getitem__(self, request: Request) -> Tensor:
        """Reads one statistic from the store, on the CPU; float32 but for those of double precision.

        Raises:
            StatisticsError: It was not requested, or the store lost it.
        """
        return self._read(request, "")

    def attributions(self, request: NeuronAttribution) -> Attributions:
        """Opens the attributions of texts; they are read from the store as they are needed.

        Raises:
            StatisticsError: They were not requested, or the store lost them.
        """
        return request.open(self.statistics.store, {part: self._read(request, part) for part in request.parts})

    def _entry(self, request: Request) -> dict[str, Any]:
        return request.entry(self.target, self.statistics.sources[source_name(request)])

    def _read(self, request: Request, part: str) -> Tensor:
        requested = self.statistics.requests[self.target.name]
        if request not in requested:
            raise StatisticsError(
                self.target.name,
                got=f"a read of {request}",
                wanted=f"one of the requested statistics: {sorted(map(str, requested)) or 'none'}",
                next_step="Return it from the method's requests().",
            )
        value = self.statistics.store.get(_part(self._entry(request), part))
        if value is None:
            raise StatisticsError(
                self.target.name,
                got=f"no {request} in {self.statistics.store.folder}",
                wanted="the entry that was collected",
                next_step="Run the stats stage again; nothing else may empty the store meanwhile.",
            )
        return value

    def learned(self, request: Request) -> int:
        """Returns T, how many tokens of a request's data are learned: completions, all but first ones, or labels."""
        return self.statistics.counts[source_name(request)]

    def derive(self, request: Request, function: Callable[..., T], *options: Any) -> T:
        """Computes ``function(self[request], *options)`` once for all targets that share it, such as q, k and v.

        Only the last result of each function is kept: targets of one input group follow each other. The function is
        pure; of a ``NeuronAttribution`` it gets :class:`Attributions`.

        Raises:
            StatisticsError: The statistic was not requested, or the store lost it.
        """
        memo = self.statistics.memo
        name, key = f"{function.__module__}.{function.__qualname__}", content_key([self._entry(request), options])
        if memo.get(name, ("",))[0] != key or request not in self.statistics.requests[self.target.name]:
            value = self.attributions(request) if isinstance(request, NeuronAttribution) else self[request]
            memo[name] = (key, function(value, *options))
        derived: T = memo[name][1]
        return derived


def collect(
    runner: Runner,
    requests: Mapping[Target, frozenset[Request]],
    data: Mapping[DataRole, Calibration],
    store: StatStore,
    *,
    model_fingerprint: str,
    sum_bytes: int | None = None,
    batch_tokens: int = 1024,
) -> Statistics:
    """Computes the statistics that are requested and not in the store yet.

    Args:
        runner: Runs the base model.
        requests: What each target needs; targets of one input group share entries.
        data: Tokens per data role.
        store: Where entries are looked up and kept.
        model_fingerprint: From :func:`keeptune.model.head.body_fingerprint`.
        sum_bytes: Hold no more sums at a time than fit into this many bytes, or than the largest, at one (shortened)
            pass over the data for each such share; None holds all of a pass.
        batch_tokens: Tokens per forward pass, padding included; it changes speed and memory only.

    Raises:
        StatisticsError: Data of a role is requested but not given, or activations are not finite.
    """
    used = _used(requests, data)
    for role in {request.data for requested in requests.values() for request in requested} & data.keys():
        refuse_unknown_tokens(runner.model, data[role].sequences, f"{role} data")
    sources = {name: source_of(runner.model, model_fingerprint, tokens) for name, tokens in used.items()}
    unseen = _Collection(runner, requests, used, sources, store, sum_bytes, batch_tokens).run()
    if unseen:
        _log.warning(
            "statistics: no token reached %d of %d targets: %s", len(unseen), len(requests), named(sorted(unseen))
        )
    counts = {name: tokens.learned_tokens for name, tokens in used.items()}
    by_name = {target.name: requested for target, requested in requests.items()}
    return Statistics(store, sources, by_name, unseen, counts=counts)


@dataclass(frozen=True, slots=True)
class _Collection:
    """One call of :func:`collect`; ``data`` and ``sources`` are by :func:`source_name`."""

    runner: Runner
    requests: Mapping[Target, frozenset[Request]]
    data: Mapping[str, Calibration]
    sources: Mapping[str, Source]
    store: StatStore
    sum_bytes: int | None
    batch_tokens: int

    def run(self) -> dict[str, frozenset[Request]]:
        """Computes what is missing; returns the names of experts that no token reached, and what has no value."""
        every, entries = by_first(self._missing)
        names = {content_key({**entry, "site": None}) for entry in entries.values()}
        with held_by_first(self.store.turn(names)):
            # Another run may have stored some meanwhile.
            left = by_first(lambda: [one not in entries or not self.store.holds(entries[one]) for one in every])
            missing = [one for one, wanted in zip(every, left, strict=True) if wanted]
            for request, target in missing:
                if isinstance(request, ModelRequest):
                    name, entry = source_name(request), self._entry(request, target)
                    parts = request.measure(self.runner.model, self.data[name], self.store, self.sources[name])
                    for part, value in parts.items() if is_first() else ():
                        self.store.put(_part(entry, part), value)
            unseen = self._sum([(request, target) for request, target in missing if isinstance(request, RowRequest)])
            gathered(None)  # what the first has stored is there for all
            return unseen

    def _entry(self, request: Request, target: Target) -> dict[str, Any]:
        return request.entry(target, self.sources[source_name(request)])

    def _missing(self) -> tuple[list[tuple[Request, Target]], dict[tuple[Request, Target], dict[str, Any]]]:
        """Lists what the store lacks, once for each site; and the entries that are not there at all, damaged or not."""
        missing: list[tuple[Request, Target]] = []
        seen: set[tuple[Request, str]] = set()
        kept: Counter[str] = Counter()
        for target, requested in self.requests.items():
            for request in sorted(requested, key=str):
                if (request, request.site(target)) in seen:
                    continue
                seen.add((request, request.site(target)))
                if source_name(request) not in self.sources:
                    raise StatisticsError(
                        target.name,
                        got=f"no {request.data} data",
                        wanted=f"{request.data} data for {request}",
                        next_step=f"Add a `{request.data}` section to the recipe.",
                    )
                stored = self.store.get(self._entry(request, target))
                if stored is None or (isinstance(request, ModelRequest) and request.by_text):
                    missing.append((request, target))
                else:
                    kept[str(request)] += 1
        every = Counter(str(request) for request, _ in seen)
        for name, count in kept.items():
            _log.info("statistics: %d of %d %s taken from %s", count, every[name], name, self.store.folder)
        entries = {one: self._entry(*one) for one in missing}
        return missing, {one: entry for one, entry in entries.items() if not self.store.holds(entry)}

    def _sum(self, missing: Sequence[Measured]) -> dict[str, frozenset[Request]]:
        refuse_larger(max((request.kept(target) for request, target in missing), default=0), self.store.limit)
        waves = [
            (need, wave)
            for need, measured in _by_pass(missing).items()
            for wave in ([measured] if self.sum_bytes is None else shares(measured, self.sum_bytes))
        ]
        # An expert sees some tokens only, so that padding looks like text: its batches hold none.
        padded = not any(is_nested(target.name) for target in self.requests)
        several = len(waves) > 1
        unseen: dict[str, frozenset[Request]] = {}

        def finished(request: RowRequest, target: Target, total: RunningMean) -> None:
            try:
                value = checked_result(total, request.site(target))
                if is_first():
                    self.store.put(self._entry(request, target), value)
            except UnseenError:
                if not is_nested(target.name):
                    raise
                for other, requested in self.requests.items():
                    if request in requested and request.site(other) == request.site(target):
                        unseen[other.name] = unseen.get(other.name, frozenset()) | {request}

        for need, wave in tqdm(waves, desc="statistics", delay=2, disable=None if several else True, leave=False):
            tokens = 1 if need.examples_alone else self.batch_tokens
            batches = self.data[need.source].batches(tokens, padded=padded)
            run_pass(self.runner, batches, need, wave, finished, title="" if several else "statistics")
        return unseen


def _part(entry: dict[str, Any], part: str) -> dict[str, Any]:
    return {**entry, "part": part} if part else entry


def source_name(request: Request) -> str:
    """Returns the name of the data that a request uses: those of its role, or some of them."""
    return request.data if request.examples is None else f"{request.data}, {request.examples} of each set"


def _used(
    requests: Mapping[Target, frozenset[Request]], data: Mapping[DataRole, Calibration]
) -> dict[str, Calibration]:
    """Takes the examples that requests name of each set of the data; all of them under the role's name."""
    used: dict[str, Calibration] = dict(data.items())
    for request in frozenset[Request]().union(*requests.values()):
        if request.examples is not None and request.data in data:
            used[source_name(request)] = data[request.data].first(request.examples)
    return used


def source_of(model: PreTrainedModel, fingerprint: str, data: Calibration) -> Source:
    """Returns what statistics are taken from; where labels are learned, the classifier's head is a part of it.

    The fingerprint is that of :func:`keeptune.model.head.body_fingerprint`.
    """
    if data.labels is not None:
        fingerprint = content_key([fingerprint, head_fingerprint(model)])
    return Source(fingerprint, data.fingerprint, str(model.dtype))


def _by_pass(missing: Sequence[Measured]) -> dict[Pass, list[Measured]]:
    """Groups sums by the pass they need; inputs are taken along with gradients where both are needed."""
    passes: dict[Pass, list[Measured]] = {}
    for request, target in missing:
        need = Pass(source_name(request), request.examples_alone, request.loss)
        passes.setdefault(need, []).append((request, target))
    for need in [need for need in passes if need.loss is None]:
        hosts = (p for p in passes if p.loss and (p.source, p.examples_alone) == (need.source, need.examples_alone))
        host = next(hosts, None)
        if host is not None:
            passes[host] += passes.pop(need)
    return passes


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
    deliver: Callable[[RowRequest, Target, RunningMean], None],
    *,
    title: str,
) -> None:
    """Sums statistics in one pass over the data; each sum is delivered and freed once its module is done.

    Several processes divide the batches, but for examples that are alone; all deliver all sums of all batches.
    """
    taps, sums = Taps(), dict[Measured, Callable[[], RunningMean]]()
    own = batches if need.examples_alone else share(batches)
    for request, target in measured:
        weight = partial(read_weight, runner.model, target)
        # A sum takes memory from its first rows on.
        sums[request, target] = cache(partial(request.accumulator, target, runner.device, weight))
        # A process without a batch passes one all the same, so that modules are done in one order on all.
        add = partial(_add, sums[request, target]) if own else lambda *_: None
        sinks = taps.inputs if request.loss is None else taps.gradients
        sinks.setdefault(request.site(target), []).append(add)

    def done(names: set[str]) -> None:
        for request, target in [one for one in sums if one[0].site(one[1]) in names]:
            total = sums.pop((request, target))()
            if world() > 1 and not need.examples_alone:
                _add_up(total)
            deliver(request, target, total)
        # The sinks hold their sums too.
        for kind in (taps.inputs, taps.gradients):
            for name in names & set(kind):
                kind[name].clear()

    runner.run(own or batches[:1], taps, need.loss if taps.gradients else None, title=title, done=done)


def _add(total: Callable[[], RunningMean], *rows: Any) -> None:
    total().add(*rows)


def _add_up(total: RunningMean) -> None:
    """Merges the sums of all processes."""
    tokens = torch.tensor(float(total.tokens), dtype=torch.float64)
    for part in (total.total, tokens):
        add_up(part)
    total.tokens = int(tokens)
