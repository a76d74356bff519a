"""From a recipe to what its run would fetch, train and score, and what it would take; nothing is fetched or written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from keeptune.data import hub
from keeptune.data.completions import replayed
from keeptune.pipeline.dry_run import estimate
from keeptune.pipeline.dry_run.data_sizes import Lengths, Need, data_needs, on_the_hub, rows_of
from keeptune.pipeline.dry_run.estimate import ModelShape, model_shape
from keeptune.pipeline.dry_run.memory import JUDGED, Footprint
from keeptune.pipeline.job import Job
from keeptune.pipeline.machine import check_folder
from keeptune.recipe.schema import Recipe
from keeptune.statistics.neuron_attribution import NeuronAttribution
from keeptune.statistics.request import DataRole, ModelRequest, RowRequest


def describe(recipe: Recipe, shape: ModelShape | None = None) -> DryRun:
    """Returns what a run would fetch, train and score, and what it would take.

    Args:
        recipe: Loaded with ``fetch=keeptune.data.hub.cached``, so that nothing was fetched for it.
        shape: Of its model, if it is known already: the runs of a comparison share one.

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
    account = DryRun(job, shape, Lengths(job, shape.positions))
    account.plain()  # what cannot be counted is an error here
    return account


def _check(job: Job) -> None:
    """Checks as a run would, or what shows of it while something is to be fetched."""
    files, fetched = data_needs(job.recipe)
    elsewhere = fetched or any(need.name.startswith(hub.PREFIX) for need in files)
    if _has_weights(Path(job.recipe.model).expanduser()) and not elsewhere:
        job.check()
        return
    check_folder("output", job.output)
    check_folder("store", job.store.folder)
    job.check_needs()
    for need in files:
        if not Path(need.name).is_dir():
            rows_of(need.name, 1)


def _has_weights(folder: Path) -> bool:
    """Whether a model's folder has more than its config, which is enough for its shape."""
    return any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin"))


