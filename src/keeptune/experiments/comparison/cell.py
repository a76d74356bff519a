"""One cell: the stages of a run without its page, and the mark that says it is finished.

A cell's folder is a run folder, with ``cell.json`` (whether it is done or why it failed, under a key made of all that
it depends on) and ``log.txt`` beside the stages' files. Asked again, a finished cell costs the reading of its mark; of
an unfinished one the stages that are there are not repeated.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from keeptune.core.artefact import content_key, file_fingerprint, has_key, read_json, write_json
from keeptune.core.errors import KeeptuneError
from keeptune.core.locks import locked
from keeptune.evaluation.base_answers import KeptAnswers
from keeptune.experiments.comparison.knobs import knob_of
from keeptune.experiments.comparison.turned import KNOBS, knobs_stage
from keeptune.pipeline.run import export_stage, plan_stage, start, train_stage
from keeptune.pipeline.scoring import evaluate_stage, find_result
from keeptune.recipe.schema import Recipe

__all__ = ["Outcome", "Work", "attempt", "finished", "work_of"]

_log = logging.getLogger(__name__)
_MARK = "cell.json"
_BASE = "base"


@dataclass(frozen=True)
class Work:
    """A cell as a worker gets it.

    Args:
        name: Its name.
        recipe: The run's recipe.
        key: Of all that its result depends on.
        base: Fingerprint of the base.
        shared: The comparison's folder, where the base's answers are.
        threads: How many threads it may use.
        knobs: What is turned on its result (:mod:`keeptune.experiments.comparison.knobs`), as JSON.
    """

    name: str
    recipe: Recipe
    key: str
    base: str
    shared: Path
    threads: int = 1
    knobs: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Args:
        status: ``"done"``, ``"failed"``, or ``"missing"`` where it was not tried.
        message: Why it failed.
        seconds: How long it took this time; 0 where it was finished already.
        warnings: What its log warned of.
        node: Of the cluster, where it ran.
        knobs: What is turned on its result.
    """

    status: Literal["done", "failed", "missing"]
    message: str = ""
    seconds: float = 0.0
    warnings: Sequence[str] = field(default_factory=tuple)
    node: str = ""
    knobs: Sequence[Mapping[str, Any]] = ()


def work_of(name: str, recipe: Recipe, base: str, shared: Path, threads: int, known: dict[str, str]) -> Work:
    """Name all that a cell depends on.

    Args:
        name: Its name.
        recipe: Its recipe.
        base: Fingerprint of the base.
        shared: The comparison's folder.
        threads: How many threads it may use.
        known: Fingerprints of data files by path; those of new ones are added.

    Returns:
        The cell for a worker.
    """
    data = []
    for path in _data_files(recipe):
        if path not in known:
            known[path] = _fingerprint(Path(path))
        data.append(known[path])
    where = ("output", "store", "device", "low_memory")  # these change no result
    plain = {key: value for key, value in recipe.written().items() if key not in where}
    return Work(name, recipe, content_key([plain, data, base]), base, shared, threads)


def _data_files(recipe: Recipe) -> list[str]:
    scored = [getattr(entry, "file", None) or getattr(entry, "data", None) for entry in recipe.evaluate]
    found = [*(part.file for part in recipe.knowledge_sets), recipe.task.train, *scored]
    return [str(path) for path in found if path is not None]


def _fingerprint(path: Path) -> str:
    if path.is_dir():
        return file_fingerprint(sorted(part for part in path.rglob("*") if part.is_file()))
    return file_fingerprint([path]) if path.is_file() else ""


def finished(work: Work) -> bool:
    """Say whether a cell is done and its result is there.

    Args:
        work: The cell.

    Returns:
        Whether nothing is left to do.
    """
    folder = work.recipe.output
    try:
        if not has_key(folder / _MARK, work.key) or read_json(folder / _MARK)["status"] != "done":
            return False
        scores = [folder / "evaluation" / f"{benchmark.name}.json" for benchmark in work.recipe.evaluate]
        turned = [folder / KNOBS / knob_of(knob).slug / "knob.json" for knob in work.knobs]
        return find_result(folder).is_dir() and all(path.is_file() for path in (*scores, *turned))
    except (KeeptuneError, KeyError, OSError):
        return False


def attempt(work: Work) -> Outcome:
    """Run a cell, or what is left of it; a failure is told, and kept in its folder until the next try.

    Args:
        work: The cell.

    Returns:
        How it ended.
    """
    torch.set_num_threads(work.threads)
    started = time.perf_counter()
    folder = work.recipe.output
    message = ""
    said: list[str] = []
    try:
        with locked(folder / ".lock"), _logged(folder / "log.txt", said):
            try:
                _stages(work)
            except KeeptuneError as error:
                message = str(error)
            except (RuntimeError, ValueError, OSError) as error:  # a library's: out of memory, no convergence
                _log.warning("%s: %s", work.name, error, exc_info=True)
                message = f"{type(error).__name__}: {error}"
            outcome = Outcome("failed" if message else "done", message, time.perf_counter() - started, tuple(said))
            write_json(folder / _MARK, {"key": work.key, "status": outcome.status, "message": message})
    except (KeeptuneError, OSError) as error:  # the folder cannot be written: the message has no other place than this
        return Outcome("failed", message or str(error), time.perf_counter() - started, tuple(said))
    finally:
        _let_go()
    return outcome


def _stages(work: Work) -> None:
    job = start(work.recipe)
    plan = plan_stage(job)
    train_stage(job, plan)
    export_stage(job, plan)
    kept = KeptAnswers(work.shared / _BASE, content_key([work.base, job.device]))
    evaluate_stage(job, kept=kept)
    if work.knobs:
        knobs_stage(job, [knob_of(knob) for knob in work.knobs], kept=kept)


def _let_go() -> None:
    """Give back the memory of the models, for the next cell of this process and for those of others."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Said(logging.Handler):
    """Keeps the text of warnings."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _logged(path: Path, said: list[str]) -> Iterator[None]:
    """Write the log of a cell into its folder, and warnings of libraries with it."""
    logger = logging.getLogger("keeptune")
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file, _Said(said)]
    level = logger.level
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
        file.close()
