"""Mixtures: knowledge examples among those of the task (replay), and the examples of several files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from keeptune.core.errors import RecipeError
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


def mixture(parts: Sequence[LanguageExamples], weights: Sequence[float | None], seed: int) -> Mixed:
    """Returns the examples of several files in a drawn order: all of them, or with weights as many as these say.

    Law: with weights the counts are in their ratio, to the nearest example (at least 1), and as large as they can be
    without an example that comes twice; which of a file are taken is drawn with the seed.

    Args:
        parts: The examples of each file.
        weights: The share of each file, relative to the others; all None for all examples.
        seed: Of the draws and of the order.

    Raises:
        RecipeError: Some files have weights and some have none.
    """
    given = [weight for weight in weights if weight is not None]
    counts = [len(part) for part in parts]
    if 0 < len(given) < len(parts):
        got, wanted = f"{len(given)} weights for {len(parts)} files", "a weight for each file, or none"
        raise RecipeError("task.train", got=got, wanted=wanted, next_step="Complete the weights, or remove them.")
    if given:
        scale = min(count / weight for count, weight in zip(counts, given, strict=True))
        counts = [max(round(scale * weight), 1) for weight in given]
    taken = [
        (number, row)
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        for row in draw_rows(len(part), count, seed + number)
    ]
    told = (f"{count} of {len(part)} from {part.where}" for count, part in zip(counts, parts, strict=True))
    _log.info("task.train: %s", ", ".join(told))
    return Mixed(tuple(parts), tuple(taken[place] for place in draw_rows(len(taken), len(taken), seed)))


def _ended(part: LanguageExamples) -> LanguageExamples:
    return replace(part, end=True) if isinstance(part, TaskExamples) else part
