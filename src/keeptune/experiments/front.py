"""The trade-off of learning against forgetting: points over seeds and Pareto fronts.

A point is one setting; its place is the mean over its seeds, with intervals by :mod:`keeptune.core.intervals`. With
(l, f) the learned and forgotten of a point,

    p dominates q  iff  l_p >= l_q and f_p <= f_q, and one of them is strict                              (1)

The front is what nothing dominates; equal points are both on it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keeptune.core.artefact import canonical_json
from keeptune.core.intervals import Estimate, combine
from keeptune.experiments.axes import DIGITS, SIDES

Place = tuple[float, float]
_NO_INTERVAL = (math.nan, math.nan)
SETTING = ("method", "settings", "variant", "learning_rate", "strength")


@dataclass(frozen=True, slots=True)
class Point:
    """One setting: its runs' name without the seed, and their rows of ``runs.json`` by seed."""

    name: str
    rows: tuple[Mapping[str, Any], ...]

    @property
    def label(self) -> str:
        """What it is compared as."""
        return str(self.rows[0]["label"])

    @property
    def places(self) -> dict[int, Place]:
        """Seed to ``(learned, forgotten)``."""
        return {row["seed"]: (row["learned"], row["forgotten"]) for row in self.rows}

    @property
    def place(self) -> Place:
        """Its means."""
        return self.over_seeds("learned").mean, self.over_seeds("forgotten").mean

    def over_seeds(self, side: str) -> Estimate:
        """Combines what it ``"learned"`` or ``"forgotten"`` over its seeds."""
        return spread([row[side] for row in self.rows], [row.get(f"{side}_interval") for row in self.rows])


def spread(values: Sequence[float], intervals: Sequence[tuple[float, float] | None] | None = None) -> Estimate:
    """Combines seeds by the rule of :mod:`keeptune.core.intervals`; equal means are equal numbers.

    >>> spread([1.0, 2.0, 3.0]).sd
    1.0
    """
    ends = [pair or _NO_INTERVAL for pair in intervals or [None] * len(values)]
    estimate = combine([(value, *pair) for value, pair in zip(values, ends, strict=True)])
    assert estimate is not None, "values are finite"
    return replace(estimate, **{end: round(getattr(estimate, end), DIGITS) for end in ("mean", "low", "high")})


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """Returns ``mean``, ``low``, ``high`` and ``sd`` of an estimate; None where there is no number."""
    values = {key: getattr(estimate, key) for key in ("mean", "low", "high", "sd")}
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def points_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Point], list[dict[str, str]]]:
    """Gathers rows of ``runs.json`` into points.

    Returns:
        The points in the order of their first runs, and ``{"run", "why"}`` of the runs left out. Of two runs of one
        setting and seed the first counts.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    excluded = []
    for row in rows:
        setting = canonical_json([row[key] for key in ("label", *SETTING)])
        twin = next((other for other in groups.get(setting, ()) if other["seed"] == row["seed"]), None)
        lacking = [side for side in SIDES if row[side] is None or not math.isfinite(row[side])]
        why = "" if twin is None else f"the same setting and seed as {twin['name']}"
        if row["status"] != "done":
            why = f"{row['status']}: {row['message'] or 'no message'}"
        elif lacking:
            why = row.get("why") or f"{lacking[0]} is not a finite number"
        if why:
            excluded.append({"run": row["name"], "why": why})
        else:
            groups.setdefault(setting, []).append(row)
    taken: set[str] = set()
    return [_point(members, taken) for members in groups.values()], excluded


def _point(members: Sequence[Mapping[str, Any]], taken: set[str]) -> Point:
    plain = str(members[0]["name"]).replace(f"-seed{members[0]['seed']}", "")
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain} ({number})", number + 1
    taken.add(name)
    return Point(name, tuple(sorted(members, key=lambda row: row["seed"])))


def families(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Gathers points by label; a label of variants also has the points it was made from (scale 1)."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.label, []).append(point)
    for members in groups.values():
        sources = {point.rows[0]["of"] for point in members} - {None}
        members += [point for point in points if point.label in sources and point not in members]
    return groups


def pareto(places: Sequence[Place]) -> list[bool]:
    """Returns which places nothing dominates, eq. 1.

    Laws: a dominated place changes nothing; the order does not matter; equal places are all on the front or all off.
    """
    return [
        not any(l >= learned and f <= forgotten and (l, f) != (learned, forgotten) for l, f in places)  # noqa: E741
        for learned, forgotten in places
    ]


def places_by_seed(points: Sequence[Point]) -> dict[int | None, list[Place]]:
    """Returns the places of points by seed that all have, sorted; under None their means, where no seed is common."""
    seeds = sorted(set.intersection(*(set(point.places) for point in points)))
    by_seed: dict[int | None, list[Place]] = {seed: [point.places[seed] for point in points] for seed in seeds}
    return by_seed or {None: [point.place for point in points]}
