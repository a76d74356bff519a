"""The engine of a comparison: cells as tasks on Ray, on this machine or a cluster.

What is finished is recognised before Ray starts. A cell that fails is told and the others go on; one whose worker died
is tried once more. Worker processes take one cell after the other, so that libraries are loaded once; cells that need
the same statistics or the base's answers to the same benchmark wait for the first to collect them
(:mod:`keeptune.core.locks`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from keeptune.core.artefact import write_bytes
from keeptune.core.errors import RecipeError
from keeptune.core.locks import locked
from keeptune.experiments.comparison.cell import Outcome, Work, attempt, finished, work_of
from keeptune.experiments.comparison.cells import Cell, Comparison, check_cells
from keeptune.experiments.comparison.knobs import standard_knobs
from keeptune.experiments.comparison.section import Resources
from keeptune.model.blocks import depth
from keeptune.model.head import body_fingerprint
from keeptune.pipeline.job import Job

__all__ = ["alone", "mark_folder", "missing_extra", "on_worker", "run_cells", "started_ray", "tell", "works_of"]

_log = logging.getLogger(__name__)
_MARKER = ".shared-folder"
_RETRIES = 1


def run_cells(comparison: Comparison, cells: Sequence[Cell]) -> dict[str, Outcome]:
    """Run what is missing of a comparison.

    Args:
        comparison: The comparison.
        cells: Its cells.

    Returns:
        Name of each cell to how it ended.

    Raises:
        KeeptuneError: Something the user can mend; nothing was run then.
    """
    works, missing = works_of(comparison, cells)
    with alone(comparison.output):
        missing = frozenset(name for name in missing if not finished(works[name]))  # by whoever was at work before
        outcomes = {name: Outcome("done") for name in works if name not in missing}
        if outcomes:
            _log.info("compare: %d of %d cells are done", len(outcomes), len(works))
        if missing:
            order = [cell.name for cell in sorted(cells, key=lambda cell: comparison.section.seeds.index(cell.seed))]
            todo = [works[name] for name in order if name in missing]
            with started_ray(comparison.section.resources):
                outcomes |= _run(todo, comparison.section.resources, comparison.output)
    return {cell.name: replace(outcomes[cell.name], knobs=works[cell.name].knobs) for cell in cells}


def works_of(
    comparison: Comparison, cells: Sequence[Cell], *, check: bool = True
) -> tuple[dict[str, Work], frozenset[str]]:
    """Find out which cells are finished, and check the others with data and model.

    Args:
        comparison: The comparison.
        cells: The cells.
        check: Whether to check.

    Returns:
        Name to cell for a worker, and the names of those that are not finished.

    Raises:
        KeeptuneError: A cell cannot be run.
    """
    model = Job(cells[0].recipe).base()
    base = body_fingerprint(model)
    threads = max(1, int(comparison.section.resources.cpus))
    known: dict[str, str] = {}
    shared = comparison.output.absolute()
    works = {cell.name: work_of(cell.name, cell.recipe, base, shared, threads, known) for cell in cells}
    knobs = _knobs(comparison, depth(model))
    works |= {cell.name: replace(works[cell.name], knobs=knobs) for cell in cells if cell.label == comparison.plain}
    missing = frozenset(name for name, work in works.items() if not finished(work))
    if check:
        check_cells(comparison, [cell for cell in cells if cell.name in missing], model)
    del model  # on a GPU the cells need its memory
    gc.collect()
    return works, missing


def _knobs(comparison: Comparison, blocks: int) -> list[dict[str, Any]]:
    """List what is turned on plain LoRA's finished cells, the baselines that need no training."""
    section = comparison.section
    if not section.baselines:
        return []
    found = standard_knobs(section.scales, blocks if section.scale_per == "layer" else None, section.intruders)
    return [knob.plain() for knob in found]


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Be the one comparison at work in a folder.

    Args:
        output: The folder.

    Yields:
        Nothing.

    Raises:
        RecipeError: Another is at work there.
    """
    with locked(output / ".lock", wait=False) as ours:
        if not ours:
            raise RecipeError(
                f"output {output}",
                got="a comparison at work in this folder",
                wanted="one at a time",
                next_step="Wait for the other `keeptune compare`, or choose another output.",
            )
        yield


@contextlib.contextmanager
def started_ray(resources: Resources) -> Iterator[Any]:
    """Start Ray, or connect to a cluster, and leave it as it was.

    Args:
        resources: What each cell gets, and where.

    Yields:
        The module ``ray``.

    Raises:
        RecipeError: Ray is not installed, there is no such cluster, or no node has the resources of one cell.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # not 15, at which any other process starves the cells
    try:
        import ray
    except ImportError as error:
        raise missing_extra("Ray") from error
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=resources.address or "local",  # None would join whatever runs on this machine
                include_dashboard=None if resources.address else False,
                log_to_driver=False,  # each cell's log is in its folder
                logging_level=logging.WARNING,
            )
        except ConnectionError as error:
            raise RecipeError(
                "compare.resources.address",
                got=f"{resources.address}: {str(error).splitlines()[0]}",
                wanted="the address of a running cluster",
                next_step="Start one with `ray start --head`, or leave the address out to use this machine.",
            ) from error
    try:
        _need_room(ray.nodes(), resources)  # type: ignore[no-untyped-call]
        yield ray
    finally:
        if ours:
            ray.shutdown()


