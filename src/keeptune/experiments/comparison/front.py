"""The trade-off of learning against forgetting: points over seeds, Pareto fronts, hypervolumes.

A point is one setting; its place is the mean over its seeds. With (l, f) the learned and forgotten of a point,

    p dominates q  iff  l_p >= l_q and f_p <= f_q, and one of them is strict                              (1)

The front is what nothing dominates; equal points are both on it. The hypervolume of points P with the reference point
(l0, f0) is the area that they dominate and that dominates the reference (Zitzler and Thiele, IEEE TEC 1999):

    HV(P) = area of the union over p in P of [l0, l_p] x [f_p, f0]                                         (2)

computed by moocore. The reference point is one for all labels: the base's own score on the task, and the most that any
scored cell forgot, at least 0; or the one given. The hypervolume of a label is taken seed by seed, over the seeds that
all its points have. A label with more points has had more tries at a large one; the hypervolume at equal tries is the
mean over all choices of m of its points (over 500 seeded ones where there are more), m being the least number of points
that a label has.

The interval of a mean over seeds is Student's: with 3 seeds a bootstrap has 10 different resamples only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from keeptune.core.artefact import canonical_json
from keeptune.core.errors import KeeptuneError
from keeptune.experiments.comparison.axes import DIGITS, Axes, base_score

__all__ = [
    "Place",
    "Point",
    "Spread",
    "common_seeds",
    "families",
    "hypervolume",
    "hypervolumes",
    "no_trade_off",
    "pareto",
    "points_of",
    "reference_point",
    "spread",
]

_log = logging.getLogger(__name__)

Place = tuple[float, float]
_CHOICES = 500


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds with its spread.

    Args:
        mean: The mean.
        low: Lower end of its 95% interval; None with one seed.
        high: Upper end; None with one seed.
        sd: Standard deviation over the seeds (n - 1 below); None with one seed.
    """

    mean: float
    low: float | None
    high: float | None
    sd: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """One setting with its seeds.

    Args:
        name: Its cells' name without the seed.
        label: What it is compared as.
        about: ``method``, ``settings``, ``knob``, ``learning_rate`` and ``strength`` of its cells.
        places: Seed to ``(learned, forgotten)``.
        cells: Seed to the cell's name.
        of: The label of the cells that its knob was turned on; None without a knob.
    """

    name: str
    label: str
    about: Mapping[str, Any]
    places: Mapping[int, Place]
    cells: Mapping[int, str] = field(default_factory=dict)
    of: str | None = None

    @property
    def learned(self) -> Spread:
        """What it learned, over its seeds."""
        return spread([learned for learned, _ in self.places.values()])

    @property
    def forgotten(self) -> Spread:
        """What it forgot, over its seeds."""
        return spread([forgotten for _, forgotten in self.places.values()])

    @property
    def place(self) -> Place:
        """Its means."""
        return self.learned.mean, self.forgotten.mean


def spread(values: Sequence[float]) -> Spread:
    """Take the mean of some seeds, with Student's 95% interval and the standard deviation.

    Laws: the order of the values does not matter; values that are all equal give a point.

    Args:
        values: One per seed, at least one.

    Returns:
        The mean and its spread.

    >>> spread([1.0, 2.0, 3.0]).sd
    1.0
    """
    mean = round(math.fsum(values) / len(values), DIGITS)
    if len(values) < 2:
        return Spread(mean, None, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half, sd)


def points_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Point], list[dict[str, str]]]:
    """Gather cells into points, and say which cells are in none.

    Args:
        rows: Cells, each with ``name``, ``label``, ``method``, ``settings``, ``learning_rate``, ``strength``, ``knob``,
            ``seed``, ``status``, ``message``, ``learned`` and ``forgotten``; perhaps ``of`` and ``why`` (why a value is
            missing).

    Returns:
        The points in the order of their first cells, and ``{"cell", "why"}`` of the cells left out. Of two cells of
        one setting and seed the first counts.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    excluded = []
    for row in rows:
        why = _unusable(row)
        if why:
            excluded.append({"run": row["name"], "why": why})
            continue
        members = groups.setdefault(_setting(row), [])
        twin = next((other for other in members if other["seed"] == row["seed"]), None)
        if twin is not None:
            excluded.append({"run": row["name"], "why": f"the same setting and seed as {twin['name']}"})
            continue
        members.append(row)
    taken: set[str] = set()
    return [_point(members, taken) for members in groups.values()], excluded


def _unusable(row: Mapping[str, Any]) -> str:
    if row["status"] != "done":
        return f"{row['status']}: {row.get('message') or 'no message'}"
    for key in ("learned", "forgotten"):
        value = row.get(key)
        if value is None or not math.isfinite(value):
            return str(row.get("why") or f"{key} is {'missing' if value is None else 'not a finite number'}")
    return ""


def _setting(row: Mapping[str, Any]) -> str:
    return canonical_json([row[key] for key in ("label", "settings", "variant", "learning_rate", "strength")])


def _point(members: Sequence[Mapping[str, Any]], taken: set[str]) -> Point:
    first = members[0]
    plain = str(first["name"]).replace(f"-seed{first['seed']}", "")
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain} ({number})", number + 1
    taken.add(name)
    rows = sorted(members, key=lambda row: row["seed"])
    return Point(
        name=name,
        label=first["label"],
        about={key: first[key] for key in ("method", "settings", "variant", "learning_rate", "strength")},
        places={row["seed"]: (row["learned"], row["forgotten"]) for row in rows},
        cells={row["seed"]: row["name"] for row in rows},
        of=first.get("of"),
    )


def families(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Gather points by label; a label of turned knobs also has the untouched points it was made from (scale 1).

    Args:
        points: The points.

    Returns:
        Label to its points.
    """
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.label, []).append(point)
    for members in found.values():
        sources = {point.of for point in members} - {None}
        members += [point for point in points if point.label in sources and point not in members]
    return found


