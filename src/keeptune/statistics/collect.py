"""Collect what methods request, once: what the store has is not computed again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.errors import StatisticsError
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import is_nested
from keeptune.model.head import head_fingerprint
from keeptune.model.runner import ResidentRunner
from keeptune.statistics.layer_effect import LayerEffect, traced_effects
from keeptune.statistics.neuron_attribution import (
    Attributions,
    NeuronAttribution,
    attribute_texts,
    places_of,
    stored_attributions,
)
from keeptune.statistics.passes import Pass, Site, run_wave, shares
from keeptune.statistics.request import Accumulator, DataRole, Request
from keeptune.statistics.store import Source, StatStore, entry_recipe
from keeptune.statistics.validation import UnseenError

__all__ = ["Statistics", "StatsView", "collect", "source_name", "source_of"]

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StatsView:
    """The statistics one target asked for; anything else is refused.

    Args:
        target: The target.
        requests: What it asked for.
        store: Where the values are; they are read one at a time.
        sources: Model and data, by :func:`source_name`.
        memo: The last result of :meth:`derive` for each function, shared by the views of one collection.
        counts: How many tokens are learned, by :func:`source_name`.
    """

    target: Target
    requests: frozenset[Request]
    store: StatStore
    sources: Mapping[str, Source]
    memo: dict[str, Any] = field(default_factory=dict, compare=False)
    counts: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, request: Request) -> Tensor:
        """Read one statistic from the store.

        Args:
            request: One of the requests.

        Returns:
            The statistic, float32, on the CPU.

        Raises:
            StatisticsError: It was not requested, or the store lost it.
        """
        return self._read(request, entry_recipe(request, self.target, self.sources[source_name(request)]))

    def attributions(self, request: NeuronAttribution) -> Attributions:
        """Open the attributions of texts.

        Args:
            request: One of the requests.

        Returns:
            The attributions, read from the store as they are needed.

        Raises:
            StatisticsError: They were not requested, or the store lost them.
        """
        entry = entry_recipe(request, self.target, self.sources[source_name(request)])
        keys, layers, names = (self._read(request, at) for at in (entry, *_places(entry)))
        return stored_attributions(self.store, keys, layers, names, signed=request.signed)

    def _read(self, request: Request, entry: Mapping[str, Any]) -> Tensor:
        if request not in self.requests:
            raise StatisticsError(
                self.target.name,
                got=f"a read of {request}",
                wanted=f"one of the requested statistics: {sorted(map(str, self.requests)) or 'none'}",
                next_step="Return it from the method's requests().",
            )
        value = self.store.get(entry)
        if value is None:
            raise StatisticsError(
                self.target.name,
                got=f"no {request} in {self.store.folder}",
                wanted="the entry that was collected",
                next_step="Run the stats stage again; nothing else may empty the store meanwhile.",
            )
        return value

    def learned(self, request: Request) -> int:
        """Count the tokens that are learned in a request's data: the completions, or all but each text's first.

        Args:
            request: One of the requests.

        Returns:
            T; of a classifier, the number of texts.
        """
        return self.counts[source_name(request)]

    def derive(self, request: Request, function: Callable[..., T], *options: Any) -> T:
        """Compute something from a statistic once for all targets that share it, such as q, k and v.

        Only the last result of each function is kept: targets of one input group follow each other.

        Args:
            request: One of the requests.
            function: A pure function of the statistic and the options.
            *options: Plain values.

        Returns:
            ``function(self[request], *options)``; of a ``NeuronAttribution``, ``function`` gets :class:`Attributions`.

        Raises:
            StatisticsError: The statistic was not requested, or the store lost it.
        """
        entry = entry_recipe(request, self.target, self.sources[source_name(request)])
        name, key = f"{function.__module__}.{function.__qualname__}", content_key([entry, options])
        if self.memo.get(name, ("",))[0] != key or request not in self.requests:
            given = self.attributions(request) if isinstance(request, NeuronAttribution) else self[request]
            value = function(given, *options)
            self.memo[name] = (key, value)
        found: T = self.memo[name][1]
        return found


@dataclass(frozen=True, slots=True)
class Statistics:
    """Collected statistics of a set of targets.

    Args:
        store: Where the values are.
        sources: Model and data, by :func:`source_name`.
        requests: Per target name.
        unseen: Experts that no token reached: they have no statistics, and nothing is guessed in their place.
        memo: The last result of :meth:`StatsView.derive`.
        counts: How many tokens are learned, by :func:`source_name`.
    """

    store: StatStore
    sources: Mapping[str, Source]
    requests: Mapping[str, frozenset[Request]]
    unseen: frozenset[str] = frozenset()
    memo: dict[str, Any] = field(default_factory=dict, compare=False)
    counts: Mapping[str, int] = field(default_factory=dict)

    def view(self, target: Target) -> StatsView:
        """Give one target's statistics.

        Args:
            target: The target.

        Returns:
            A view on what it asked for.
        """
        return StatsView(target, self.requests[target.name], self.store, self.sources, self.memo, self.counts)


def collect(
    runner: ResidentRunner,
    targets: Sequence[Target],
    requests: Mapping[str, frozenset[Request]],
    data: Mapping[DataRole, Calibration],
    store: StatStore,
    *,
    model_fingerprint: str,
    low_memory: bool = False,
    batch_tokens: int = 1024,
) -> Statistics:
    """Compute the statistics that are requested and not in the store yet.

    Args:
        runner: Runs the base model.
        targets: The targets.
        requests: What each target (by name) needs; targets of one input group share entries.
        data: Tokens per data role.
        store: Where entries are looked up and kept.
        model_fingerprint: From :func:`keeptune.model.head.body_fingerprint`.
        low_memory: Hold no more sums at a time than take the memory of the largest, at one (shortened) pass over
            the data for each such share.
        batch_tokens: Tokens per forward pass, padding included; it changes speed and memory only.

    Returns:
        Access to all of them.

    Raises:
        StatisticsError: Data of a role is requested but not given, or activations are not finite.
    """
    used = _used(requests, data)
    sources = {name: source_of(runner.model, model_fingerprint, tokens) for name, tokens in used.items()}
    missing = _missing(targets, requests, sources, store)
    absent = _absent(missing, sources, store)
    with store.turn({content_key({**entry, "site": None}) for entry in absent.values()}):
        for sites in missing.values():  # whoever had its turn before may have stored some meanwhile
            sites[:] = [site for site in sites if site not in absent or not store.holds(absent[site])]
        unseen = _fill(runner, targets, requests, used, store, sources, missing, low_memory, batch_tokens)
    if unseen:
        names = ", ".join(sorted(unseen))
        _log.warning("statistics: no token reached %d of %d targets: %s", len(unseen), len(targets), names)
    counts = {name: tokens.learned for name, tokens in used.items()}
    return Statistics(store, sources, dict(requests), frozenset(unseen), counts=counts)


def _fill(
    runner: ResidentRunner,
    targets: Sequence[Target],
    requests: Mapping[str, frozenset[Request]],
    used: Mapping[str, Calibration],
    store: StatStore,
    sources: Mapping[str, Source],
    missing: dict[Pass, list[Site]],
    low_memory: bool,
    batch_tokens: int,
) -> set[str]:
    """Compute what is missing; give the names of experts that no token reached."""
    for request, target in missing.pop(_TRACE, []):
        name = source_name(request)
        _trace(runner, used[name], request, store, sources[name], entry_recipe(request, target, sources[name]))
    waves = [
        (need, wave) for need, sites in missing.items() if sites for wave in (shares(sites) if low_memory else [sites])
    ]
    # An expert sees some tokens only, so that padding could not be told from text: its batches hold none.
    padded = not any(is_nested(target.name) for target in targets)
    unseen: set[str] = set()
    for need, wave in tqdm(waves, desc="statistics", delay=2, disable=None if len(waves) > 1 else True, leave=False):
        batches = used[need.source].batches(1 if need.examples_alone else batch_tokens, padded=padded)
        totals = run_wave(runner, batches, need, wave, title="" if len(waves) > 1 else "statistics")
        for (request, target), total in zip(wave, totals, strict=True):
            if not _keep(store, request, target, total, sources[source_name(request)]):
                unseen |= {t.name for t in targets if (request, request.site(target)) in _sites(requests, t)}
    return unseen


def _absent(
    missing: Mapping[Pass, Sequence[Site]], sources: Mapping[str, Source], store: StatStore
) -> dict[Site, dict[str, Any]]:
    """Find the entries of sites that are not there at all, damaged or not."""
    sites = [site for some in missing.values() for site in some]
    entries = {site: entry_recipe(*site, sources[source_name(site[0])]) for site in sites}
    return {site: entry for site, entry in entries.items() if not store.holds(entry)}


def _trace(
    runner: ResidentRunner,
    data: Calibration,
    request: Request,
    store: StatStore,
    source: Source,
    entry: Mapping[str, Any],
) -> None:
    if isinstance(request, NeuronAttribution):
        keys, downs = attribute_texts(runner.model, data, request, store, source)
        for place, value in zip(_places(entry), places_of(downs), strict=True):
            store.put(place, value)
        store.put(entry, keys)
    else:
        assert isinstance(request, LayerEffect)
        store.put(entry, traced_effects(runner.model, data, request, store, source))


def _places(entry: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Name the entries that say which blocks an attribution is of, and which modules in them."""
    return {**entry, "part": "layers"}, {**entry, "part": "modules"}


