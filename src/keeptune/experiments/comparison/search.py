"""A budgeted search in place of the whole grid: Optuna, through Ray Tune, on what is learned and what is forgotten.

Each trial is an ordinary cell with the first of ``compare.seeds``; afterwards the settings on the front are run with
the other seeds, so that they have intervals. Trial n is drawn by a TPE sampler seeded with (seed, n) that sees the
trials that have ended. The first ten are draws at random and always the same ones; later ones too where one cell runs
at a time, while with several at once they depend on which of them ends first.

Resuming: every trial that has ended is written to ``<output>/search.json``. Started again, finished ones are told to
Optuna as they are, which costs nothing, failed ones are tried again, and the rest of the budget is drawn anew: with one
cell at a time just what a search that nobody stopped would have drawn. The journal is left aside where the space, the
seed, the recipe, the data or the base are others than it was written for; finished cells then still cost nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from keeptune.core.artefact import content_key, has_key, read_json, write_json
from keeptune.core.errors import RecipeError
from keeptune.experiments.comparison import record
from keeptune.experiments.comparison.axes import Axes, axes_of, forgotten_of, learned_of
from keeptune.experiments.comparison.cell import Outcome, Work, finished, work_of
from keeptune.experiments.comparison.cells import Cell, Comparison, cell_of, grid
from keeptune.experiments.comparison.engine import (
    alone,
    mark_folder,
    missing_extra,
    on_worker,
    run_cells,
    started_ray,
    tell,
    works_of,
)
from keeptune.experiments.comparison.front import pareto
from keeptune.experiments.comparison.section import Resources, Search
from keeptune.experiments.comparison.space import ENTRY, dimensions, draw, setting_of, spans_of
from keeptune.experiments.comparison.study import JOURNAL, Trial, new_study, quiet_optuna, read_journal

__all__ = ["Trials", "run_search"]

_log = logging.getLogger(__name__)

_FOLDER = "search"
_AXES = ("learned", "forgotten")


@dataclass(frozen=True)
class Trials:
    """What all trials have in common, for workers too.

    Args:
        comparison: The comparison.
        base: Fingerprint of the base.
        threads: Of a cell.
        knobs: What is turned on plain LoRA's results.
        start: The folder that relative paths are meant from.
        key: Of the space and all that results depend on.
        known: Fingerprints of data files by path.
    """

    comparison: Comparison
    base: str
    threads: int
    knobs: Sequence[Mapping[str, Any]]
    start: Path
    key: str
    known: dict[str, str] = field(default_factory=dict)

    def cell(self, drawn: Mapping[str, Any]) -> tuple[Cell, Work]:
        """Make the cell of a draw.

        Args:
            drawn: ``entry``, ``rate`` and ``strength``.

        Returns:
            The cell, and as a worker gets it.

        Raises:
            KeeptuneError: The draw does not fit the method.
        """
        comparison = self.comparison
        entry, variation, rate = setting_of(comparison.entries, drawn)
        cell = cell_of(comparison, entry, variation, rate, comparison.section.seeds[0])
        work = work_of(cell.name, cell.recipe, self.base, comparison.output.absolute(), self.threads, self.known)
        return cell, replace(work, knobs=self.knobs if cell.label == comparison.plain else ())


def run_search(comparison: Comparison, search: Search) -> tuple[tuple[Cell, ...], dict[str, Outcome]]:
    """Run what is missing of a search, and the settings on its front with the other seeds.

    Args:
        comparison: The comparison.
        search: Its budget and seed.

    Returns:
        Its cells, in the order of the trials, and name to how each ended.

    Raises:
        KeeptuneError: Something the user can mend; nothing was run then.
    """
    _need_optuna()
    _need_both_sides(comparison)
    trials = _trials(comparison, search)
    with alone(comparison.output):
        journal = read_journal(comparison.output, trials.key)
        ended = [trial for trial in journal if trial.learned is not None and finished(trials.cell(trial.drawn)[1])]
        again = [trial for trial in journal if trial not in ended]
        if journal:
            _log.info("search: %d of %d trials are done", len(ended), search.trials)
        if len(ended) < search.trials:
            with started_ray(comparison.section.resources) as ray:
                ended = _tune(ray, trials, search, ended, again)
    found: dict[str, tuple[Trial, Cell]] = {}
    for trial in ended[: search.trials]:
        if trial.cell not in found or found[trial.cell][0].learned is None:  # equal draws share a cell
            found[trial.cell] = (trial, trials.cell(trial.drawn)[0])
    outcomes = {name: _outcome(trial, trials, cell) for name, (trial, cell) in found.items()}
    others = _other_seeds(comparison, list(found.values()))
    if others:
        outcomes |= run_cells(comparison, others)
    return (*(cell for _, cell in found.values()), *others), outcomes


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401
        from ray import tune  # noqa: F401
    except ImportError as error:
        raise missing_extra("Ray Tune" if "optuna" not in str(error) else "Optuna") from error


def _need_both_sides(comparison: Comparison) -> None:
    roles = {str(benchmark.role) for benchmark in comparison.base.evaluate}
    if len(roles) != 2:
        raise RecipeError(
            f"{comparison.where}, key compare.search",
            got=f"benchmarks of {' and '.join(sorted(roles)) or 'no role'} alone",
            wanted="a task and a knowledge benchmark: the search weighs what is learned against what is forgotten",
            next_step="Add one to `evaluate`, or leave `search` out for the whole grid.",
        )


def _trials(comparison: Comparison, search: Search) -> Trials:
    """Check the listed settings, which are the ends of all spans, and name all that results depend on."""
    first = comparison.section.seeds[0]
    ends = [cell for cell in grid(comparison) if cell.seed == first]
    works, _ = works_of(comparison, ends)
    spans = [{name: asdict(span) for name, span in spans_of(entry).items()} for entry in comparison.entries]
    key = content_key([search.seed, spans, [works[cell.name].key for cell in ends]])
    some = works[ends[0].name]
    knobs = next((works[cell.name].knobs for cell in ends if cell.label == comparison.plain), ())
    return Trials(comparison, some.base, some.threads, knobs, Path.cwd(), key)


def _tune(ray: Any, trials: Trials, search: Search, ended: list[Trial], again: Sequence[Trial]) -> list[Trial]:
    for name in ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"):  # an interrupt ends the search
        os.environ.setdefault(name, "1")
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    comparison, resources = trials.comparison, trials.comparison.section.resources
    entries = comparison.entries
    output = comparison.output.absolute()
    shutil.rmtree(output / _FOLDER, ignore_errors=True)  # Tune's notes on an earlier start; the journal is what counts
    found = list(ended)
    storage, sampler = new_study(search.seed, ended, again, entries)
    with quiet_optuna(), _quiet_tune():
        tuner = tune.Tuner(
            tune.with_resources(
                partial(_trial, trials=trials, token=mark_folder(output)),
                {"cpu": resources.cpus, "gpu": resources.gpus},
            ),
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(
                    partial(draw, entries=entries),
                    metric=list(_AXES),
                    mode=["max", "min"],
                    sampler=sampler,
                    storage=storage,
                    study_name=_FOLDER,
                ),
                num_samples=search.trials - len(ended),
                max_concurrent_trials=_at_once(ray, resources),
                reuse_actors=True,  # libraries are loaded once
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(output / _FOLDER),
                verbose=0,
                callbacks=[_journal(trials, search, found, again)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()
    return found


def _at_once(ray: Any, resources: Resources) -> int:
    """Count how many cells the nodes have room for: Tune draws trials ahead unless it is told."""
    room = 0
    for node in ray.nodes():
        have = node["Resources"]
        rooms = [have.get("CPU", 0) // resources.cpus]
        rooms += [have.get("GPU", 0) // resources.gpus] if resources.gpus else []
        room += int(min(rooms)) if node["Alive"] else 0
    return max(1, room)


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Leave to the journal and to our own log what Tune says of trials that failed."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trial(config: Mapping[str, Any], *, trials: Trials, token: str) -> None:
    """Run a trial on a worker; one that failed raises, so that Tune goes on without it."""
    from ray import tune

    if trials.start.is_dir():
        os.chdir(trials.start)  # Tune goes to a folder of its own
    cell, work = trials.cell(config)
    outcome = Outcome("done") if finished(work) else on_worker(work, token)
    if outcome.status != "done":
        raise RuntimeError(outcome.message)
    learned, forgotten = _place(trials.comparison, cell)
    tune.report({"learned": learned, "forgotten": forgotten, "took": outcome.seconds, "warned": list(outcome.warnings)})


def _place(comparison: Comparison, cell: Cell) -> tuple[float, float]:
    """Read a finished cell's place on the axes."""
    own = record.Cell(name=cell.name, label=cell.label, method=cell.method, folder=cell.recipe.output)
    row = record.row_of(own)
    if row["status"] != "done":
        raise RuntimeError(row["message"])
    section = comparison.section
    axes: Axes = axes_of(row["benchmarks"], section.learned, section.forgotten)
    learned, forgotten = learned_of(row["benchmarks"], axes.learned), forgotten_of(row["benchmarks"], axes.forgotten)
    if learned.number is None or forgotten.number is None:
        raise RuntimeError(f"{cell.name} has no place on the axes: {learned.why or forgotten.why}")
    return learned.number, forgotten.number


