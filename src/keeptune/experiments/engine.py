"""The engine of comparisons: runs in this process, or as tasks on Ray, on this machine or a cluster.

Finished runs are recognised before any starts. A run that fails is reported and the others go on; on Ray, one whose
worker died is tried once more, and worker processes take one run after the other, so that libraries are loaded once.
Runs that need the same statistics, or the base's answers to the same benchmark, wait for the first to collect them
(:mod:`keeptune.core.locks`).
"""

import contextlib
import gc
import logging
import os
import platform
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from keeptune.core.artefact import write_bytes
from keeptune.core.errors import RecipeError
from keeptune.core.processes import by_first, world
from keeptune.experiments.cell import attempt_together
from keeptune.experiments.compare_section import Resources
from keeptune.experiments.plan_runs import Comparison, RunSpec, check_runs
from keeptune.experiments.posthoc_variants import Variant
from keeptune.experiments.single_run import Outcome, RunTask, attempt, finished, task_key
from keeptune.model.head import body_fingerprint
from keeptune.pipeline.job import Job
from keeptune.pipeline.launching import Launch

_log = logging.getLogger(__name__)
_MARKER = ".shared-folder"
_RETRIES = 1


def _resources(comparison: Comparison) -> Resources | None:
    """Returns what each run gets on Ray; None runs it in this process, or in all that a launcher started."""
    section = comparison.section
    if world() == 1:
        return section.resources
    if section.resources is not None and "resources" in section.model_fields_set:
        raise RecipeError(
            "compare.resources",
            got=f"Ray, in {world()} processes of a launcher",
            wanted="one of the two",
            next_step="Leave resources out, or start the comparison without a launcher.",
        )
    return None


def variants_of(comparison: Comparison, label: str) -> Sequence[Variant]:
    """Returns the post-hoc variants of an entry's runs: those of plain LoRA are baselines that need no training."""
    section = comparison.section
    if not section.baselines or label != comparison.plain:
        return ()
    scaled = [Variant("scale", scale) for scale in section.scales if scale != 1]
    return [*scaled, *(Variant("pruned", share) for share in section.pruned)]


