"""From a recipe to what its run would fetch, train and score, and what it would take; nothing is fetched or written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keeptune.adapter.anchor import resolve
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.data import hub
from keeptune.data.replay import replayed
from keeptune.methods.base import Size
from keeptune.methods.combined import parts_of, tuned_roles
from keeptune.pipeline.dry_run import estimate
from keeptune.pipeline.dry_run.account import DryRun, Named, Scored, Trained
from keeptune.pipeline.dry_run.data_sizes import Lengths, fetched_benchmarks, files_of, needs_of, rows_of
from keeptune.pipeline.dry_run.model_shapes import ModelShape, model_shape
from keeptune.pipeline.job import Job
from keeptune.pipeline.machine import check_folder
from keeptune.pipeline.planning import scoped_penalties
from keeptune.recipe.schema import Recipe
from keeptune.statistics.neuron_attribution import NeuronAttribution
from keeptune.statistics.request import DataRole, ModelRequest, Request, RowRequest
from keeptune.training.trainer import check_arguments

__all__ = ["describe"]

_ADAM = 8  # bytes of AdamW's two float32 states, for each trained number
_STATES = {"sgd": 0, "adafactor": 0, "8bit": 2, "lion": 4}
_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3, "max_steps": -1}
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


def describe(recipe: Recipe, shape: ModelShape | None = None) -> DryRun:
    """Say what a run would fetch, train and score, and what it would take.

    Args:
        recipe: Loaded with ``fetch=keeptune.data.hub.cached``, so that nothing was fetched for it.
        shape: Of its model, if it is known already: the runs of a comparison share one.

    Returns:
        The account.

    Raises:
        KeeptuneError: The recipe could not run: the same errors as of a run, as far as they show without the data.
    """
    job = Job(recipe)
    _check(job)
    if shape is None:
        shape = model_shape(
            recipe.model,
            dtype=recipe.dtype,
            revision=recipe.revision,
            labels=_labels(job),
            trust_remote_code=recipe.trust_remote_code,
        )
    return _Account(job, shape, Lengths(job, shape.positions)).dry_run()


def _check(job: Job) -> None:
    """Check as a run would, or what shows of it while something is to be fetched."""
    files = files_of(job.recipe)
    elsewhere = any(named.name.startswith(hub.PREFIX) for named in files) or fetched_benchmarks(job.recipe)
    if Path(job.recipe.model).expanduser().is_dir() and not elsewhere:
        job.check()
        return
    check_folder("output", job.output)
    check_folder("store", job.store.folder)
    job.check_needs()
    for named in files:
        if not Path(named.name).is_dir():
            rows_of(named.name, 1)


def _labels(job: Job) -> int | None:
    """Count the outputs of a classifier's head; two where only the data could say."""
    task = job.recipe.task
    if task.kind == "completion":
        return None
    if task.kind == "regression":
        return 1
    if task.labels is not None or task.train.startswith(hub.PREFIX):
        return len(task.labels or ("", ""))
    assert job.head is not None
    return len(job.head.labels)