def source_name(request: Request) -> str:
    """Name the data that a request uses: those of its role, or some of them.

    Args:
        request: The request.

    Returns:
        The name.
    """
    return request.data if request.examples is None else f"{request.data}, {request.examples} of each set"


def _used(requests: Mapping[str, frozenset[Request]], data: Mapping[DataRole, Calibration]) -> dict[str, Calibration]:
    """Take the examples that requests name of each set of the data; all of them under the role's name."""
    used: dict[str, Calibration] = dict(data.items())
    for request in frozenset[Request]().union(*requests.values()):
        if request.examples is not None and request.data in data:
            used[source_name(request)] = data[request.data].first(request.examples)
    return used


def source_of(model: PreTrainedModel, fingerprint: str, data: Calibration) -> Source:
    """Name what statistics are taken from; where labels are learned, the classifier's head is a part of it.

    Args:
        model: The base model.
        fingerprint: From :func:`keeptune.model.head.body_fingerprint`.
        data: The tokens.

    Returns:
        The source.
    """
    if data.labels is not None:
        fingerprint = content_key([fingerprint, head_fingerprint(model)])
    return Source(fingerprint, data.fingerprint, str(model.dtype))


def _keep(store: StatStore, request: Request, target: Target, total: Accumulator, source: Source) -> bool:
    """Store a finished sum; False when it is an expert's that no token reached."""
    try:
        store.put(entry_recipe(request, target, source), total.result(request.site(target)))
    except UnseenError:
        if not is_nested(target.name):
            raise
        return False
    return True