def tasks_of(comparison: Comparison, specs: Sequence[RunSpec]) -> tuple[dict[str, RunTask], frozenset[str]]:
    """Checks the runs that are not finished; KeeptuneError where one is not possible.

    Returns:
        Name to task, and the names of those that are not finished.
    """
    model = Job(specs[0].recipe).base()
    base, resources = body_fingerprint(model), _resources(comparison)
    threads = None if resources is None else max(1, int(resources.cpus // (resources.launch.processes or 1)))
    known: dict[str, str] = {}  # fingerprints of data files by path
    tasks = {}
    for spec in specs:
        key, variants = task_key(spec.recipe, base, known), variants_of(comparison, spec.label)
        tasks[spec.name] = RunTask(spec.name, spec.recipe, key, base, comparison.output.absolute(), threads, variants)
    missing = by_first(lambda: frozenset(name for name, task in tasks.items() if not finished(task)))
    check_runs(comparison, [spec for spec in specs if spec.name in missing], model)
    del model  # on a GPU the runs need its memory
    gc.collect()
    return tasks, missing


def run_all(comparison: Comparison, specs: Sequence[RunSpec]) -> dict[str, Outcome]:
    """Does what is missing of runs, one seed after the other; returns how each ended, by name.

    Raises:
        KeeptuneError: Nothing could be run, as where Ray is missing or has no room for one run.
    """
    tasks, missing = tasks_of(comparison, specs)
    outcomes = {name: Outcome("done") for name in tasks if name not in missing}
    ordered = sorted(
        (spec for spec in specs if spec.name in missing), key=lambda s: comparison.section.seeds.index(s.seed)
    )
    waiting = [tasks[spec.name] for spec in ordered]
    if outcomes:
        _log.info("%s: %d of %d runs are done", comparison.kind, len(outcomes), len(tasks))
    with logging_redirect_tqdm():
        resources = _resources(comparison)
        if resources is None:  # warnings are logged here as they come
            ended: Iterator[tuple[RunTask, Outcome]] = ((task, replace(attempt(task), warnings=())) for task in waiting)
        else:
            ended = _on_ray(waiting, resources, comparison.output) if waiting else iter(())
        bar = tqdm(ended, total=len(waiting), desc="runs", unit="run", disable=None if waiting else True, smoothing=0)
        for number, (task, outcome) in enumerate(bar, start=1):
            outcomes[task.name] = outcome
            for text in dict.fromkeys(outcome.warnings):
                _log.warning("%s: %s", task.name, text)
            if outcome.status == "failed":
                _log.warning("%s failed: %s", task.name, outcome.message)
            else:
                _log.info("%s done in %.0f s (%d of %d)", task.name, outcome.seconds, number, len(waiting))
    return {spec.name: outcomes[spec.name] for spec in specs}


def _on_ray(tasks: Sequence[RunTask], resources: Resources, output: Path) -> Iterator[tuple[RunTask, Outcome]]:
    with _started_ray(resources) as ray:
        token = secrets.token_hex(16)
        write_bytes(output / _MARKER, token.encode())  # by which workers see that the folder is theirs
        # Ray takes a new process for each task with a GPU unless it is configured otherwise.
        share = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        remote = ray.remote(**share, max_retries=_RETRIES, max_calls=0)(_on_worker)
        running = {remote.remote(task, token, resources.launch): task for task in tasks}
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            try:
                outcome = ray.get(ready)
            except ray.exceptions.WorkerCrashedError:
                outcome = Outcome("failed", f"its worker process died {_RETRIES + 1} times; out of memory?")
            except ray.exceptions.RayError as error:
                outcome = Outcome("failed", f"{type(error).__name__}: {error}")
            yield running.pop(ready), outcome


def _on_worker(task: RunTask, token: str, launch: Launch) -> Outcome:
    import datasets
    import ray
    from transformers.utils import logging as transformers_logging

    node = ray.get_runtime_context().get_node_id()
    marker = task.shared / _MARKER
    if not marker.is_file() or marker.read_text(encoding="utf-8") != token:
        return Outcome(
            "failed",
            f"machine {platform.node()}: {task.shared} is not the folder that the comparison was started in. "
            "All nodes need one shared folder: put `output` and `store` on it.",
            node=node,
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    own = replace(launch, cpu=task.recipe.device == "cpu")
    return replace(attempt(task) if launch.processes == 1 else attempt_together(task, own), node=node)


@contextlib.contextmanager
def _started_ray(resources: Resources) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # not 15, at which any other process starves the runs
    if resources.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on Linux too: Ray binds to the loopback only
    try:
        import ray
    except ImportError as error:
        raise RecipeError(
            "compare",
            got="no Ray in this Python",
            wanted="the libraries of comparisons",
            next_step='Install them: pip install "keeptune[compare]".',
        ) from error
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=resources.address or "local",  # None would join whatever runs on this machine
                include_dashboard=None if resources.address else False,
                log_to_driver=False,  # each run's log is in its folder
                logging_level=logging.WARNING,
            )
        except ConnectionError as error:
            raise RecipeError(
                "compare.resources.address",
                got=f"{resources.address}: {str(error).splitlines()[0]}",
                wanted="the address of a running cluster",
                next_step="Start one with `ray start --head`, or leave the address out to use this machine.",
            ) from error
    if resources.address and os.environ.get("RAY_AUTH_MODE") != "token":
        told = "%s: whoever reaches its ports can run code on it; start it with RAY_AUTH_MODE=token in the environment"
        _log.warning(told, resources.address)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        have = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
        if not any(cpus >= resources.cpus and gpus >= resources.gpus for cpus, gpus in have):  # Ray would wait for ever
            raise RecipeError(
                "compare.resources",
                got=f"{resources.cpus:g} CPUs and {resources.gpus:g} GPUs for each run",
                wanted="what one node has: " + "; ".join(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in have),
                next_step="Lower resources.cpus or resources.gpus, or set `resources: null` to run in this process.",
            )
        yield ray
    finally:
        if ours:
            ray.shutdown()
