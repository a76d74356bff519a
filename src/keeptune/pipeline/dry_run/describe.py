"""From a recipe to what its run would fetch, train and score, and what it would take; nothing is fetched or written."""

from __future__ import annotations

from pathlib import Path

from keeptune.data import hub
from keeptune.data.completions import replayed
from keeptune.pipeline.dry_run import estimate
from keeptune.pipeline.dry_run.account import DryRun, Need, Trained
from keeptune.pipeline.dry_run.data_sizes import Lengths, data_needs, on_the_hub, rows_of
from keeptune.pipeline.dry_run.memory import JUDGED, Footprint
from keeptune.pipeline.dry_run.model_shapes import ModelShape, model_shape
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
    return _account(Footprint(job, shape, Lengths(job, shape.positions)))


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


def _account(held: Footprint) -> DryRun:
    job, shape = held.job, held.shape
    train = _trained(held)
    statistics, notes = _statistics(held)
    own = job.generations.values()
    measured = {
        "knowledge": not own,
        "train": train.measured,
        "score": all(one.measured for one in held.score),
        "statistics": all(held.lengths.calibration(request.data).measured for request, _ in held.sites),
    }
    written = sum(part.tokens for part in own)
    if own:
        texts = f"{sum(part.count for part in own)} texts, at most {written:,} tokens"
        notes.append(f"the base first writes its own knowledge, {texts}, unless the store has them")
    if train.assumed:
        notes.append("data decide some ranks; counted are those that are planned on average")
    if not held.whole:
        notes.append("decompositions (SVD, eigenvectors) are not in the times")
    files, fetched = data_needs(job.recipe)
    known = [(one.items, one.length) for one in held.score if one.items is not None]
    scoring = sum(2 * estimate.forward_flops(shape, items * length, length) for items, length in known)
    return DryRun(
        device=job.recipe.device,
        shape=shape,
        quantised=bool(held.quantization),
        needs=(_base(job, shape), *files, *fetched),
        train=train,
        score=held.score,
        memory=held.memory(),
        disk=held.disk(),
        work={
            "knowledge": estimate.forward_flops(shape, written, max((p.max_length for p in own), default=0)),
            "statistics": statistics,
            "train": _training(held, train),
            "score": scoring if len(known) == len(held.score) else None,
        },
        bounds=frozenset(part for part, counted in measured.items() if not counted),
        notes=tuple(notes),
    )


def _base(job: Job, shape: ModelShape) -> Need:
    name, revision = job.recipe.model, job.recipe.revision
    folder = Path(name).expanduser()
    if folder.is_dir():
        held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        whole = _has_weights(folder)
        return Need("model", name, at_hand=whole, size=held if whole else shape.stored, revision=revision)
    if folder.is_file():
        return Need("model", name, at_hand=True, size=folder.stat().st_size)
    # On the hub weights are in the dtype of the config, whatever that of the recipe.
    return Need("model", name, at_hand=shape.source == "the hub's cache", size=shape.stored, revision=revision)


def _trained(held: Footprint) -> Trained:
    recipe, rows = held.job.recipe, held.lengths.rows
    keys = "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"
    batch, accumulation, most = (int(held.argument(key)) for key in keys)
    beside = recipe.task.kind in JUDGED  # knowledge, which then takes no place of its own
    examples = None if rows is None else rows + (0 if beside else replayed(rows, recipe.replay))
    steps, loss, step = None, held.job.loss, batch * accumulation
    if examples is not None or most > 0:
        fewer = (examples or 0) % step if loss is not None and loss.reads == "own texts" else 0  # no smaller step
        whole = (examples or 0) - fewer
        epochs = held.argument("num_train_epochs")
        steps = estimate.optimizer_steps(whole, batch=batch, accumulation=accumulation, epochs=epochs, max_steps=most)
    counts = held.lengths.task
    return Trained(
        method=held.job.method.name,
        targets=len(held.used),
        roles=tuple(dict.fromkeys(target.role for target in held.used)),
        numbers=held.trained,
        assumed=any(size.assumed for size in held.sizes.values()),
        examples=examples,
        batch=step,
        steps=steps,
        length=sum(counts) / len(counts) if counts else float(held.lengths.most),
        measured=bool(counts),
    )


def _training(held: Footprint, train: Trained) -> float | None:
    """Returns the work of training."""
    if train.tokens is None:
        return None
    job, shape = held.job, held.shape
    learned, read = JUDGED.get(job.recipe.task.kind, (1, 0))
    if job.loss is not None:  # SDFT writes, and the teacher reads that with the answer before it
        read += {"base": 1, "own texts": 3}.get(job.loss.reads, 0)
    training = estimate.training_flops(
        shape,
        train.tokens * learned,
        train.length,
        trained=train.numbers,
        whole=held.whole,
        checkpointing=held.checkpointing,
    )
    return training + read * estimate.forward_flops(shape, train.tokens, train.length)


def _statistics(held: Footprint) -> tuple[float, list[str]]:
    """Returns the work of the statistics, and notes of what is left out.

    Sums of products take a pass forward, one backward for gradients, and 2 operations for each number and token. An
    attribution takes a pass, then a token at each of its steps through half of the blocks, forth and back, for each.
    """
    sums: dict[tuple[DataRole, bool], int] = {}
    traces: set[ModelRequest] = set()
    for (request, _), target in held.sites.items():
        if isinstance(request, ModelRequest):
            traces.add(request)
        elif isinstance(request, RowRequest):
            key = request.data, request.kind != "forward"
            sums[key] = sums.get(key, 0) + request.numbers(target)
    work, notes, shape = 0.0, [], held.shape
    for (role, backward), numbers in sums.items():
        data = held.lengths.calibration(role)
        tokens = data.texts * data.mean
        work += (2 if backward else 1) * estimate.forward_flops(shape, tokens, data.mean) + 2.0 * numbers * tokens
    for trace in traces:
        data = held.lengths.calibration(trace.data)
        if isinstance(trace, NeuronAttribution):
            tokens = (trace.examples or data.texts) * (data.mean + trace.steps * shape.blocks)
            work += estimate.forward_flops(shape, tokens, data.mean)
        else:
            notes.append("the time of causal tracing is not estimated")
    return work, notes
