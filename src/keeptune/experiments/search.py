"""A budgeted search in place of the whole grid: Optuna, on what is learned and what is forgotten.

Each trial is an ordinary run with the first of ``compare.seeds``; afterwards the settings on the front are run with the
other seeds, so that they have intervals. An entry is drawn, then

    rate      log-uniform between the least and the largest of the entry's rates                            (1)
    strength  log-uniform between the least and the largest of its factors, or of the values of the key that it
              names where all are positive numbers (whole numbers stay whole); else one of the listed ones  (2)

rounded to three significant digits within their span, so that names are short and equal draws share a run. Trial n is
drawn by a TPE sampler seeded with (seed, n) that sees the trials that have ended. The first ten are draws at random and
always the same ones; later ones too where one run goes at a time.

Resuming: trials are in Optuna's journal ``<output>/search.log``, in a study named by the key of all that results depend
on. Started again, finished trials cost nothing, failed ones are tried again, and the rest of the budget is drawn anew.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keeptune.core.artefact import content_key
from keeptune.core.errors import ArtefactError
from keeptune.experiments.axes import axes_of
from keeptune.experiments.compare_section import Search, missing_extra
from keeptune.experiments.comparison_record import row_of, with_axes
from keeptune.experiments.engine import (
    TaskOf,
    log_outcome,
    only_one,
    run_each,
    run_tasks,
    tasks_of,
)
from keeptune.experiments.entries import Entry, Variation, by_factor, by_value, slug
from keeptune.experiments.front import pareto
from keeptune.experiments.plan_runs import Comparison, RunSpec, list_runs, run_spec
from keeptune.experiments.single_run import Outcome, RunTask

JOURNAL = "search.log"
_ENTRY, _AGAIN = "entry", "again"
_DIGITS = 3


@dataclass(frozen=True)
class Span:
    """Log-uniform between two positive numbers, both included; ``whole`` numbers alone, or any."""

    low: float
    high: float
    whole: bool = False

    def suggest(self, trial: Any, name: str) -> None:
        """Draws a parameter of a trial of Optuna."""
        if self.whole:
            trial.suggest_int(name, int(self.low), int(self.high), log=True)
        else:
            trial.suggest_float(name, self.low, self.high, log=True)

    def rounded(self, number: float) -> float:
        """Returns a drawn number, rounded to three significant digits within the span.

        >>> Span(1e-4, 1e-2).rounded(0.00123456), Span(1e-4, 0.00123461).rounded(0.0012346)
        (0.00123, 0.00123)
        """
        return int(number) if self.whole else min(max(float(f"{number:.{_DIGITS}g}"), self.low), self.high)


def strengths_of(variations: Sequence[Variation]) -> Span | int | None:
    """Returns what the strengths of an entry are drawn from (eq. 2), or how many are listed; None for one alone."""
    if len(variations) == 1:
        return None
    values: list[Any] = [variation.factor for variation in variations]
    if any(factor is None for factor in values):
        keys = {key for variation in variations for key in variation.settings}
        values = [next(iter(v.settings.values())) for v in variations] if len(keys) == 1 else []
    positive = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    if not values or len(positive) < len(values):
        return len(variations)
    return Span(min(values), max(values), all(isinstance(value, int) for value in values))


def spans_of(entry: Entry) -> dict[str, Span | int]:
    """Returns what is drawn for an entry once it is chosen, by parameter; what has one value is left out."""
    rates = [rate for rate in entry.rates if rate is not None]
    spans = {
        "rate": Span(min(rates), max(rates)) if len(rates) > 1 else None,
        "strength": strengths_of(entry.variations),
    }
    return {f"{slug(entry.label)}.{name}": span for name, span in spans.items() if span is not None}


def setting_of(entries: Sequence[Entry], params: Mapping[str, Any]) -> tuple[Entry, Variation, float | None]:
    """Returns the setting that a trial drew: its entry, strength and rate."""
    entry = next(entry for entry in entries if entry.label == params[_ENTRY])
    spans = {name.rpartition(".")[2]: (span, params[name]) for name, span in spans_of(entry).items()}
    rate, variation = entry.rates[0], entry.variations[0]
    match spans.get("rate"):
        case (Span() as span, drawn):
            rate = span.rounded(drawn)
    match spans.get("strength"):
        case (int(), drawn):
            variation = entry.variations[drawn]
        case (Span() as span, drawn) if variation.factor is None:
            variation = by_value(next(iter(variation.settings)), span.rounded(drawn))
        case (Span() as span, drawn):
            variation = by_factor(entry.settings["method"], span.rounded(drawn))
    return entry, variation, rate


def open_study(output: Path, key: str) -> Any:
    """Opens Optuna's study of a key in the journal of a comparison's folder; trials that did not finish are next."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    output.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet_optuna():
            journal = JournalStorage(JournalFileBackend(str(output / JOURNAL)))
            study = optuna.create_study(
                storage=journal, study_name=key, directions=["maximize", "minimize"], load_if_exists=True
            )
            trials = study.get_trials(deepcopy=False)
    except (ValueError, KeyError) as error:
        raise ArtefactError(
            str(output / JOURNAL),
            got=f"{type(error).__name__}: {error}",
            wanted="Optuna's journal of this search",
            next_step="Remove it and start again; finished runs are not repeated.",
        ) from error
    states = optuna.trial.TrialState
    again = {trial.user_attrs.get(_AGAIN) for trial in trials}
    for trial in trials:
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
        if trial.state in (states.RUNNING, states.FAIL) and trial.number not in again:
            study.enqueue_trial(trial.params, user_attrs={_AGAIN: trial.number})
    return study