def _journal(trials: Trials, search: Search, found: list[Trial], again: Sequence[Trial]) -> Any:
    """Make Tune's callback that writes down each trial as it ends."""
    from ray import tune

    def ended(trial: Any) -> None:
        config, result = trial.config, trial.last_result or {}
        drawn = {key: config[key] for key in (ENTRY, "rate", "strength")}
        params = {key: config[key] for key in dimensions(trials.comparison.entries, config[ENTRY])}
        cell, work = trials.cell(drawn)
        if result.get("learned") is not None:
            found.append(Trial(params, drawn, cell.name, result["learned"], result["forgotten"], "", result["took"]))
            outcome = Outcome("done", "", result["took"], tuple(result["warned"]))
        else:
            found.append(Trial(params, drawn, cell.name, message=_why(work, trial)))
            outcome = Outcome("failed", found[-1].message)
        left = [trial for trial in again if all(trial.params != other.params for other in found)]
        plain = [asdict(trial) for trial in (*found, *left)]
        write_json(trials.comparison.output / JOURNAL, {"key": trials.key, "trials": plain})
        tell(cell.name, outcome, len(found), search.trials)

    class Journal(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ended(trial)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ended(trial)

    return Journal()


def _why(work: Work, trial: Any) -> str:
    """Find why a trial failed: what its cell says, or else what its worker raised."""
    mark = work.recipe.output / "cell.json"
    if has_key(mark, work.key) and read_json(mark)["status"] == "failed":
        return str(read_json(mark)["message"])
    error = trial.get_pickled_error()
    return str(getattr(error, "cause", None) or error or "its worker process died; out of memory?").strip()


def _outcome(trial: Trial, trials: Trials, cell: Cell) -> Outcome:
    status: Any = "failed" if trial.learned is None else "done"
    knobs = trials.knobs if cell.label == trials.comparison.plain else ()
    return Outcome(status, trial.message, trial.seconds, knobs=knobs)


def _other_seeds(comparison: Comparison, found: Sequence[tuple[Trial, Cell]]) -> list[Cell]:
    """Make the cells of the settings on the front with the seeds that the search left out."""
    placed = [trial for trial, _ in found if trial.learned is not None and trial.forgotten is not None]
    on = pareto([(float(trial.learned or 0), float(trial.forgotten or 0)) for trial in placed])
    front = [setting_of(comparison.entries, trial.drawn) for trial, kept in zip(placed, on, strict=True) if kept]
    return [
        cell_of(comparison, entry, variation, rate, seed)
        for entry, variation, rate in front
        for seed in comparison.section.seeds[1:]
    ]
