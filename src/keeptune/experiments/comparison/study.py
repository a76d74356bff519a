"""What Optuna is told of a search: the trials that have ended, from a journal, and the sampler of the next."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.artefact import has_key, read_json
from keeptune.core.errors import KeeptuneError
from keeptune.experiments.comparison.space import ENTRY, dimensions

__all__ = ["JOURNAL", "Trial", "new_study", "quiet_optuna", "read_journal"]

_log = logging.getLogger(__name__)
JOURNAL = "search.json"
_AXES = ("learned", "forgotten")
_ENTROPY = 2**32


@dataclass(frozen=True)
class Trial:
    """A trial that has ended.

    Args:
        params: What Optuna drew.
        drawn: What was made of it: ``entry``, ``rate`` and ``strength``.
        cell: Name of its cell.
        learned: None where it failed.
        forgotten: None where it failed.
        message: Why it failed.
        seconds: How long it took.
    """

    params: Mapping[str, Any]
    drawn: Mapping[str, Any]
    cell: str
    learned: float | None = None
    forgotten: float | None = None
    message: str = ""
    seconds: float = 0.0


def read_journal(output: Path, key: str | None = None) -> list[Trial]:
    """Read the trials that have ended.

    Args:
        output: The comparison's folder.
        key: Of the search; None takes any.

    Returns:
        The trials; none where there is no journal or it is another search's.
    """
    path = output / JOURNAL
    if not path.is_file():
        return []
    try:
        if key is not None and not has_key(path, key):
            _log.warning("search: %s is of another search (space, seed, recipe, data or base) and is left aside", path)
            return []
        return [Trial(**trial) for trial in read_json(path)["trials"]]
    except (KeeptuneError, KeyError, TypeError) as error:
        _log.warning("search: %s cannot be read and is left aside: %s", path, error)
        return []


def new_study(seed: int, ended: Sequence[Trial], again: Sequence[Trial], entries: Sequence[Any]) -> tuple[Any, Any]:
    """Make Optuna's study, with the trials that have ended told and those that failed next in line.

    Args:
        seed: Of the search.
        ended: Finished trials, in their order.
        again: What is tried first.
        entries: The comparison's entries.

    Returns:
        The storage that holds the study, which is named ``search``, and the sampler.
    """
    import optuna

    storage = optuna.storages.InMemoryStorage()
    sampler = _sampler(seed)
    with quiet_optuna():
        study = optuna.create_study(
            storage=storage, sampler=sampler, study_name="search", directions=["maximize", "minimize"]
        )
        for trial in ended:
            assert trial.learned is not None and trial.forgotten is not None, "failed trials are in `again`"
            own = dimensions(entries, trial.params[ENTRY])
            study.add_trial(
                optuna.trial.create_trial(
                    values=[trial.learned, trial.forgotten],
                    params=dict(trial.params),
                    distributions={name: dimension.distribution() for name, dimension in own.items()},
                )
            )
        for trial in again:
            study.enqueue_trial(dict(trial.params))
    return storage, sampler


def _sampler(seed: int) -> Any:
    """Seed each trial by its number, so that what is drawn next rests on no state but the trials that have ended."""
    import numpy as np
    import optuna

    class ByNumber(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self.own: Any = None

        def __reduce__(self) -> Any:  # Tune pickles its searcher, and pickle finds no class of a function
            return _sampler, (seed,)

        def before_trial(self, study: Any, trial: Any) -> None:
            drawn = int(np.random.SeedSequence([seed, trial.number]).generate_state(1)[0]) % _ENTROPY
            with quiet_optuna():
                self.own = optuna.samplers.TPESampler(seed=drawn, constant_liar=True)
            self.own.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self.own.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self.own.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.own.sample_independent(study, trial, param_name, param_distribution)

    return ByNumber()


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's own messages and its warnings of experimental parts to itself.

    Yields:
        Nothing.
    """
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