def missing_extra(library: str) -> RecipeError:
    """Say how to install what comparisons need.

    Args:
        library: What is missing.

    Returns:
        The error to raise.
    """
    return RecipeError(
        "compare",
        got=f"no {library} in this Python",
        wanted="the libraries of comparisons",
        next_step='Install them: pip install "keeptune[compare]".',
    )


def _need_room(nodes: Sequence[Mapping[str, Any]], resources: Resources) -> None:
    """Refuse what no node has: Ray would wait for ever."""
    have = [(n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0)) for n in nodes if n["Alive"]]
    if not any(cpus >= resources.cpus and gpus >= resources.gpus for cpus, gpus in have):
        raise RecipeError(
            "compare.resources",
            got=f"{resources.cpus:g} CPUs and {resources.gpus:g} GPUs for each cell",
            wanted="what one node has: " + "; ".join(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in have),
            next_step="Lower resources.cpus or resources.gpus.",
        )


def mark_folder(output: Path) -> str:
    """Leave a mark by which workers see that the comparison's folder is theirs.

    Args:
        output: The folder.

    Returns:
        What the mark says.
    """
    token = secrets.token_hex(16)
    write_bytes(output / _MARKER, token.encode())
    return token


def on_worker(work: Work, token: str) -> Outcome:
    """Run a cell on a worker, if the worker sees the comparison's folder.

    Args:
        work: The cell.
        token: From :func:`mark_folder`.

    Returns:
        How it ended.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    marker = work.shared / _MARKER
    if not marker.is_file() or marker.read_text(encoding="utf-8") != token:
        return Outcome(
            "failed",
            f"machine {platform.node()}: {work.shared} is not the folder that the comparison was started in. "
            "All nodes need one shared folder: put `output` and `store` on it.",
            node=node,
        )
    _quiet()
    return replace(attempt(work), node=node)


def _quiet() -> None:
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _run(todo: Sequence[Work], resources: Resources, output: Path) -> dict[str, Outcome]:
    import ray

    token = mark_folder(output)
    # Ray takes a new process for each task with a GPU unless told otherwise.
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=_RETRIES, max_calls=0)(on_worker)
    running = {task.remote(work, token): work for work in todo}
    outcomes: dict[str, Outcome] = {}
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(todo), desc="cells", unit="cell", disable=None, smoothing=0) as bar,
    ):
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            work = running.pop(ready)
            outcomes[work.name] = _outcome(ready, work)
            tell(work.name, outcomes[work.name], len(outcomes), len(todo))
            bar.update()
    return outcomes


def _outcome(reference: Any, work: Work) -> Outcome:
    import ray

    try:
        found: Outcome = ray.get(reference)
    except ray.exceptions.WorkerCrashedError:
        found = Outcome("failed", f"its worker process died {_RETRIES + 1} times; out of memory?")
    except ray.exceptions.RayTaskError as error:
        found = Outcome("failed", f"an error that keeptune did not foresee: {error}")
    except ray.exceptions.RayError as error:
        found = Outcome("failed", f"{type(error).__name__}: {error}")
    return found


def tell(name: str, outcome: Outcome, done: int, total: int) -> None:
    """Log how a cell ended.

    Args:
        name: Its name.
        outcome: How it ended.
        done: How many have ended.
        total: Of how many.
    """
    for text in dict.fromkeys(outcome.warnings):
        _log.warning("%s: %s", name, text)
    if outcome.status == "failed":
        _log.warning("compare: %s failed: %s", name, outcome.message)
    else:
        _log.info("compare: %s done in %.0f s (%d of %d)", name, outcome.seconds, done, total)
