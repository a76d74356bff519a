"""Replay: knowledge examples among those of the task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from keeptune.data.completions import TaskExamples
from keeptune.data.examples import LanguageExamples, Mixed, draw_rows

_log = logging.getLogger(__name__)


def replayed(task: int, share: float) -> int:
    """Returns the number of knowledge examples that make up a share of the whole; at least 1 for a share above 0.

    Law: ``replayed(n, s) / (n + replayed(n, s))`` is s, to the nearest example.

    >>> replayed(95, 0.05), replayed(10, 0.0), replayed(3, 0.01)
    (5, 0, 1)
    """
    return max(round(task * share / (1 - share)), 1) if share > 0 else 0


def with_replay(
    task: LanguageExamples, knowledge: Sequence[LanguageExamples], share: float, seed: int
) -> LanguageExamples:
    """Returns a task with a share of knowledge mixed in, evenly spread; each set in proportion to its size.

    Knowledge is drawn without replacement, and again from the start when all of it was drawn; the examples of the task
    keep their order. After texts of knowledge, too, the end of text is learned.
    """
    wanted = replayed(len(task), share)
    if not wanted:
        return task
    held = [(number, row) for number, part in enumerate(knowledge, start=1) for row in range(len(part))]
    drawn: list[int] = []
    rounds = 0
    while len(drawn) < wanted:
        drawn += draw_rows(len(held), wanted - len(drawn), seed + rounds)
        rounds += 1
    if rounds > 1:
        _log.warning(
            "replay: %d of %d knowledge examples are wanted: they come up to %d times", wanted, len(held), rounds
        )
    total = len(task) + wanted
    places = {(2 * number + 1) * total // (2 * wanted): held[row] for number, row in enumerate(drawn)}
    rest = iter(range(len(task)))
    order = tuple(places[place] if place in places else (0, next(rest)) for place in range(total))
    _log.info("replay: %d of %d training examples are knowledge", wanted, total)
    return Mixed((task, *map(_ended, knowledge)), order)


def _ended(part: LanguageExamples) -> LanguageExamples:
    return replace(part, end=True) if isinstance(part, TaskExamples) else part
