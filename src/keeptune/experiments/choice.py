"""The choice: of all points, the one that learns most while it loses no more than the limit, exported.

With loss_j(p, k) what the run of point p and seed k lost of knowledge benchmark j (before - after for shares, after -
before for nats), and c_j the most that may be lost of it,

    p* = argmax over p of mean_k learned(p, k)   subject to   E[loss_j(p)] <= c_j for all j                (1)

where E is an estimate: the mean over the seeds, or the upper end of its 95% interval (:mod:`keeptune.core.intervals`).
Of the runs of p*, those that keep to c themselves count (all, if none does), and the one with the median learned is
taken; of an even number the lower one of the two in the middle.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from keeptune.adapter.load import SIDECAR, refuse_foreign
from keeptune.core.artefact import as_written, atomic_directory, canonical_json, read_json, write_json, write_text
from keeptune.core.errors import ArtefactError, RecipeError, need_known
from keeptune.experiments.axes import Axis, unit_of, value_of
from keeptune.experiments.comparison_record import AGAIN, FRONT, RUNS_FILE
from keeptune.experiments.front import spread
from keeptune.experiments.posthoc_variants import Variant, copy_result, write_variant
from keeptune.pipeline.job import Job
from keeptune.pipeline.reporting import FinishedRun
from keeptune.pipeline.scoring import find_result, result_fingerprint
from keeptune.recipe.schema import make_recipe
from keeptune.report.pages.card import model_card

_log = logging.getLogger(__name__)
BEST = "best"
Bound = Literal["mean", "upper"]
_OPTION = "--max-loss"
Row = Mapping[str, Any]


def parse_max_loss(words: Sequence[str]) -> float | dict[str, float]:
    """Reads ``--max-loss``: one number, or ``benchmark=number`` once or several times; else raises RecipeError."""
    pairs = [word.rpartition("=") for word in words]
    try:
        limits = {name: float(number) for name, _, number in pairs}
    except ValueError:
        limits = {}
    named = all(name and sign for name, sign, _ in pairs)
    alone = len(pairs) == 1 and not pairs[0][1]
    if not limits or not (named or alone) or not all(map(math.isfinite, limits.values())):
        raise RecipeError(
            _OPTION,
            got=" ".join(words) or "nothing",
            wanted="one number, or benchmark=number for each benchmark to hold",
            next_step=f"Example: {_OPTION} 0.01, or {_OPTION} facts=0.01 {_OPTION} text=0.05.",
        )
    return limits[""] if alone else limits


def limits_of(
    max_loss: float | Mapping[str, float],
    names: Sequence[str],
    known: Sequence[str],
    wanted: str = "a knowledge benchmark of the comparison",
) -> dict[str, float]:
    """Returns how much may be lost of each benchmark: one number of all ``names``, or of some that are ``known``."""
    if not isinstance(max_loss, Mapping):
        return dict.fromkeys(names, float(max_loss))
    for name in max_loss:
        need_known(name, known, _OPTION, wanted)
    return {name: float(value) for name, value in max_loss.items()}


def choose(
    record: Row, front: Row, max_loss: float | Mapping[str, float], *, estimate: Bound = "mean"
) -> dict[str, Any]:
    """Chooses the point that learns most within the limits, and one run of it, eq. 1; of equals that forgetting less.

    ``record`` and ``front`` are ``runs.json`` and ``front.json``; ``max_loss`` is one number for the benchmarks of the
    axis of what is forgotten, or benchmark to number.

    Returns:
        ``point`` and ``run``, what they ``learned``, ``forgotten`` and ``run_learned``, what was lost of each limited
        benchmark (``loss``, the point's ``estimate``, and ``run_loss``), ``max_loss``, and the ``unbound`` benchmarks.

    Raises:
        RecipeError: No point keeps within the limits; the message names the one that comes nearest.
    """
    metrics = {b["name"]: b["metric"] for b in record["benchmarks"] if b["role"] == "knowledge"}
    limits = limits_of(max_loss, front["axes"]["forgotten"] if front["axes"] else [], list(metrics))
    rows = {row["name"]: row for row in record["runs"]}
    axes = {name: Axis("knowledge", (name,), unit_of(metrics[name])) for name in limits}
    judged = []
    for point in front["points"]:
        members = [rows[name] for name in point["runs"]]
        estimates = {name: _estimate(members, axis, estimate) for name, axis in axes.items()}
        losses = {name: loss for name, loss in estimates.items() if loss is not None}
        if missing := [name for name in limits if name not in losses]:
            _log.warning("choice: %s is left out: no score of %s", point["name"], ", ".join(missing))
            continue
        judged.append((point, losses, members))
    within = [entry for entry in judged if all(entry[1][name] <= limit for name, limit in limits.items())]
    if not within:
        raise _no_choice(judged, limits, estimate)
    point, losses, members = max(
        within, key=lambda entry: (entry[0]["learned"]["mean"], -entry[0]["forgotten"]["mean"], entry[0]["name"])
    )
    run, own = _median(members, axes, limits)
    return {
        "point": point["name"],
        "run": run["name"],
        "learned": point["learned"]["mean"],
        "forgotten": point["forgotten"]["mean"],
        "loss": losses,
        "run_learned": run["learned"],
        "run_loss": own,
        "max_loss": limits,
        "estimate": estimate,
        "unbound": [name for name in metrics if name not in limits],
    }


def _estimate(rows: Sequence[Row], axis: Axis, estimate: Bound) -> float | None:
    losses = [value_of(row["benchmarks"], axis) for row in rows]
    numbers = [loss.number for loss in losses if loss.number is not None]
    if len(numbers) < len(losses):
        return None
    over = spread(numbers, [loss.interval for loss in losses])
    number = over.mean if estimate == "mean" else over.high
    return number if math.isfinite(number) else None


def _median(
    members: Sequence[Row], axes: Mapping[str, Axis], limits: Mapping[str, float]
) -> tuple[Row, dict[str, float]]:
    runs = []
    for row in members:
        losses = {name: value_of(row["benchmarks"], axis).number for name, axis in axes.items()}
        runs.append((row, {name: math.inf if loss is None else loss for name, loss in losses.items()}))
    keeping = [run for run in runs if all(run[1][name] <= limit for name, limit in limits.items())]
    if not keeping:
        _log.warning("choice: no single seed keeps within all limits, only their mean does; the median seed is taken")
    ranked = sorted(keeping or runs, key=lambda run: (run[0]["learned"], run[0]["seed"]))
    return ranked[(len(ranked) - 1) // 2]


def _no_choice(
    judged: Sequence[tuple[Row, dict[str, float], Any]], limits: Mapping[str, float], estimate: Bound
) -> RecipeError:
    if not judged or not limits:
        return RecipeError(
            _OPTION,
            got="no point with scores of " + (", ".join(limits) or "knowledge"),
            wanted="a comparison with finished runs",
            next_step="Finish the comparison first.",
        )
    point, losses, _ = min(judged, key=lambda entry: max(entry[1][name] - limits[name] for name in limits))
    allowed = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    lost = ", ".join(f"{loss:.4g} of {name}" for name, loss in losses.items())
    over = "mean over seeds" if estimate == "mean" else "upper end of 95% intervals"
    return RecipeError(
        _OPTION,
        got=f"no point within the limits ({allowed}); the nearest, {point['name']}, loses {lost} ({over})",
        wanted="a limit that some point keeps",
        next_step="Raise it, or compare lower rates, more strength or smaller scales.",
    )


@as_written("runs.json, front.json or a run of them", again=AGAIN)
def choose_best(output: Path, max_loss: float | Mapping[str, float], *, estimate: Bound = "mean") -> dict[str, Any]:
    """Chooses by the records in a comparison's folder, exports to ``best``, and records the choice in ``front.json``.

    Raises:
        KeeptuneError: Nothing keeps within the limits, the chosen result is not the one that was scored, or it cannot
            be written.
    """
    record, front = read_json(output / RUNS_FILE), read_json(output / FRONT)
    choice = choose(record, front, max_loss, estimate=estimate)
    best = output / BEST
    _export(record, choice, best)
    choice |= {"adapter": str(best), "weights": result_fingerprint(best)}
    write_json(output / FRONT, front | {"choice": choice})
    return choice


def _export(record: Row, choice: Row, best: Path) -> None:
    row = next(row for row in record["runs"] if row["name"] == choice["run"])
    folder, trained = Path(row["folder"]), row["variant"] is None
    scored, run = (folder / "evaluation", folder) if trained else (folder, folder.parent.parent)
    weights = {read_json(scored / f"{b['name']}.json")["weights"] for b in row["benchmarks"]}
    _check_weights(find_result(run), weights)
    if trained:
        refuse_foreign(best)
        with atomic_directory(best) as fresh:
            copy_result(find_result(run), fresh, best)
            _check_weights(fresh, weights)
    else:
        recipe = make_recipe(read_json(run / "recipe.json"), folder=Path(), where=f"recipe of {run}")
        write_variant(
            Job(recipe.model_copy(update={"output": run})), Variant(*next(iter(row["variant"].items()))), best
        )
    entry = FinishedRun(run).entry | {key: row[key] for key in ("K", "T", "KT", "benchmarks")}
    limits = ", ".join(f"{name} {limit:g}" for name, limit in choice["max_loss"].items())
    notes = [f"Chosen by keeptune compare: it learned most of what loses at most {limits}; run {choice['run']}."]
    if row["variant"] is not None:
        notes.append(f"Changed after training, which the recipe does not do: {canonical_json(row['variant'])}.")
    text = model_card(
        entry | {"notes": [*notes, *entry["notes"]]}, read_json(best / SIDECAR), read_json(run / "recipe.json")
    )
    write_text(best / "README.md", text)


def _check_weights(result: Path, scored: set[str]) -> None:
    if {result_fingerprint(result)} != scored:
        raise ArtefactError(
            str(result),
            got="a result that is not the one that was scored",
            wanted="the chosen run's",
            next_step=AGAIN,
        )
