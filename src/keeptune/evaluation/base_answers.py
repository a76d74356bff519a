"""Answers of a base model on disk, so that the runs of a comparison compute them once.

Laws: what is read back equals what was computed, bit for bit; a damaged file is computed again, never used.

Only answers that need the base alone are kept: generated texts and log-likelihoods. A benchmark that also measures
KL(base || tuned), a cross-entropy or one of the task, needs the logits of both: its base is run each time for that.
A classifier's base has a head drawn with the run's seed and is run each time as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keeptune.core.artefact import content_key, read_json, write_json
from keeptune.core.errors import ArtefactError
from keeptune.core.locks import locked
from keeptune.core.processes import by_first, held_by_first, is_first

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """A folder with the answers of one base, a file per benchmark."""

    folder: Path
    base: str  # names all that the answers depend on besides benchmark and tokens: weights and device

    def get(self, name: str, parts: Any, count: int, compute: Callable[[], list[T]]) -> list[T]:
        """Reads the base's answers, or computes and writes them; several runs compute them once.

        Args:
            name: The benchmark.
            parts: What the answers depend on besides the base.
            count: Number of answers.
            compute: Runs the base; its answers are held as JSON.
        """
        key = content_key([self.base, parts])
        path = self.folder / f"{name}-{key[:16]}.json"
        with held_by_first(locked(path.with_suffix(".lock"))):
            answers: list[T] | None = by_first(lambda: _read(path, key, count))
            if answers is None:
                answers = compute()
                if is_first():
                    write_json(path, {"key": key, "answers": answers, "check": content_key(answers)})
            return answers


def _read(path: Path, key: str, count: int) -> list[T] | None:
    if not path.is_file():
        return None
    reason = "its contents are not those of its key"
    try:
        record = read_json(path)
        answers: list[T] = record["answers"]
        if record["key"] == key and len(answers) == count and record["check"] == content_key(answers):
            _log.info("evaluate: the base's answers taken from %s", path)
            return answers
    except (ArtefactError, KeyError, TypeError) as error:
        reason = str(error)
    _log.warning("evaluate: %s is damaged (%s); the base is run again", path, reason)
    return None