@dataclass(frozen=True)
class _Account:
    """The parts of the account of one recipe."""

    job: Job
    shape: ModelShape
    lengths: Lengths

    def dry_run(self) -> DryRun:
        """Put the parts together."""
        recipe = self.job.recipe
        sizes = {} if self._whole else self._sizes()
        train = self._train(sizes)
        score = tuple(self.lengths.scored(one) for one in recipe.evaluate)
        sums, statistics, untold = self._statistics(sizes)
        measured = {"train": train.measured, "score": all(one.measured for one in score), "statistics": not statistics}
        return DryRun(
            shape=self.shape,
            needs=(self._base(), *needs_of(recipe)),
            train=train,
            score=score,
            memory=self._memory(sizes, train),
            sums=sums,
            cache=self._cache(),
            work={"statistics": statistics, "train": self._training(train), "score": self._scoring(score)},
            bounds=frozenset(part for part, known in measured.items() if not known),
            notes=(*untold, *_notes(train, whole=self._whole)),
        )

    @property
    def _whole(self) -> bool:
        return bool(self.job.method.scope == "all")

    @property
    def _checkpointing(self) -> bool:
        return any(self.job.recipe.train.get(key) for key in _CHECKPOINTING)

    def _base(self) -> Named:
        recipe = self.job.recipe
        folder = Path(recipe.model).expanduser()
        if folder.is_dir():
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            return Named("model", recipe.model, recipe.revision, size, at_hand=True)
        # On the hub weights are in the dtype that the config says, whatever the recipe asks for.
        return Named("model", recipe.model, recipe.revision, self.shape.stored, self.shape.source == "the hub's cache")

    def _sizes(self) -> dict[Target, Size]:
        """Count what each target's method trains."""
        method, recipe = self.job.method, self.job.recipe
        targets = self.shape.targets(tuned_roles(method, recipe.targets), recipe.layers)
        rows_of_downs = any(part.method.rows_of_downs for part in parts_of(method))
        downs = self.shape.downs if rows_of_downs else frozenset[str]()
        return {target: method.size(target, downs) for target in targets}

    def _train(self, sizes: Mapping[Target, Size]) -> Trained:
        recipe = self.job.recipe
        values = check_arguments(recipe.train)
        batch, accumulation, epochs, most = (_value(values, key) for key in _STEP)
        rows = rows_of(recipe.task.train, recipe.task.examples)
        examples = None if rows is None else rows + replayed(rows, recipe.replay)
        steps = None
        if examples is not None or most > 0:
            steps = estimate.optimizer_steps(
                examples or 0, batch=int(batch), accumulation=int(accumulation), epochs=epochs, max_steps=int(most)
            )
        used = [target for target, size in sizes.items() if size.rank]
        numbers = sum(size.trained for size in sizes.values()) + self.shape.head_parameters
        counts = self.lengths.task
        return Trained(
            method=self.job.method.name,
            targets=len(used),
            roles=tuple(dict.fromkeys(target.role for target in used)),
            numbers=self.shape.parameters if self._whole else numbers,
            assumed=any(size.assumed for size in sizes.values()),
            examples=examples,
            batch=int(batch * accumulation),
            steps=steps,
            length=sum(counts) / len(counts) if counts else float(self.lengths.most),
            measured=bool(counts),
        )

    def _memory(self, sizes: Mapping[Target, Size], train: Trained) -> estimate.TrainingMemory:
        recipe = self.job.recipe
        twin = resolve(recipe.anchor, getattr(torch, self.shape.dtype)) == "twin"
        frozen = sum(size.frozen + (_both(t, size) if size.anchored and twin else 0) for t, size in sizes.items())
        kept = estimate.activation_bytes(
            self.shape,
            self.shape.linear if self._whole else [target for target, size in sizes.items() if size.rank],
            ranks=sum(size.rank for size in sizes.values()),
            batch=int(_value(recipe.train, "per_device_train_batch_size")),
            length=max(self.lengths.task, default=self.lengths.most),  # a batch is padded to its longest
            checkpointing=self._checkpointing,
            whole=self._whole,
        )
        return estimate.training_memory(
            self.shape,
            trained=train.numbers,
            frozen=frozen,
            whole=self._whole,
            states=_states(recipe.train),
            activations=kept,
        )

    def _training(self, train: Trained) -> float | None:
        if train.tokens is None:
            return None
        return estimate.training_flops(
            self.shape,
            train.tokens,
            train.length,
            trained=train.numbers,
            whole=self._whole,
            checkpointing=self._checkpointing,
        )

    def _scoring(self, score: Sequence[Scored]) -> float | None:
        """Add up the work of scoring base and adapter."""
        total = 0.0
        for one in score:
            if one.items is None:
                return None
            total += 2 * estimate.forward_flops(self.shape, one.items * one.length, one.length)
        return total

    def _cache(self) -> int:
        """Count the keys and values of the largest batch that may be generated."""
        return max(
            (
                estimate.cache_bytes(self.shape, batch=one.batch_size, length=self.lengths.longest(one))
                for one in self.job.recipe.evaluate
            ),
            default=0,
        )

    def _requests(self, sizes: Mapping[Target, Size]) -> dict[tuple[Request, str], Target]:
        """List the statistics that method and penalties need, once for each site."""
        found: dict[tuple[Request, str], Target] = {}
        asked_for = scoped_penalties(self.job.method, self.job.penalties)
        for target, size in sizes.items():
            asked: set[Request] = set()
            for part in parts_of(self.job.method):
                if not part.targets or target.role in part.targets:
                    asked |= part.method.requests(target)
            for one in asked_for if size.rank else ():
                if one.holds(target):
                    asked |= one.penalty.requests(_without_numbers(target, size))
            for request in asked:
                found.setdefault((request, request.site(target)), target)
        return found

    def _statistics(self, sizes: Mapping[Target, Size]) -> tuple[int, float | None, list[str]]:
        """Give the memory of the sums, the work, and what could not be told."""
        sums: dict[tuple[DataRole, bool], list[int]] = {}
        traces: set[ModelRequest] = set()
        for (request, _), target in self._requests(sizes).items():
            if isinstance(request, ModelRequest):
                traces.add(request)
            elif isinstance(request, RowRequest):
                sums.setdefault((request.data, request.kind != "forward"), []).append(request.numbers(target))
        work, untold = 0.0, []
        for (role, backward), numbers in sums.items():
            texts, length = self.lengths.calibration(role)
            passes = math.ceil(sum(numbers) / max(numbers)) if self.job.recipe.low_memory else 1
            work += estimate.statistics_flops(
                self.shape, texts * length, length, numbers=sum(numbers), backward=backward, passes=passes
            )
        for trace in traces:
            texts, length = self.lengths.calibration(trace.data)
            if isinstance(trace, NeuronAttribution):
                work += estimate.attribution_flops(self.shape, trace.examples or texts, length, trace.steps)
            else:
                untold.append("the time of causal tracing is not estimated")
        held = [number for numbers in sums.values() for number in numbers]
        return estimate.sums_bytes(held, low_memory=self.job.recipe.low_memory), work, untold


def _without_numbers(target: Target, size: Size) -> TargetPlan:
    """Make a target's plan without its numbers: penalties ask for statistics by its shape."""
    with torch.device("meta"):
        init = LowRank(B=torch.zeros(target.out_features, size.rank), A=torch.zeros(size.rank, target.in_features))
    return TargetPlan(target, Decision(size.rank), init, 1.0, frozenset({"A", "B"}))


def _value(values: Mapping[str, Any], key: str) -> float:
    given = values.get(key)
    return float(_STEP[key] if given is None else given)


def _states(values: Mapping[str, Any]) -> int:
    name = str(values.get("optim") or "adamw")
    return next((size for word, size in _STATES.items() if word in name), _ADAM)


def _both(target: Target, size: Size) -> int:
    return size.rank * (target.out_features + target.in_features)


def _notes(train: Trained, *, whole: bool) -> Iterable[str]:
    if train.assumed:
        yield "data decide some ranks; counted are those that are planned on average"
    if not whole:
        yield "decompositions (SVD, eigenvectors) are not in the times"