def _sites(requests: Mapping[str, frozenset[Request]], target: Target) -> set[tuple[Request, str]]:
    return {(request, request.site(target)) for request in requests[target.name]}


_TRACE = Pass("", examples_alone=False, labels=None, seed=0)  # traces make their own passes


def _missing(
    targets: Iterable[Target],
    requests: Mapping[str, frozenset[Request]],
    sources: Mapping[str, Source],
    store: StatStore,
) -> dict[Pass, list[Site]]:
    """List what the store lacks, by the pass it needs; inputs are taken along with gradients where both are needed."""
    missing: dict[Pass, list[Site]] = {}
    seen: set[tuple[Request, str]] = set()
    kept: Counter[str] = Counter()
    for target in targets:
        for request in sorted(requests[target.name], key=str):
            if (request, request.site(target)) in seen:
                continue
            seen.add((request, request.site(target)))
            if source_name(request) not in sources:
                raise StatisticsError(
                    target.name,
                    got=f"no {request.data} data",
                    wanted=f"{request.data} data for {request}",
                    next_step=f"Give the recipe a `{request.data}` section.",
                )
            # Attributions are stored text by text: each is looked at again.
            stored = store.get(entry_recipe(request, target, sources[source_name(request)]))
            if stored is None or isinstance(request, NeuronAttribution):
                seed = request.seed if request.labels else 0
                need = Pass(source_name(request), request.examples_alone, request.labels, seed)
                need = _TRACE if request.kind == "trace" else need
                missing.setdefault(need, []).append((request, target))
            else:
                kept[str(request)] += 1
    asked = Counter(str(request) for request, _ in seen)
    for name, count in kept.items():
        _log.info("statistics: %d of %d %s taken from %s", count, asked[name], name, store.folder)
    for need in [need for need in missing if need.labels is None and need is not _TRACE]:
        host = next(
            (n for n in missing if n.labels and (n.source, n.examples_alone) == (need.source, need.examples_alone)),
            None,
        )
        if host is not None:
            missing[host] += missing.pop(need)
    return missing
