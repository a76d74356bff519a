"""From a recipe to what its run would fetch, train and score, and what it would take; nothing is fetched or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from keeptune.adapter.trained_head import trained_beside
from keeptune.core.target import Target
from keeptune.data import hub
from keeptune.data.replay import replayed
from keeptune.methods.base import Method, Size
from keeptune.pipeline.dry_run import estimate
from keeptune.pipeline.dry_run.account import DryRun, Need, Scored, Trained
from keeptune.pipeline.dry_run.data_sizes import Lengths, data_needs, on_the_hub, rows_of
from keeptune.pipeline.dry_run.memory import JUDGED, Footprint, checkpointing, plan_without_numbers
from keeptune.pipeline.dry_run.model_shapes import ModelShape, model_shape
from keeptune.pipeline.job import Job
from keeptune.pipeline.machine import check_folder
from keeptune.pipeline.planning import penalties_of
from keeptune.recipe.schema import Recipe
from keeptune.statistics.neuron_attribution import NeuronAttribution
from keeptune.statistics.request import DataRole, ModelRequest, Request, RowRequest

_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3, "max_steps": -1}


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
    return _Account(job, shape, Lengths(job, shape.positions)).dry_run()


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
class _Account:
    """The parts of the account of one recipe."""

    job: Job
    shape: ModelShape
    lengths: Lengths

    def dry_run(self) -> DryRun:
        recipe, train = self.job.recipe, self._train()
        score = tuple(self.lengths.scored(one) for one in recipe.evaluate)
        statistics, notes = self._statistics()
        counted = all(self.lengths.calibration(request.data).measured for request, _ in self._sites)
        own = self.job.generations.values()
        measured = {
            "knowledge": not own,
            "train": train.measured,
            "score": all(one.measured for one in score),
            "statistics": counted,
        }
        written = sum(part.tokens for part in own)
        if own:
            texts = f"{sum(part.count for part in own)} texts, at most {written:,} tokens"
            notes.append(f"the base first writes its own knowledge, {texts}, unless the store has them")
        if train.assumed:
            notes.append("data decide some ranks; counted are those that are planned on average")
        if not self._whole:
            notes.append("decompositions (SVD, eigenvectors) are not in the times")
        files, fetched = data_needs(recipe)
        footprint = Footprint(
            self.job, self.shape, self.lengths, self._sizes, self._sites, score, train.numbers, self._batch
        )
        return DryRun(
            device=recipe.device,
            shape=self.shape,
            quantised=bool(footprint.quantization),
            needs=(self._base(), *files, *fetched),
            train=train,
            score=score,
            memory=footprint.memory(),
            disk=footprint.disk(),
            work={
                "knowledge": estimate.forward_flops(self.shape, written, max((p.max_length for p in own), default=0)),
                "statistics": statistics,
                **self._work(train, score),
            },
            bounds=frozenset(part for part, known in measured.items() if not known),
            notes=tuple(notes),
        )

    @property
    def _whole(self) -> bool:
        return bool(self.job.method.scope == "all")

    def _base(self) -> Need:
        name, revision = self.job.recipe.model, self.job.recipe.revision
        folder = Path(name).expanduser()
        if folder.is_dir():
            held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            whole = _has_weights(folder)
            return Need("model", name, at_hand=whole, size=held if whole else self.shape.stored, revision=revision)
        if folder.is_file():
            return Need("model", name, at_hand=True, size=folder.stat().st_size)
        # On the hub weights are in the dtype of the config, whatever that of the recipe.
        cached = self.shape.source == "the hub's cache"
        return Need("model", name, at_hand=cached, size=self.shape.stored, revision=revision)

    @property
    def _method(self) -> Method:
        method: Method = self.job.method.fitted(self.shape.blocks)
        return method

    @cached_property
    def _sizes(self) -> dict[Target, Size]:
        """What the method trains of each target; empty where all weights are trained."""
        method, recipe = self._method, self.job.recipe
        if self._whole:
            return {}
        downs = self.shape.downs if method.rows_of_downs else frozenset[str]()
        targets = self.shape.targets(recipe.targets, recipe.layers)
        return {target: method.size(target, downs) for target in targets}

    @property
    def _used(self) -> list[Target]:
        return [target for target, size in self._sizes.items() if size.rank]

    def _beside(self) -> int:
        """Counts what is trained beside the factors, and refuses what is not there."""
        recipe, model = self.job.recipe, self.shape.model
        if not recipe.modules_to_save and not recipe.trainable_token_indices:
            return 0
        targets = [target.name for target in self._used]
        fields = trained_beside(model, recipe.modules_to_save, recipe.trainable_token_indices, targets)
        whole = (model.get_submodule(name).parameters() for name in fields.get("modules_to_save", ()))
        count: int = sum(parameter.numel() for own in whole for parameter in own)
        for name, ids in fields.get("trainable_token_indices", {}).items():
            count += len(ids) * cast(Tensor, model.get_submodule(name).weight).shape[1]
        return count

    def _train(self) -> Trained:
        recipe = self.job.recipe
        values = recipe.arguments
        batch, accumulation, epochs, most = (_value(values, key) for key in _STEP)
        rows = self.lengths.rows
        beside = recipe.task.kind in JUDGED  # knowledge, which then takes no place of its own
        examples = None if rows is None else rows + (0 if beside else replayed(rows, recipe.replay))
        steps = None
        if examples is not None or most > 0:
            steps = estimate.optimizer_steps(
                examples or 0, batch=int(batch), accumulation=int(accumulation), epochs=epochs, max_steps=int(most)
            )
        numbers = sum(size.trained for size in self._sizes.values()) + self.shape.head_parameters + self._beside()
        counts = self.lengths.task
        return Trained(
            method=self.job.method.name,
            targets=len(self._used),
            roles=tuple(dict.fromkeys(target.role for target in self._used)),
            numbers=self.shape.parameters if self._whole else numbers,
            assumed=any(size.assumed for size in self._sizes.values()),
            examples=examples,
            batch=int(batch * accumulation),
            steps=steps,
            length=sum(counts) / len(counts) if counts else float(self.lengths.most),
            measured=bool(counts),
        )

    def _work(self, train: Trained, score: Sequence[Scored]) -> dict[str, float | None]:
        """Returns the work of training, and of scoring base and adapter."""
        training = None
        learned, read = JUDGED.get(self.job.recipe.task.kind, (1, 0))
        if train.tokens is not None:
            training = estimate.training_flops(
                self.shape,
                train.tokens * learned,
                train.length,
                trained=train.numbers,
                whole=self._whole,
                checkpointing=checkpointing(self.job.recipe.train),
            )
            training += read * estimate.forward_flops(self.shape, train.tokens, train.length)
            if self.job.loss is not None and self.job.loss.reads == "base":
                training += estimate.forward_flops(self.shape, train.tokens, train.length)
        known = [(one.items, one.length) for one in score if one.items is not None]
        scoring = sum(2 * estimate.forward_flops(self.shape, items * length, length) for items, length in known)
        return {"train": training, "score": scoring if len(known) == len(score) else None}

    @property
    def _batch(self) -> int:
        """Examples in a forward pass of training."""
        learned = JUDGED.get(self.job.recipe.task.kind, (1, 0))[0]
        return learned * int(_value(self.job.recipe.train, "per_device_train_batch_size"))

    @cached_property
    def _sites(self) -> dict[tuple[Request, str], Target]:
        """Returns the statistics that method and penalties need, once for each site."""
        needed: dict[tuple[Request, str], Target] = {}
        penalties = penalties_of(self.job.method, self.job.penalties)
        for target, size in self._sizes.items():
            requests: set[Request] = set(self._method.requests(target))
            for one in penalties if size.rank else ():
                requests |= one.requests(plan_without_numbers(target, size))
            for request in requests:
                needed.setdefault((request, request.site(target)), target)
        return needed

    def _statistics(self) -> tuple[float | None, list[str]]:
        """Returns the work of the statistics, and notes of what is left out."""
        sums: dict[tuple[DataRole, bool], list[int]] = {}
        traces: set[ModelRequest] = set()
        for (request, _), target in self._sites.items():
            if isinstance(request, ModelRequest):
                traces.add(request)
            elif isinstance(request, RowRequest):
                sums.setdefault((request.data, request.kind != "forward"), []).append(request.numbers(target))
        work, notes = 0.0, []
        for (role, backward), numbers in sums.items():
            data = self.lengths.calibration(role)
            work += estimate.statistics_flops(
                self.shape, data.texts * data.mean, data.mean, numbers=sum(numbers), backward=backward
            )
        for trace in traces:
            data = self.lengths.calibration(trace.data)
            if isinstance(trace, NeuronAttribution):
                work += estimate.attribution_flops(self.shape, trace.examples or data.texts, data.mean, trace.steps)
            else:
                notes.append("the time of causal tracing is not estimated")
        return work, notes


def _value(values: Mapping[str, Any], key: str) -> float:
    given = values.get(key)
    return float(_STEP[key] if given is None else given)