def pareto(places: Sequence[Place]) -> list[bool]:
    """Say which places nothing dominates, eq. 1.

    Laws: a dominated place changes nothing; the order does not matter; equal places are all on the front or all off.

    Args:
        places: ``(learned, forgotten)`` each, finite.

    Returns:
        One truth value per place.
    """
    if not places:
        return []
    found = _moocore().is_nondominated(np.array(places, dtype=float), maximise=[True, False], keep_weakly=True)
    return [bool(value) for value in found]


def hypervolume(places: Sequence[Place], reference: Place) -> float:
    """Compute the area that places dominate up to a reference point, eq. 2.

    Laws: a dominated place adds nothing; the order does not matter; scaling an axis by c scales the area by c; a place
    that is not better than the reference on both axes adds nothing.

    Args:
        places: ``(learned, forgotten)`` each, finite.
        reference: Less learned and more forgotten than what should count.

    Returns:
        The area.
    """
    if not places:
        return 0.0
    points = np.array(places, dtype=float)
    return float(_moocore().hypervolume(points, ref=np.array(reference, dtype=float), maximise=[True, False]))


def reference_point(rows: Iterable[Mapping[str, Any]], axes: Axes, points: Sequence[Point]) -> Place | None:
    """Fix the reference point by the data: the base's score on the task, and the most that any cell forgot.

    Args:
        rows: Cells with their ``benchmarks``.
        axes: The axes.
        points: What was scored.

    Returns:
        ``(learned, forgotten)``, the latter at least 0; None without a scored cell.
    """
    bases = [
        value
        for row in rows
        if row["status"] == "done" and (value := base_score(row["benchmarks"], axes.learned).number) is not None
    ]
    if not bases or not points:
        return None
    if max(bases) - min(bases) > 1e-6:
        _log.warning("compare: the base's score differs between cells, %g to %g; the lowest counts", *_ends(bases))
    worst = max(forgotten for point in points for _, forgotten in point.places.values())
    return min(bases), max(worst, 0.0)


def hypervolumes(groups: Mapping[str, Sequence[Point]], reference: Place) -> dict[str, dict[str, Any]]:
    """Compute each label's hypervolume, seed by seed.

    Args:
        groups: Label to points.
        reference: The reference point of all labels.

    Returns:
        Label to ``mean``, ``low``, ``high``, ``sd``, the ``seeds`` taken, the number of ``points``, the hypervolume
        ``of_means`` (of the points' means), and ``equal``: the mean at equal tries, with its number of ``points``.
        Without a seed that all points have, everything is of the means, without an interval.
    """
    found = {}
    tries = min((len(points) for points in groups.values()), default=0)
    for label, points in groups.items():
        seeds = common_seeds(points)
        of_means = hypervolume([point.place for point in points], reference)
        by_seed = [[point.places[seed] for point in points] for seed in seeds] or [[point.place for point in points]]
        over = spread([hypervolume(places, reference) for places in by_seed])
        equal = {"mean": _at_tries(by_seed, tries, reference), "points": tries}
        numbers = {"mean": over.mean, "low": over.low, "high": over.high, "sd": over.sd}
        found[label] = {**numbers, "seeds": seeds, "points": len(points), "of_means": of_means, "equal": equal}
    return found


def _at_tries(by_seed: Sequence[Sequence[Place]], tries: int, reference: Place) -> float:
    """Take the mean hypervolume over choices of some points, the same choices for each seed."""
    size = len(by_seed[0])
    if math.comb(size, tries) <= _CHOICES:
        chosen = list(combinations(range(size), tries))
    else:
        generator = np.random.default_rng(0)
        chosen = [tuple(generator.choice(size, tries, replace=False)) for _ in range(_CHOICES)]
    found = [hypervolume([places[index] for index in some], reference) for places in by_seed for some in chosen]
    return math.fsum(found) / len(found)


def common_seeds(points: Sequence[Point]) -> list[int]:
    """Find the seeds that all points have.

    Args:
        points: The points.

    Returns:
        The seeds, sorted.
    """
    return sorted(set.intersection(*(set(point.places) for point in points))) if points else []


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _moocore() -> Any:
    try:
        import moocore
    except ImportError as error:
        raise KeeptuneError(
            "compare",
            got="no moocore",
            wanted="the libraries of comparisons",
            next_step='Run pip install "keeptune[compare]".',
        ) from error
    return moocore


def no_trade_off(sides: Collection[str]) -> dict[str, Any]:
    """Make ``front.json`` of cells that cannot be set against each other.

    Args:
        sides: The roles of the benchmarks there are, one at most.

    Returns:
        What it holds.
    """
    lacking = [role for role in ("task", "knowledge") if sides and role not in sides]
    return {
        "units": None,
        "axes": None,
        "points": [],
        "fronts": {},
        "front": [],
        "hypervolume": {},
        "reference_point": None,
        "matched": {"score": None, "baseline": None, "rows": []},
        "excluded": [],
        "notes": [f"no trade-off: `evaluate` has no benchmark with role: {role}" for role in lacking],
        "choice": None,
    }
