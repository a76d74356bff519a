"""The main job, from a recipe to an adapter and an account of what was learned and lost.

    recipe -> stats -> plan -> train -> export -> evaluate -> report

Each stage writes its result into the run folder under a key made of all it depends on. A stage whose result
is there under the right key is not repeated, so the same command goes on where a killed run stopped.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keeptune.adapter.export import Exported, export, format_for
from keeptune.adapter.install import install, restore_state, trained_state
from keeptune.adapter.load import SIDECAR
from keeptune.core.artefact import (
    atomic_directory,
    content_key,
    has_key,
    read_json,
    read_tensors,
    remove_leftovers,
    write_json,
    write_tensors,
)
from keeptune.core.errors import ArtefactError, TrainError
from keeptune.core.plan import Plan
from keeptune.core.target import Target
from keeptune.model.pretrained import load_model
from keeptune.penalties.base import conclusions
from keeptune.pipeline.boundary_search import settle
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import plan_for, statistics_for
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.scoring import evaluate_stage, find_result
from keeptune.pipeline.task_kinds import probe_of, train_on
from keeptune.recipe.schema import Recipe
from keeptune.statistics.collect import Statistics

__all__ = ["export_stage", "plan_stage", "run", "start", "stats_stage", "train_stage"]

_log = logging.getLogger(__name__)
_STAGE_FOLDERS = ("plan", "trained", "adapter", "merged")


def run(recipe: Recipe) -> dict[str, Any]:
    """Do a whole job, or what is left of it.

    Args:
        recipe: The job.

    Returns:
        The report, as in ``report.json``.

    Raises:
        KeeptuneError: Something the user can mend; the message says what.
    """
    job = start(recipe)
    plan = plan_stage(job)
    train_stage(job, plan)
    export_stage(job, plan)
    evaluate_stage(job)
    return write_report([job.output], job.output, reference=recipe.reference, keep=True)


def start(recipe: Recipe) -> Job:
    """Check a recipe with its data and open its run folder.

    Args:
        recipe: The recipe.

    Returns:
        The job.

    Raises:
        KeeptuneError: Something the user can mend; nothing was written then.
    """
    job = Job(recipe)
    job.check()
    for stage in _STAGE_FOLDERS:
        remove_leftovers(job.output / stage)
    if job.output.is_dir():
        _record(job)
    return job


def _record(job: Job) -> None:
    """Keep the recipe in the run folder; a new folder gets it with its first result, so that an error leaves none."""
    written = job.recipe.written()
    if not _holds(job.output / "recipe.json", written):
        write_json(job.output / "recipe.json", written)


def stats_stage(job: Job) -> tuple[list[Target], Statistics]:
    """Collect what the method needs into the store.

    Args:
        job: The job.

    Returns:
        The targets and access to their statistics.
    """
    return statistics_for(
        job.base(),
        job.method,
        job.store,
        data=job.data,
        roles=job.recipe.targets,
        layers=job.recipe.layers,
        fingerprint=job.base_fingerprint,
        low_memory=job.recipe.low_memory,
    )


def plan_stage(job: Job) -> Plan:
    """Make the plan, or load the one that is there.

    Args:
        job: The job.

    Returns:
        The plan.
    """
    folder = job.output / "plan"
    settled = settle(job)
    inputs = job.plan_inputs | {"method": [settled.method.name, settled.method]}
    inputs |= {"notes": list(settled.notes)} if settled.notes else {}
    key = content_key(inputs)
    if (folder / "plan.json").is_file():
        try:
            plan = Plan.load(folder)
            if plan.provenance.get("key") == key:
                _log.info("plan: taken from %s", folder)
                return plan
            _log.info("plan: the recipe changed; planning again")
        except ArtefactError as error:
            _log.warning("plan: %s; planning again", error)
    started = time.perf_counter()
    plan = plan_for(
        job.base(),
        settled.method,
        job.store,
        data=job.data,
        penalties=job.penalties,
        roles=job.recipe.targets,
        layers=job.recipe.layers,
        fingerprint=job.base_fingerprint,
        low_memory=job.recipe.low_memory,
        provenance=inputs | {"key": key, "seed": job.seed},
    )
    plan.save(folder)
    _record(job)
    write_json(folder / "seconds.json", {"plan": time.perf_counter() - started})
    return plan


def train_stage(job: Job, plan: Plan) -> None:
    """Train, or go on from the last checkpoint, or do nothing when it is done.

    Args:
        job: The job.
        plan: The plan.
    """
    key = train_key(job, plan)
    folder = job.output / "trained"
    if has_key(folder / "train.json", key):
        _log.info("train: taken from %s", folder)
        return
    started = time.perf_counter()
    model = job.base()
    config = job.config(key[:12], model.dtype)
    tuned = install(model, plan, anchor=job.recipe.anchor)
    loss = train_on(job.trained_examples, tuned, plan, job.tokenizer, config)
    with atomic_directory(folder) as fresh:
        sha256 = None
        if plan.scope == "all":
            assert isinstance(tuned, PreTrainedModel)
            tuned.save_pretrained(fresh / "model")
        else:
            assert isinstance(tuned, PeftModel)
            sha256 = write_tensors(fresh / "factors.safetensors", trained_state(tuned, plan))
        record: dict[str, Any] = {
            "key": key,
            "plan": plan.key,
            "base": job.recipe.model,
            "arguments": job.recipe.train,
            "sha256": sha256,
            "labels": None if job.head is None else list(job.head.labels),
            "replay": {"share": job.recipe.replay, "examples": len(job.trained_examples) - len(job.task)},
            "loss": loss,
            "notes": conclusions(plan, loss[-1]) if loss else [],
            "seconds": time.perf_counter() - started,
            "trained_parameters": _trained_parameters(tuned, plan),
        }
        for note in record["notes"]:
            _log.info("train: %s", note)
        write_json(fresh / "train.json", record)


def _trained_parameters(tuned: PreTrainedModel | PeftModel, plan: Plan) -> int:
    """Count what is trained: of a change confined to some rows, those alone."""
    free: int = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    return free - sum(t.held_back for t in plan.targets)


def train_key(job: Job, plan: Plan) -> str:
    """Name all that the trained factors depend on.

    Args:
        job: The job.
        plan: The plan.

    Returns:
        The key.
    """
    recipe = job.recipe
    return content_key([plan.key, job.base_fingerprint, job.trained_examples.fingerprint, recipe.train, recipe.anchor])


def export_stage(job: Job, plan: Plan) -> Exported:
    """Write the adapter and check it on a fresh base, unless that is done.

    Args:
        job: The job.
        plan: The plan.

    Returns:
        What was written.
    """
    record = read_json(job.output / "trained" / "train.json") if (job.output / "trained").is_dir() else {}
    if record.get("key") != train_key(job, plan):
        raise TrainError(
            f"export {job.output}",
            got="no model trained with this recipe",
            wanted="a finished training",
            next_step="Run `keeptune train` with the same recipe first.",
        )
    folder = adapter_folder(job, plan)
    key = content_key([record["key"], job.recipe.export.model_dump()])
    if has_key(folder / "export.json", key):
        _log.info("export: taken from %s", folder)
        if find_result(job.output) != folder:
            (folder / "export.json").touch()  # the newer of `adapter` and `merged` is the run's result
        return Exported(**read_json(folder / SIDECAR)["export"])
    tuned = load_trained(job, plan, record["sha256"])
    done = export(
        tuned,
        plan,
        folder,
        base=job.recipe.model,
        load_base=job.base,
        format=job.recipe.export.format,
        rank=job.recipe.export.rank,
        tokenizer=job.tokenizer,
        probe=probe_of(job.task, job.tokenizer, min(256, job.positions or 256)),
        max_gap=job.recipe.export.max_gap,
    )
    write_json(folder / "export.json", {"key": key, "train": record["key"], **asdict(done)})
    return done


def load_trained(job: Job, plan: Plan, sha256: str | None) -> PreTrainedModel | PeftModel:
    """Load the trained model from the run folder.

    Args:
        job: The job.
        plan: The plan.
        sha256: Checksum of the trained factors.

    Returns:
        The model as it was at the end of training.
    """
    folder = job.output / "trained"
    if plan.scope == "all":
        return load_model(str(folder / "model"), dtype="float32", device=job.device, head=job.head)
    assert sha256 is not None
    tuned = install(job.base(), plan, anchor=job.recipe.anchor)
    assert isinstance(tuned, PeftModel)
    restore_state(tuned, plan, read_tensors(folder / "factors.safetensors", sha256))
    return tuned


def adapter_folder(job: Job, plan: Plan) -> Path:
    """Name the folder of the result: ``adapter``, or ``merged`` for a whole model.

    Args:
        job: The job.
        plan: The plan.

    Returns:
        The folder.
    """
    format, _ = format_for(plan, job.recipe.export.format, job.recipe.export.rank)
    return job.output / ("merged" if format == "merged" else "adapter")


def _holds(path: Path, value: Any) -> bool:
    try:
        return bool(read_json(path) == value)
    except ArtefactError:
        return False
