"""What the base answered, kept for the next run on it: the runs of a comparison ask their base once.

Laws: what is read back equals what was computed, bit for bit; a damaged file is computed again, never used.

Only answers that need the base alone are kept: generated texts and log-likelihoods. A cross-entropy benchmark also
tells KL(base || tuned), which needs the logits of both at every token, so its base is run again for each tuned model.
A classifier's base has a head drawn with the run's seed and is run again as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keeptune.core.artefact import content_key, read_json, write_json
from keeptune.core.errors import ArtefactError
from keeptune.core.locks import locked
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.tokenized import Tokens

__all__ = ["KeptAnswers"]

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """A folder with the answers of one base, a file per benchmark.

    Args:
        folder: The folder.
        base: Names all that its answers depend on besides benchmark and tokens: weights and device.
    """

    folder: Path
    base: str

    def get(self, benchmark: Benchmark, sequences: Sequence[Tokens], compute: Callable[[], list[T]]) -> list[T]:
        """Read the base's answers, or have them computed and keep them; several processes compute them once.

        Args:
            benchmark: The benchmark.
            sequences: What the base reads.
            compute: Asks the base.

        Returns:
            What ``compute`` gives: a text or a number per sequence.
        """
        parts = [benchmark, [[tokens.ids, tokens.start] for tokens in sequences]]
        return self.recall(benchmark.name, parts, len(sequences), compute)

    def recall(self, name: str, parts: Any, count: int, compute: Callable[[], list[T]]) -> list[T]:
        """Read answers, or have them computed and keep them.

        Args:
            name: The benchmark.
            parts: What the answers depend on besides the base.
            count: How many there are.
            compute: Asks the base.

        Returns:
            What ``compute`` gives, which JSON must be able to hold.
        """
        key = content_key([self.base, parts])
        path = self.folder / f"{name}-{key[:16]}.json"
        with locked(path.with_suffix(".lock")):
            found: list[T] | None = _read(path, key, count)
            if found is None:
                found = compute()
                write_json(path, {"key": key, "answers": found, "check": content_key(found)})
            return found


def _read(path: Path, key: str, count: int) -> list[T] | None:
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        answers: list[T] = record["answers"]
        if record["key"] == key and len(answers) == count and record["check"] == content_key(answers):
            _log.info("evaluate: the base's answers taken from %s", path)
            return answers
    except (ArtefactError, KeyError, TypeError) as error:
        _log.warning("evaluate: %s is damaged (%s); the base is asked again", path, error)
        return None
    _log.warning("evaluate: %s is damaged; the base is asked again", path)
    return None
