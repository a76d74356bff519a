"""keeptune run, of a recipe with stages: task after task on one model, each an ordinary run.

    base -> stage 1 -> base + change 1 -> stage 2 -> base + changes 1, 2 -> ... -> one adapter for the base

Under the output: ``stages/<stage>`` is the run of a stage on the model as it then stood, ``after/<stage>`` the adapter
for the original base after it, with its scores, ``models/<stage>`` the whole model that the next stage starts from
(removed when that is done), ``adapter`` the product. A stage that is done under the right key is not repeated, and
within a stage everything goes on as in any run.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from keeptune.adapter.export import format_for
from keeptune.adapter.load import load_adapter
from keeptune.adapter.probe import gap_to, logits_of
from keeptune.core.artefact import EXPORT, checked, content_key, file_fingerprint, read_json, seal
from keeptune.core.errors import ArtefactError, ExportError, ModelError, placed
from keeptune.core.locks import owned
from keeptune.core.processes import by_first, held_by_first
from keeptune.core.weights import is_quantised
from keeptune.evaluation.model_pairs import KeptAnswers
from keeptune.experiments.sequence.joined_changes import add_changes, joined, read_changes, write_adapter, write_whole
from keeptune.experiments.sequence.sequence_record import write_record
from keeptune.experiments.sequence.stages_section import Stage, StageSequence
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.export import export_stage
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import plan_stage, start
from keeptune.pipeline.scoring import evaluate_stage, find_result, result_fingerprint
from keeptune.pipeline.training import train_stage
from keeptune.recipe.sections import ExportSpec, Knowledge
from keeptune.report.pages.sequence_page import write_sequence

_log = logging.getLogger(__name__)
_NOT_IN_KEY = ("model", "output", "store", "store_limit", "device", "evaluate", "export", "reference", "memory")


@dataclass(frozen=True)
class _Course:
    sequence: StageSequence
    base: Job
    dtype: torch.dtype
    output: Path
    wanted: ExportSpec


@dataclass(frozen=True)
class _Done:
    """The ``result`` of its run, for the model it started from, the ``product`` for the base, and the record."""

    result: Path
    product: Path
    record: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether the product is a whole model."""
        return self.product.name == "merged"


def run_sequence(sequence: StageSequence) -> dict[str, Any]:
    """Runs all stages, or what is left of them, scores after each, and writes the product.

    Returns:
        The record, as in ``sequence.json``.

    Raises:
        KeeptuneError: What the user can correct; the message names the stage.
    """
    base = Job(sequence.whole)
    model = base.base()
    _check(sequence, model)
    course = _Course(sequence, base, model.dtype, sequence.output, sequence.whole.export)
    del model
    with held_by_first(owned(sequence.output)):
        done: list[_Done] = []
        scores: list[list[dict[str, Any]]] = []
        for stage in sequence.stages:
            done.append(placed(f"stage {stage.name}", partial(_stage, course, stage, tuple(done))))
            scores.append(placed(f"stage {stage.name}", partial(_scores, course, done[-1].product.parent)))
        final, exported = by_first(lambda: _final(course, done[-1]))
        cut = exported is not None and (exported["error"] > 0 or exported["format"] == "merged")
        final_scores = _scores(course, sequence.output) if cut else None

        def write() -> dict[str, Any]:
            stages = [one.record | {"run": str(one.result.parent), "product": str(one.product)} for one in done]
            record = write_record(sequence, stages, scores, adapter=final, export=exported, final=final_scores)
            page, numbers = sequence.output / "report.html", sequence.output / "sequence.json"
            if not page.is_file() or page.stat().st_mtime < numbers.stat().st_mtime:
                write_sequence(record, page)
            return record

        return by_first(write)


def _check(sequence: StageSequence, model: PreTrainedModel) -> None:
    if is_quantised(model):
        raise ModelError(
            f"model {sequence.whole.model}",
            got="a quantised base for a sequence of stages",
            wanted="one in 16 or 32 bits: what a stage changed is added to its weights",
            next_step="Leave `quantization` out, or run the tasks one by one.",
        )
    for stage in sequence.stages:
        job = Job(stage.recipe)
        placed(f"stage {stage.name}", job.check)
        placed(f"stage {stage.name}", partial(find_targets, model, stage.recipe.targets, stage.recipe.layers))


