"""Replay: knowledge examples among those of the task."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from keeptune.data.completions import TaskExamples
from keeptune.data.examples import draw_rows
from keeptune.data.knowledge import KnowledgeSet

_log = logging.getLogger(__name__)


def replayed(task: int, share: float) -> int:
    """Returns the number of knowledge examples that make up a share of the whole; at least 1 for a share above 0.

    Law: ``replayed(n, s) / (n + replayed(n, s))`` is s, to the nearest example.

    >>> replayed(95, 0.05), replayed(10, 0.0), replayed(3, 0.01)
    (5, 0, 1)
    """
    return max(round(task * share / (1 - share)), 1) if share > 0 else 0


def with_replay(task: TaskExamples, knowledge: Sequence[KnowledgeSet], share: float, seed: int) -> TaskExamples:
    """Returns a task with a share of knowledge mixed in, evenly spread; each set in proportion to its size.

    Texts without a prompt become completions of an empty prompt. Knowledge is drawn without replacement, and again
    from the start when all of it was drawn; the examples of the task keep their order.
    """
    wanted = replayed(len(task), share)
    if not wanted:
        return task
    held = [pair for part in knowledge for pair in part.pairs]
    drawn: list[int] = []
    rounds = 0
    while len(drawn) < wanted:
        drawn += draw_rows(len(held), wanted - len(drawn), seed + rounds)
        rounds += 1
    if rounds > 1:
        _log.warning(
            "replay: %d of %d knowledge examples are wanted: they come up to %d times", wanted, len(held), rounds
        )
    pairs = list(zip(task.prompts, task.completions, strict=True))
    total = len(pairs) + wanted
    places = {(2 * number + 1) * total // (2 * wanted): held[row] for number, row in enumerate(drawn)}
    rest = iter(pairs)
    mixed = [places[place] if place in places else next(rest) for place in range(total)]
    _log.info("replay: %d of %d training examples are knowledge", wanted, total)
    prompts, completions = zip(*mixed, strict=True)
    return TaskExamples(prompts, completions)
