"""Forgetting at matched task score: what each label forgets where all learn the same.

For a label's front of places sorted by what they learned, l_1 < l_2 < ... (so f_1 < f_2 < ...), and a wanted score s,

    f(s) = f_i                                                      s = l_i          exact                 (1)
    f(s) = f_i + (s - l_i) / (l_{i+1} - l_i) * (f_{i+1} - f_i)      l_i < s < l_{i+1}  interpolated        (2)
    f(s) <= f_1                                                     s < l_1          above                 (3)
    none                                                            s > max l_i      not reached           (4)

Nothing is extrapolated: (3) is a place that learned more than s, and its forgetting is given as the bound it is. A
front is taken seed by seed over the seeds that all points of the label have, then mean and t-interval over seeds; a
label that misses the score with one of them does not reach it. Each seed's front takes the luckiest of its settings,
for every label alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keeptune.core.errors import need_known
from keeptune.experiments.front import Place, Point, as_json, pareto, places_by_seed, spread

How = Literal["exact", "interpolated", "above", "not reached"]
_ORDER: tuple[How, ...] = ("exact", "interpolated", "above", "not reached")


@dataclass(frozen=True, slots=True)
class At:
    """A front at a score: which of the equations 1 to 4, what was forgotten, and the places that it is read off."""

    how: How
    forgotten: float | None
    used: tuple[int, ...] = ()


def forgotten_at(places: Sequence[Place], score: float) -> At:
    """Reads off what was forgotten at a score, eqs. 1 to 4, from ``(learned, forgotten)`` of a label.

    Laws: between two places of the front the value lies between theirs; a dominated place changes nothing; the order
    does not matter.

    >>> forgotten_at([(0.5, 0.0), (0.7, 0.2)], 0.6).how
    'interpolated'
    """
    kept = pareto(places)
    front = sorted((*places[index], index) for index in range(len(places)) if kept[index])
    same = [entry for entry in front if entry[0] == score]
    if same:
        return At("exact", same[0][1], tuple(entry[2] for entry in same))
    below, above = [e for e in front if e[0] < score], [e for e in front if e[0] > score]
    if not above:
        return At("not reached", None)
    (high, most, right) = above[0]
    if not below:
        return At("above", most, (right,))
    (low, least, left) = below[-1]
    return At("interpolated", least + (score - low) / (high - low) * (most - least), (left, right))


def reach(points: Sequence[Point]) -> float:
    """Returns how much a label learned at most, with every seed: over the means where no seed is common."""
    return min(max(learned for learned, _ in places) for places in places_by_seed(points).values())


def default_score(groups: Mapping[str, Sequence[Point]]) -> float:
    """Returns the highest score that more than half of the labels reach."""
    return sorted((reach(points) for points in groups.values()), reverse=True)[len(groups) // 2]


def matched(groups: Mapping[str, Sequence[Point]], score: float | None, baseline: str | None) -> dict[str, Any]:
    """Returns the table at matched task score, with each label's difference to a baseline.

    Without a ``score`` it is :func:`default_score`. The others are compared with the label ``baseline``, seed by
    seed; RecipeError where it is none.

    Returns:
        ``score``, ``baseline`` and ``rows``: per label what was ``forgotten`` (None where the score is not reached),
        ``how``, the ``points`` it is read off, ``values`` by seed, and the paired ``difference`` to the baseline.
    """
    if not groups:
        return {"score": None, "baseline": baseline, "rows": []}
    if baseline is not None:
        need_known(baseline, groups, "compare.baseline", "a label")
    score = default_score(groups) if score is None else score
    rows = [_row(label, points, score) for label, points in groups.items()]
    own = next((row for row in rows if row["label"] == baseline), None)
    for row in rows:
        row["difference"] = None if own is None or row is own else _difference(row, own)
    rows.sort(key=lambda row: (row["forgotten"] is None, row["forgotten"]["mean"] if row["forgotten"] else 0.0))
    return {"score": score, "baseline": baseline, "rows": rows}


def _row(label: str, points: Sequence[Point], score: float) -> dict[str, Any]:
    at = {seed: forgotten_at(places, score) for seed, places in places_by_seed(points).items()}
    values = {seed: one.forgotten for seed, one in at.items() if one.forgotten is not None}
    missed = [seed for seed in at if seed not in values]
    used = sorted({index for one in at.values() for index in one.used})
    seeds = [seed for seed in at if seed is not None]  # none: the front of the points' means, without an interval
    return {
        "label": label,
        "forgotten": None if missed else as_json(spread(list(values.values()))),
        "how": max((one.how for one in at.values()), key=_ORDER.index),
        "points": [points[index].name for index in used],
        "seeds": seeds,
        "not_reached": missed if seeds else [],
        "values": {str(seed): value for seed, value in values.items()} if seeds else {},
    }


def _difference(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any] | None:
    seeds = [seed for seed in row["values"] if seed in baseline["values"]]
    if row["forgotten"] is None or baseline["forgotten"] is None or not seeds:
        return None
    over = spread([row["values"][seed] - baseline["values"][seed] for seed in seeds])
    return {**as_json(over), "seeds": [int(seed) for seed in seeds]}