def _stage(course: _Course, stage: Stage, done: Sequence[_Done]) -> _Done:
    after, run = course.output / "after" / stage.folder, course.output / "stages" / stage.folder
    stored = Stored(f"stage {stage.name}", after / "stage.json", _key(course, stage, done))
    record = stored.read()
    if record is None or not by_first(partial(_is_whole, run / record["result"])):
        start_from = by_first(lambda: _start_model(course, done))
        made = _run_stage(course, stage, done, start_from)
        record = stored.write(made, files=[f"{made['product']}/*"])
        if start_from is not None and not course.sequence.keep_models:
            by_first(lambda: _remove_model(start_from))
    return _Done(run / record["result"], after / record["product"], record)


def _is_whole(result: Path) -> bool:
    try:
        return any(checked(result).glob("*.safetensors"))
    except ArtefactError as error:
        _log.warning("%s; the stage runs again", error)
        return False


def _run_stage(course: _Course, stage: Stage, done: Sequence[_Done], start_from: Path | None) -> dict[str, Any]:
    _log.info("stage %s, %d of %d", stage.name, stage.number, len(course.sequence.stages))
    started = time.perf_counter()
    changes: dict[str, Any] = {
        "output": course.output / "stages" / stage.folder,
        "evaluate": [],
        "export": ExportSpec(max_gap=course.wanted.max_gap),
    }
    if start_from is not None:  # in 16 bits, what earlier stages changed would round away
        changes |= {"model": str(start_from), "revision": None, "dtype": "float32"}
    job = start(stage.recipe.model_copy(update=changes))
    plan = plan_stage(job)
    format, note = format_for(plan, "portable")
    whole = format == "merged" or any(one.whole for one in done)
    if whole:
        _refuse_rank(course.wanted, stage, note or "A stage before it left a whole model")
    train_stage(job, plan)
    export_stage(job, plan)
    record = by_first(lambda: _record_product(course, stage, done, job, whole))
    return record | {
        "name": stage.name,
        "method": plan.method,
        "options": dict(plan.options),
        "seed": job.seed,
        "note": note,
        "seconds": time.perf_counter() - started,
    }


def _record_product(course: _Course, stage: Stage, done: Sequence[_Done], job: Job, whole: bool) -> dict[str, Any]:
    result = find_result(job.output)
    product = course.output / "after" / stage.folder / ("merged" if whole else "adapter")
    rank = _write_product(course, stage, done, result, product)
    logits, wanted = (logits_of(_load(of, folder), job.probe) for of, folder in ((course.base, product), (job, result)))
    gap = gap_to(logits, wanted, course.dtype, course.wanted.max_gap, "product")
    _log.info("stage %s: gap to what was trained on a fresh base %.1e, rank %d", stage.name, gap.gap, rank)
    trained = read_json(job.output / "trained" / "train.json")
    return {
        "result": result.name,
        "product": product.name,
        "weights": result_fingerprint(product),
        "started_from": job.base_fingerprint,
        "gap": gap.gap,
        "relative_gap": gap.relative,
        "rank": rank,
        "trained_parameters": trained["trained_parameters"],
        "loss": trained["loss"],
    }


def _key(course: _Course, stage: Stage, done: Sequence[_Done]) -> str:
    recipe = {key: value for key, value in stage.recipe.written().items() if key not in _NOT_IN_KEY}
    recipe["task"] = stage.recipe.task.model_dump(exclude={"train"})
    sets = stage.recipe.all_knowledge.values()
    recipe["knowledge"] = [part.model_dump(exclude={"file"}) if isinstance(part, Knowledge) else part for part in sets]
    before = [done[-1].record["key"], done[-1].record["weights"]] if done else [course.base.base_fingerprint]
    return content_key([before, recipe, [file_fingerprint([Path(file)]) for file in stage.recipe.data_files]])


