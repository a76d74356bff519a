"""One run of a comparison: the stages of a run without its page, and the mark that says it is finished.

The run's folder has, beside the stages' files, ``run.json`` (whether it is done or why it failed, under a key of all
that it depends on) and ``log.txt``. A finished run costs the reading of its mark; of an unfinished one the stages that
are done are not repeated.
"""

import contextlib
import gc
import logging
import logging.handlers
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from keeptune.core.artefact import as_written, content_key, file_fingerprint, read_json, write_json
from keeptune.core.errors import KeeptuneError
from keeptune.core.locks import owned
from keeptune.core.processes import by_first, held_by_first, met_by_all, world
from keeptune.core.redaction import redacted
from keeptune.evaluation.model_pairs import KeptAnswers
from keeptune.experiments.posthoc_variants import VARIANTS, Variant, score_variants
from keeptune.pipeline.cache import read_record
from keeptune.pipeline.export import export_stage
from keeptune.pipeline.run import plan_stage, start
from keeptune.pipeline.scoring import evaluate_stage, find_result, result_fingerprint
from keeptune.pipeline.training import train_stage
from keeptune.recipe.schema import Recipe

_log = logging.getLogger(__name__)
MARK = "run.json"
_CHANGE_NO_RESULT = ("output", "store", "store_limit", "device", "memory")


@dataclass(frozen=True)
class RunTask:
    """A run as a worker gets it.

    The ``key`` is of all that its result depends on, ``base`` the base's fingerprint, whose answers are ``shared`` in
    the comparison's folder; ``threads`` of None leaves torch's setting.
    """

    name: str
    recipe: Recipe
    key: str
    base: str
    shared: Path
    threads: int | None = None
    variants: Sequence[Variant] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with what message and warnings, after how many seconds (0 if it was done), on which node."""

    status: Literal["done", "failed", "missing"]
    message: str = ""
    seconds: float = 0.0
    warnings: Sequence[str] = field(default_factory=tuple)
    node: str = ""


def task_key(recipe: Recipe, base: str, known: dict[str, str]) -> str:
    """Returns the key of all that a run's result depends on; ``known`` has fingerprints of data files by path."""
    scored = [getattr(entry, "file", None) or getattr(entry, "data", None) for entry in recipe.evaluate]
    given = [*recipe.data_files, *scored]
    paths = [str(path) for path in given if path is not None]
    for path in paths:
        if path not in known:
            data = Path(path)
            parts = sorted(data.rglob("*")) if data.is_dir() else [data]
            files = [part for part in parts if part.is_file()]
            known[path] = file_fingerprint(files) if files else ""
    plain = {key: value for key, value in recipe.written().items() if key not in _CHANGE_NO_RESULT}
    return content_key([plain, [known[path] for path in paths], base])


def finished(task: RunTask) -> bool:
    """Returns whether a run is done, and its records are as they were written and of its result."""
    folder = task.recipe.output
    try:
        with as_written(folder):
            mark = read_json(folder / MARK)
            if (mark["key"], mark["status"]) != (task.key, "done"):
                return False
            variants = [folder / VARIANTS / variant.slug for variant in task.variants]
            parts = [folder / "recipe.json", folder / "trained" / "train.json"]
            for path in [*parts, *(place / "variant.json" for place in variants)]:
                read_json(path)
            places = [folder / "evaluation", *(place for place in variants if any(place.glob("*.items.jsonl")))]
            scores = [place / f"{benchmark.name}.json" for place in places for benchmark in task.recipe.evaluate]
            return {read_record(path)["weights"] for path in scores} <= {result_fingerprint(find_result(folder))}
    except KeeptuneError:
        return False


def attempt(task: RunTask) -> Outcome:
    """Does a run, or what is left of it; a failure is recorded in its folder until the next try.

    Of several processes all have to meet it: that of one ends all.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    started = time.perf_counter()
    folder = task.recipe.output
    message = ""
    warned: list[str] = []
    try:
        with held_by_first(_held(folder, warned)):
            if by_first(lambda: finished(task)):  # by another worker that had an equal run
                return Outcome("done")
            try:
                _stages(task)
            except (KeeptuneError, RuntimeError, ValueError, OSError) as error:
                message = str(error)
                if not met_by_all(f"{task.name}: {message}"):
                    raise
                if not isinstance(error, KeeptuneError):  # a library's: out of memory, no convergence
                    _log.warning("%s: %s", task.name, error, exc_info=True)
                    message = f"{type(error).__name__}: {error}"
            mark = {"key": task.key, "status": "failed" if message else "done", "message": message}
            by_first(lambda: write_json(folder / MARK, mark))
    except (KeeptuneError, OSError) as error:  # the folder cannot be written: the message has no place there
        if world() > 1:
            raise
        message = message or str(error)
    finally:
        gc.collect()  # give back the models' memory, for the next run of this process and for those of others
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - started
    return Outcome("failed" if message else "done", message, seconds, tuple(warned))


def _stages(task: RunTask) -> None:
    job = start(task.recipe)
    plan = plan_stage(job)
    train_stage(job, plan)
    export_stage(job, plan)
    kept = KeptAnswers(task.shared / "base", content_key([task.base, job.device]))
    evaluate_stage(job, kept=kept)
    if task.variants:
        score_variants(job, task.variants, kept=kept)


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextlib.contextmanager
def _held(folder: Path, warned: list[str]) -> Iterator[None]:
    """Locks a run's folder and writes its log there, warnings of libraries included; the warnings go to a list too."""
    logger = logging.getLogger("keeptune")
    with owned(folder, wait=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        file.setFormatter(_Redacted("%(asctime)s %(levelname)s %(message)s"))
        buffer = logging.handlers.BufferingHandler(10**6)
        buffer.setLevel(logging.WARNING)
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(file)
        logger.addHandler(buffer)
        try:
            yield
        finally:
            warned += [record.getMessage() for record in buffer.buffer]
            logger.setLevel(level)
            logger.removeHandler(file)
            logger.removeHandler(buffer)
            file.close()