def _labels(job: Job) -> int | None:
    """Returns the number of outputs of a classifier's head; two where only the data could say."""
    task = job.recipe.task
    if job.kind.standard:
        return None
    if task.kind == "regression":
        return 1
    if task.labels is not None or on_the_hub(job.recipe):
        return len(task.labels or ("", ""))
    assert job.head is not None
    return len(job.head.labels)


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
class DryRun(Footprint):
    """The account of a run: what would be fetched, trained and scored, with memory (bytes) and work (operations)."""

    def plain(self) -> dict[str, Any]:
        """Returns the account as plain values, for ``--json``: bytes and operations."""
        memory, disk = (
            {name: {"total": sum(parts.values()), "parts": parts} for name, parts in amounts.items()}
            for amounts in (self.memory, self.disk)
        )
        return {
            "device": self.job.recipe.device,
            "model": {key: getattr(self.shape, key) for key in ("name", "source", "dtype", "parameters")},
            "needs": [asdict(need) for need in self.needs],
            "train": asdict(self.train) | {"tokens": self.train.tokens},
            "score": [asdict(one) for one in self.score],
            "memory": memory | {"peak": {"stage": self.peak, "total": memory[self.peak]["total"]}},
            "disk": disk,
            "operations": {"total": self.whole_work, "parts": self.work, "bounds": sorted(self.bounds)},
            "notes": self.notes,
        }

    @property
    def peak(self) -> str:
        """The stage that takes most memory, and so what the run needs."""
        return max(self.memory, key=lambda stage: sum(self.memory[stage].values()))

    @property
    def whole_work(self) -> float | None:
        """Work of the whole run; None where a part is not known."""
        known = [work for work in self.work.values() if work is not None]
        return sum(known) if len(known) == len(self.work) else None

    @property
    def bounds(self) -> frozenset[str]:
        """Which parts of the work are upper bounds."""
        measured = {
            "knowledge": not self.job.generations,
            "train": self.train.measured,
            "score": all(one.measured for one in self.score),
            "statistics": all(self.lengths.calibration(request.data).measured for request, _ in self.sites),
        }
        return frozenset(part for part, counted in measured.items() if not counted)

    @property
    def notes(self) -> list[str]:
        """What the estimates leave out."""
        traced = any(isinstance(r, ModelRequest) and not isinstance(r, NeuronAttribution) for r, _ in self.sites)
        notes = ["the time of causal tracing is not estimated"] if traced else []
        if own := self.job.generations.values():
            texts = f"{sum(part.count for part in own)} texts, at most {sum(part.tokens for part in own):,} tokens"
            notes.append(f"the base first writes its own knowledge, {texts}, unless the store has them")
        if self.train.assumed:
            notes.append("data decide some ranks; counted are those that are planned on average")
        if not self.whole:
            notes.append("decompositions (SVD, eigenvectors) are not in the times")
        return notes

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """The model, data and benchmarks that the run needs."""
        files, fetched = data_needs(self.job.recipe)
        name, revision = self.job.recipe.model, self.job.recipe.revision
        path = Path(name).expanduser()
        # On the hub weights are in the dtype of the config, whatever that of the recipe.
        there, size = self.shape.source == "the hub's cache", self.shape.stored
        if path.is_file():
            there, size, revision = True, path.stat().st_size, None
        elif path.is_dir():
            there = _has_weights(path)
            size = sum(file.stat().st_size for file in path.glob("*.safetensors")) if there else size
        return Need("model", name, at_hand=there, size=size, revision=revision), *files, *fetched

    @cached_property
    def train(self) -> Trained:
        """What is trained."""
        recipe, rows, counts = self.job.recipe, self.lengths.rows, self.lengths.task
        keys = "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"
        batch, accumulation, most = (int(self.argument(key)) for key in keys)
        beside = recipe.task.kind in JUDGED  # knowledge, which then takes no place of its own
        examples = None if rows is None else rows + (0 if beside else replayed(rows, recipe.replay))
        steps, loss, step = None, self.job.loss, batch * accumulation
        if examples is not None or most > 0:
            fewer = (examples or 0) % step if loss is not None and loss.reads == "own texts" else 0  # no smaller step
            whole, epochs = (examples or 0) - fewer, self.argument("num_train_epochs")
            steps = estimate.optimizer_steps(
                whole, batch=batch, accumulation=accumulation, epochs=epochs, max_steps=most
            )
        return Trained(
            method=self.job.method.name,
            targets=len(self.used),
            roles=tuple(dict.fromkeys(target.role for target in self.used)),
            numbers=self.trained,
            assumed=any(size.assumed for size in self.sizes.values()),
            examples=examples,
            batch=step,
            steps=steps,
            length=sum(counts) / len(counts) if counts else float(self.lengths.most),
            measured=bool(counts),
        )

    @cached_property
    def work(self) -> dict[str, float | None]:
        """Operations of ``knowledge`` (writing it), ``statistics``, ``train`` and ``score``."""
        own = self.job.generations.values()
        known = [(one.items, one.length) for one in self.score if one.items is not None]
        scoring = sum(2 * estimate.forward_flops(self.shape, items * length, length) for items, length in known)
        longest = max((part.max_length for part in own), default=0)
        return {
            "knowledge": estimate.forward_flops(self.shape, sum(part.tokens for part in own), longest),
            "statistics": self._statistics_work(),
            "train": self._training_work(),
            "score": scoring if len(known) == len(self.score) else None,
        }

    def _training_work(self) -> float | None:
        train, loss = self.train, self.job.loss
        if train.tokens is None:
            return None
        learned, read = JUDGED.get(self.job.recipe.task.kind, (1, 0))
        if loss is not None:  # SDFT writes, and the teacher reads that with the answer before it
            read += {"base": 1, "own texts": 3}.get(loss.reads, 0)
        training = estimate.training_flops(
            self.shape,
            train.tokens * learned,
            train.length,
            trained=train.numbers,
            whole=self.whole,
            checkpointing=self.checkpointing,
        )
        return training + read * estimate.forward_flops(self.shape, train.tokens, train.length)

    def _statistics_work(self) -> float:
        """Sums a pass forward, one backward for gradients, and 2 operations for each number and token.

        An attribution takes a pass, then a token at each of its steps through half of the blocks, forth and back.
        """
        sums: dict[tuple[DataRole, bool], int] = {}
        for (request, _), target in self.sites.items():
            if isinstance(request, RowRequest):
                key = request.data, request.loss is not None
                sums[key] = sums.get(key, 0) + request.numbers(target)
        work, shape = 0.0, self.shape
        for (role, backward), numbers in sums.items():
            data = self.lengths.calibration(role)
            tokens = data.texts * data.mean
            work += (2 if backward else 1) * estimate.forward_flops(shape, tokens, data.mean) + 2.0 * numbers * tokens
        for trace in {request for request, _ in self.sites if isinstance(request, NeuronAttribution)}:
            data = self.lengths.calibration(trace.data)
            tokens = (trace.examples or data.texts) * (data.mean + trace.steps * shape.blocks)
            work += estimate.forward_flops(shape, tokens, data.mean)
        return work
