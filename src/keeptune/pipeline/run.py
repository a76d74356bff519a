"""The main job, from a recipe to an adapter and an account of what was learned and lost.

    recipe -> statistics -> plan -> train -> export -> evaluate -> report

Each stage keeps its result in the run folder under a key of all that it depends on (:mod:`keeptune.pipeline.cache`):
the same command goes on where a killed run stopped.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from keeptune.core.artefact import content_key, read_json, remove_leftovers, write_json
from keeptune.core.errors import ArtefactError
from keeptune.core.locks import owned
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.plan import Plan
from keeptune.core.processes import by_first, held_by_first, is_first, refuse_unshared, same_everywhere
from keeptune.core.target import Target
from keeptune.pipeline.cache import take
from keeptune.pipeline.export import export_stage
from keeptune.pipeline.job import Job
from keeptune.pipeline.machine import release_memory
from keeptune.pipeline.planning import plan_for, statistics_for
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.scoring import evaluate_stage
from keeptune.pipeline.training import train_stage
from keeptune.recipe.schema import Recipe
from keeptune.statistics.collect import Statistics

_log = logging.getLogger(__name__)


def run(recipe: Recipe) -> dict[str, Any]:
    """Runs a whole job, or what is left of it.

    Returns:
        The report, as in ``report.json``.

    Raises:
        KeeptuneError: An input is wrong; the message names which and what to do.
    """
    with started(recipe) as job:
        plan = plan_stage(job)
        train_stage(job, plan)
        export_stage(job, plan)
        evaluate_stage(job)
        return by_first(lambda: write_report([job.output], job.output, reference=recipe.reference, keep=True))


@contextlib.contextmanager
def started(recipe: Recipe) -> Iterator[Job]:
    """Yields what :func:`start` returns, and holds the run folder meanwhile: no other process may write to it.

    Raises:
        ArtefactError: Another process holds it.
    """
    job = _checked(recipe)
    with held_by_first(owned(recipe.output)):
        yield _opened(job)


def start(recipe: Recipe) -> Job:
    """Checks a recipe with its data and opens its run folder.

    Raises:
        KeeptuneError: An input is wrong; nothing was written then.
    """
    return _opened(_checked(recipe))


def _checked(recipe: Recipe) -> Job:
    same_everywhere("recipe", content_key([recipe.written(), version("keeptune")]))
    job = Job(recipe)
    job.check()
    refuse_unshared("output", job.output)
    refuse_unshared("store", job.store.folder)
    return job


def _opened(job: Job) -> Job:
    """Removes what killed stages left in a checked job's run folder."""

    def tidy() -> None:
        remove_leftovers(job.output)
        if (job.output / "recipe.json").exists():
            _write_recipe(job)

    by_first(tidy)
    return job


@out_of_memory("statistics")
def stats_stage(job: Job) -> tuple[list[Target], Statistics]:
    """Collects the statistics that the method needs into the store; returns the targets and their statistics."""
    return statistics_for(job.planning_base(), job.method, job.store, data=job.data, options=job.plan_options)


@out_of_memory("plan")
def plan_stage(job: Job) -> Plan:
    """Makes the plan, or loads the one that is there."""
    folder = job.output / "plan"
    named = "" if job.recipe.knowledge else "; the recipe names no knowledge"
    notes = [f"{written.where}: {written.account}{named}" for written in job.written_knowledge]
    for note in notes:
        _log.info("%s", note)
    inputs = job.plan_inputs | ({"notes": notes} if notes else {})
    key = content_key(inputs)

    def saved() -> tuple[str, Plan]:
        plan = Plan.load(folder)
        return plan.provenance["key"], plan

    plan = take("plan", folder, key, saved) if is_first() else None
    if by_first(lambda: plan is not None):
        return plan or saved()[1]
    started = time.perf_counter()
    options = replace(job.plan_options, provenance=inputs | {"key": key, "seed": job.seed})
    model, extra = job.planning_base(), job.penalties
    made = plan_for(model, job.method, job.store, data=job.data, penalties=extra, options=options)

    def save() -> None:
        made.save(folder)
        _write_recipe(job)
        write_json(folder / "seconds.json", {"plan": time.perf_counter() - started})

    by_first(save)
    release_memory()
    return made


def _write_recipe(job: Job) -> None:
    """Keeps the recipe in the run folder; a new folder gets it with its first result, so that an error leaves none."""
    path, written = job.output / "recipe.json", job.recipe.written()
    try:
        same = read_json(path) == written
    except ArtefactError:
        same = False
    if not same:
        write_json(path, written)