def _start_model(course: _Course, done: Sequence[_Done]) -> Path | None:
    if not done:
        return None
    last, stage = done[-1], course.sequence.stages[len(done) - 1]
    folder = course.output / "models" / stage.folder
    where = f"model after stage {stage.name}"

    def write() -> dict[str, Any]:
        if len(done) == 1 and course.dtype != torch.float32:
            _log.info("the base is %s: from here on stages work in float32, with the memory that takes", course.dtype)
        write_whole(course.base, _model_after(course.base, done), folder, torch.float32)
        written = logits_of(
            load_model(str(folder), LoadOptions(dtype="float32", device=course.base.device)), course.base.probe
        )
        wanted = logits_of(_load(course.base, last.product), course.base.probe)
        return asdict(gap_to(written, wanted, course.dtype, course.wanted.max_gap, where))

    key = content_key([last.record["key"], last.record["weights"]])
    Stored(where, folder.with_name(f"{folder.name}.json"), key).get(write, files=[f"{folder.name}/*"])
    return folder


def _model_after(base: Job, done: Sequence[_Done]) -> PreTrainedModel:
    if not done:
        return Job(base.recipe.model_copy(update={"dtype": "float32"})).base()
    last = done[-1]
    if not last.whole:
        return add_changes(_model_after(base, ()), read_changes(last.product))
    if last.result.name == "merged":
        return load_model(str(last.result), LoadOptions(dtype="float32", device=base.device))
    return add_changes(_model_after(base, done[:-1]), read_changes(last.result))


def _remove_model(folder: Path) -> None:
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)  # first: it says that the model is verified
    shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _write_product(course: _Course, stage: Stage, done: Sequence[_Done], result: Path, product: Path) -> int:
    """Writes what all stages up to this one make of the base; returns the rank of the change, 0 for a whole model."""
    if product.name == "merged":
        whole = _model_after(course.base, [*done, _Done(result, product, {})])
        write_whole(course.base, whole, product, course.dtype)
        seal(product, {"format": "merged"})
        return 0
    changes = joined(read_changes(done[-1].product) if done else {}, read_changes(result))
    if not changes:
        raise ExportError(
            "training",
            got="no change of any weight",
            wanted="a stage that learns",
            next_step="Raise its learning rate.",
        )
    options = {"stages": [one.name for one in course.sequence.stages[: stage.number]]}
    write_adapter(course.base, changes, product, ExportSpec(max_gap=course.wanted.max_gap), options)
    return max(change.rank for change in changes.values())


def _load(job: Job, result: Path) -> PreTrainedModel | PeftModel:
    if (result / "adapter_config.json").is_file():
        return load_adapter(job.base(), result)
    return load_model(str(result), LoadOptions(dtype=job.recipe.dtype, device=job.device))


def _refuse_rank(wanted: ExportSpec, stage: Stage, reason: str) -> None:
    if wanted.rank is not None or wanted.format == "peft":
        got = f"rank {wanted.rank}" if wanted.rank is not None else "format peft"
        raise ExportError(
            f"export, stage {stage.name}",
            got=got,
            wanted="none: the product is a whole model",
            next_step=f"{reason}. Leave `export.{got.split()[0]}` out, or choose another method for the stage.",
        )
    _log.warning("stage %s: the product is a whole model from here on. %s", stage.name, reason)


def _scores(course: _Course, folder: Path) -> list[dict[str, Any]]:
    job = Job(course.sequence.whole.model_copy(update={"output": folder}))
    key = content_key([course.base.base_fingerprint, course.base.device])
    return evaluate_stage(job, kept=KeptAnswers(course.output / "base-answers", key))


def _final(course: _Course, last: _Done) -> tuple[Path, dict[str, Any] | None]:
    if last.whole:
        return last.product, None
    folder = course.output / ("merged" if course.wanted.format == "merged" else "adapter")
    options = {"stages": [stage.name for stage in course.sequence.stages]}

    def write() -> dict[str, Any]:
        write_adapter(course.base, read_changes(last.product), folder, course.wanted, options)
        return dict(read_json(folder / EXPORT))

    key = content_key([last.record["key"], last.record["weights"], course.wanted.model_dump()])
    stored = Stored("export", folder / EXPORT, key)
    record = stored.get(write)
    stored.path.touch()  # the newer of `adapter` and `merged` is what is scored
    return folder, {k: v for k, v in record.items() if k not in ("key", "files")}
