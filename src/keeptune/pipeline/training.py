"""The train stage: an installed plan, trained on the task, to the trained weights."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from keeptune.adapter.install import install, restore_state, trained_state
from keeptune.adapter.trained_head import full
from keeptune.core.artefact import atomic_directory, content_key, need_files, read_json, read_tensors, write_tensors
from keeptune.core.errors import TrainError
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.plan import Plan
from keeptune.core.processes import by_first, is_first
from keeptune.data.examples import LanguageExamples, shortened
from keeptune.evaluation.benchmark_data import data_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.penalties.base import conclusions
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.job import Job
from keeptune.pipeline.machine import release_memory
from keeptune.pipeline.while_training import scores
from keeptune.training.evaluations import Evaluations, evaluated
from keeptune.training.guard import divergence
from keeptune.training.trainer import STM, Beside, train

_log = logging.getLogger(__name__)
_FACTORS = "factors.safetensors"


def trained_result(job: Job, plan: Plan) -> Stored:
    """Returns where the trained weights are, with the record ``train.json``, under the key of all they depend on."""
    recipe = job.recipe
    inputs = [plan.key, job.base_fingerprint, job.trained_examples.fingerprint, recipe.train, recipe.anchor]
    if job.loss is not None or recipe.task.stm_threshold is not None:
        inputs.append([job.loss and job.loss.name, job.loss, recipe.task.stm_threshold])
    if recipe.task.truncate != "right":
        inputs.append(recipe.task.truncate)
    if recipe.stop_at_loss is not None:
        scored = [[one, data_fingerprint(one, job.tokenizer)] for one in recipe.evaluate]
        inputs.append({"stop_at_loss": recipe.stop_at_loss, "evaluate": scored})
    return Stored("train", job.output / "trained" / "train.json", content_key(inputs))


@out_of_memory("train")
def train_stage(job: Job, plan: Plan) -> None:
    """Trains, or goes on from the last checkpoint, or does nothing where it is done."""
    result = trained_result(job, plan)
    if result.read() is not None:
        return
    release_memory(_train(job, plan, result))


def _train(job: Job, plan: Plan, result: Stored) -> int:
    """Trains and writes what was trained; returns the bytes of the model, which is free after it."""
    started = time.perf_counter()
    model = job.base_to_train()
    config = job.config(job.output / "checkpoints" / result.key[:12], model.dtype)
    tuned = install(model, plan, anchor=job.recipe.anchor)
    task = job.recipe.task
    evaluations = None
    if job.recipe.training.get("eval_strategy", "no") != "no":
        score = scores(tuned, plan, job.tokenizer, job.recipe.evaluate, base=job.base, folder=job.output)
        evaluations = Evaluations(score, job.recipe.stop_at_loss)
    beside = Beside(task.stm_threshold, evaluations)
    rows = train(tuned, plan, job.tokenizer, job.trained_examples, config, job.loss or "nll", beside)
    loss, scored = [row for row in rows if "loss" in row], evaluated(rows)
    stm = {} if task.stm_threshold is None else read_json(Path(config.output_dir) / STM)
    own = job.loss is not None and job.loss.reads == "own texts"  # which change: so may the loss, which is none of data
    diverged = None if own else divergence([row.get("nll", row["loss"]) for row in loss])
    verdicts = conclusions(plan, loss[-1]) if loss else []
    notes = [*([diverged] if diverged else []), *verdicts]
    if stm:
        notes.append(
            f"stm: {stm['masked']} of {stm['tokens']} tokens are not learned, {stm['masked'] / stm['tokens']:.1%}"
        )
    notes += [] if evaluations is None else evaluations.notes(scored)
    for note in notes:
        if note not in verdicts:  # which training has said
            _log.info("train: %s", note)
    free = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    given = isinstance(job.trained_examples, LanguageExamples) and not own
    record = {
        "plan": plan.key,
        "base": job.recipe.model,
        "arguments": job.recipe.train,
        "labels": None if job.head is None else list(job.head.labels),
        "replay": {"share": job.recipe.replay, "examples": len(job.trained_examples) - len(job.task)},
        "data": shortened(job.data_account()[0]) if given else None,
        "task_loss": task.loss,
        "stm": {key: value for key, value in stm.items() if key != "places"},
        "loss": loss,
        **({"evaluations": scored} if scored else {}),
        "notes": notes,
        "seconds": time.perf_counter() - started,
        # Of a change confined to some rows, those alone.
        "trained_parameters": free - sum(target.held_back for target in plan.targets),
    }
    factors = trained_state(tuned, plan) if isinstance(tuned, PeftModel) else None
    weights = _gathered(tuned) if factors is None else None

    def write() -> None:
        with atomic_directory(result.path.parent) as fresh:
            if factors is None:
                tuned.save_pretrained(fresh / "model", state_dict=weights)
            else:
                write_tensors(fresh / _FACTORS, factors)
            result.write(record, files=[_FACTORS, "model/*"], folder=fresh)

    by_first(write)
    return sum(p.nbytes for p in tuned.parameters())


def _gathered(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Gathers the weights of a model in shards, one after the other, for the first process; None where it is whole."""
    shards, whole = model.state_dict(keep_vars=True), dict[int, Tensor]()
    if not any(isinstance(value, DTensor) for value in shards.values()):
        return None
    for value in shards.values():
        if id(value) not in whole:  # tied weights stay one
            gathered = full(value.detach()).cpu()
            whole[id(value)] = gathered if is_first() else gathered.new_empty(0)
    return {name: whole[id(value)] for name, value in shards.items()}


def load_trained(job: Job, plan: Plan) -> PreTrainedModel | PeftModel:
    """Loads the model as it was at the end of training.

    Raises:
        TrainError: Nothing was trained with this recipe.
        ArtefactError: What was trained is damaged.
    """
    result = trained_result(job, plan)
    record = read_json(result.path) if result.path.is_file() else {}
    if record.get("key") != result.key:
        raise TrainError(
            f"export {job.output}",
            got="no model trained with this recipe",
            wanted="a finished training",
            next_step="Run `keeptune train` with the same recipe first.",
        )
    folder = result.path.parent
    need_files(folder, record.get("files", {}), "Run `keeptune train` with the same recipe: it trains again.")
    if plan.scope == "all":
        return load_model(str(folder / "model"), LoadOptions(dtype="float32", device=job.device, head=job.head))
    tuned = install(job.base(), plan, anchor=job.recipe.anchor)
    assert isinstance(tuned, PeftModel)
    # Runs made before records had `files` have the one checksum.
    checksum = record["files"][_FACTORS] if "files" in record else record["sha256"]
    restore_state(tuned, plan, read_tensors(folder / _FACTORS, checksum))
    return tuned