def ask(study: Any, seed: int, entries: Sequence[Entry]) -> Any:
    """Draws the next trial of a study of :func:`open_study`."""
    import optuna

    trials = study.get_trials(deepcopy=False)
    number = sum(_AGAIN not in trial.user_attrs for trial in trials)  # a trial tried again is the same trial
    with _quiet_optuna():
        drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=drawn, constant_liar=True)
        trial = study.ask()
        label = trial.suggest_categorical(_ENTRY, tuple(entry.label for entry in entries))
        for name, span in spans_of(next(entry for entry in entries if entry.label == label)).items():
            if isinstance(span, Span):
                span.suggest(trial, name)
            else:
                trial.suggest_categorical(name, tuple(range(span)))
    return trial


def run_search(comparison: Comparison, search: Search) -> tuple[tuple[RunSpec, ...], dict[str, Outcome]]:
    """Does what is missing of a search, and the settings on its front with the other seeds.

    Returns:
        Its runs, in the order of the trials, and name to how each ended.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise missing_extra("Optuna") from error
    ends = [spec for spec in list_runs(comparison) if spec.seed == comparison.section.seeds[0]]
    task_of, tasks, _ = tasks_of(comparison, ends)  # the listed settings are the ends of all spans
    spans = [spans_of(entry) for entry in comparison.entries]
    key = content_key([search.seed, spans, [tasks[spec.name].key for spec in ends]])
    with only_one(comparison.output):
        study = open_study(comparison.output, key)
        outcomes = _run_trials(comparison, task_of, study, search)
        specs, values = dict[str, RunSpec](), list[tuple[float, float]]()
        settings: dict[str, tuple[Entry, Variation, float | None]] = {}
        for trial in study.get_trials(deepcopy=False):
            if not trial.params:  # in line, beyond the budget
                continue
            setting = setting_of(comparison.entries, trial.params)
            spec = run_spec(comparison, *setting, comparison.section.seeds[0])
            complete = trial.state.name == "COMPLETE"
            if complete and spec.name not in settings:  # equal draws share a run
                settings[spec.name] = setting
                values.append((trial.values[0], trial.values[1]))
            if complete or spec.name in outcomes:
                specs.setdefault(spec.name, spec)
        front = [setting for setting, on in zip(settings.values(), pareto(values), strict=True) if on]
        others = [run_spec(comparison, *setting, seed) for setting in front for seed in comparison.section.seeds[1:]]
        todo = [*(specs[name] for name in settings), *others]
        outcomes |= run_tasks(comparison, [task_of(spec) for spec in todo])
    return (*specs.values(), *others), outcomes


def _run_trials(comparison: Comparison, task_of: TaskOf, study: Any, search: Search) -> dict[str, Outcome]:
    """Draws and runs trials until the budget is used; returns name to outcome of those of this time."""
    outcomes: dict[str, Outcome] = {}
    done = sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))
    running: dict[int, tuple[Any, RunSpec]] = {}

    def draw() -> Iterator[RunTask]:
        for _ in range(done, search.trials):
            trial = ask(study, search.seed, comparison.entries)
            spec = run_spec(comparison, *setting_of(comparison.entries, trial.params), comparison.section.seeds[0])
            task = task_of(spec)
            running[id(task)] = trial, spec
            yield task

    if done >= search.trials:
        return outcomes
    for number, (task, outcome) in enumerate(run_each(comparison, draw(), lazily=True), start=done + 1):
        trial, spec = running.pop(id(task))
        outcomes[spec.name] = _tell(comparison, study, trial, spec, outcome)
        log_outcome(spec.name, outcomes[spec.name], number, search.trials)
    return outcomes


def _tell(comparison: Comparison, study: Any, trial: Any, spec: RunSpec, outcome: Outcome) -> Outcome:
    """Tells Optuna where a run is on the axes; a run that has no place on them failed."""
    import optuna

    row, section = row_of(spec, outcome), comparison.section
    if row["status"] == "done":
        (row,) = with_axes([row], axes_of(row["benchmarks"], section.learned, section.forgotten))
        if row["learned"] is not None and row["forgotten"] is not None:
            study.tell(trial, [row["learned"], row["forgotten"]])
            return outcome
        row["message"] = f"{spec.name} has no place on the axes: {row['why']}"
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return replace(outcome, status="failed", message=row["message"])


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Hides Optuna's own messages and its warnings of experimental parts."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
