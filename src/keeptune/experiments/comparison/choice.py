"""The choice: of all points, the one that learns most while it loses no more than was asked, exported.

With loss_j(p, k) what the cell of point p and seed k lost of knowledge benchmark j (before - after for shares, after -
before for nats), and c_j the most that may be lost of it,

    p* = argmax over p of mean_k learned(p, k)   subject to   E[loss_j(p)] <= c_j for all j                (1)

where E is an estimate: the mean over the seeds, or an upper end, the larger of those of two 95% intervals: Student's
over the seeds (from two seeds on; two that happen to be equal say nothing), and the benchmark's own over its items, the
mean of the cells' ends. Of the cells of p*, those that keep to c themselves are looked at (all, if none does), and the
one with the median learned is taken; of an even number the lower one of the two in the middle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keeptune.adapter.load import SIDECAR, refuse_foreign
from keeptune.core.artefact import atomic_directory, canonical_json, read_json, write_bytes, write_json
from keeptune.core.errors import ArtefactError, RecipeError, nearest
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.experiments.comparison.axes import DIGITS, loss_of, unit_of
from keeptune.experiments.comparison.front import spread
from keeptune.experiments.comparison.knobs import knob_of
from keeptune.experiments.comparison.record import FRONT, read_front, read_runs
from keeptune.experiments.comparison.turned import copy_result, write_turned
from keeptune.pipeline.job import Job
from keeptune.pipeline.reporting import entry_of
from keeptune.pipeline.scoring import find_result, result_fingerprint
from keeptune.recipe.schema import make_recipe
from keeptune.report.pages.card import model_card

__all__ = ["BEST", "Choice", "Estimate", "choose", "choose_best", "export_choice", "limits_of", "parse_max_loss"]

_log = logging.getLogger(__name__)
BEST = "best"
Estimate = Literal["mean", "upper"]
_OPTION = "--max-loss"


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Args:
        point: Name of the setting.
        cell: Name of the cell.
        learned: The point's mean.
        forgotten: The point's mean.
        loss: Benchmark to the point's estimate.
        run_learned: What the cell itself learned.
        run_loss: Benchmark to what the cell itself lost.
        max_loss: Benchmark to what may be lost.
        estimate: Which estimate the losses are.
        unbound: Knowledge benchmarks without a limit.
    """

    point: str
    run: str
    learned: float
    forgotten: float
    loss: Mapping[str, float]
    run_learned: float
    run_loss: Mapping[str, float]
    max_loss: Mapping[str, float]
    estimate: Estimate
    unbound: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        """It as JSON.

        Returns:
            Its fields.
        """
        return {name: _plain(getattr(self, name)) for name in self.__slots__}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple | list) else value


def parse_max_loss(words: Sequence[str]) -> float | dict[str, float]:
    """Read ``--max-loss``: one number, or ``benchmark=number`` once or several times.

    Args:
        words: What was given, one word each time.

    Returns:
        The number, or benchmark to number.

    Raises:
        RecipeError: A word is neither, or the two are mixed.
    """
    try:
        if len(words) == 1 and "=" not in words[0]:
            return _number(words[0])
        pairs = [word.rpartition("=") for word in words]
        if pairs and all(name and sign for name, sign, _ in pairs):
            return {name: _number(number) for name, _, number in pairs}
    except ValueError:
        pass
    raise RecipeError(
        _OPTION,
        got=" ".join(words) or "nothing",
        wanted="one number, or benchmark=number for each benchmark to hold",
        next_step=f"Example: {_OPTION} 0.01, or {_OPTION} facts=0.01 {_OPTION} text=0.05.",
    )


def _number(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


def limits_of(
    benchmarks: Sequence[Mapping[str, Any]], axis: Sequence[str], max_loss: float | Mapping[str, float]
) -> dict[str, float]:
    """Say how much may be lost of each benchmark.

    Args:
        benchmarks: Each with ``name``, ``role`` and ``metric``.
        axis: The knowledge benchmarks of the axis of what is forgotten: those that one number holds for.
        max_loss: One number, or benchmark to number.

    Returns:
        Benchmark to limit.

    Raises:
        RecipeError: A benchmark named is no knowledge benchmark.
    """
    known = [b["name"] for b in benchmarks if b["role"] == "knowledge"]
    if not isinstance(max_loss, Mapping):
        return {name: float(max_loss) for name in axis}
    for name in max_loss:
        if name not in known:
            raise RecipeError(
                _OPTION, got=name, wanted="a knowledge benchmark of the comparison", next_step=nearest(name, known)
            )
    return {name: float(value) for name, value in max_loss.items()}


def choose(
    record: Mapping[str, Any],
    front: Mapping[str, Any],
    max_loss: float | Mapping[str, float],
    *,
    estimate: Estimate = "mean",
) -> Choice:
    """Choose the point that learns most within the limits, and one cell of it, eq. 1.

    Args:
        record: ``runs.json``.
        front: ``front.json``.
        max_loss: One number for the benchmarks of the axis of what is forgotten, or benchmark to number.
        estimate: ``"mean"`` or ``"upper"``.

    Returns:
        The choice; of points that learn equally, the one that forgets less.

    Raises:
        RecipeError: No point keeps within the limits; the message names the one that comes nearest.
    """
    limits = limits_of(record["benchmarks"], front["axes"]["forgotten"] if front["axes"] else [], max_loss)
    rows = {row["name"]: row for row in record["runs"]}
    judged = []
    for point in front["points"]:
        members = [rows[name] for name in point["runs"]]
        losses = {name: _estimated(members, name, estimate) for name in limits}
        missing = [name for name, loss in losses.items() if loss is None]
        if missing:
            _log.warning("choice: %s is left out: no score of %s", point["name"], ", ".join(missing))
            continue
        judged.append((point, {name: loss for name, loss in losses.items() if loss is not None}, members))
    within = [entry for entry in judged if all(entry[1][name] <= limit for name, limit in limits.items())]
    if not within:
        raise _nothing(judged, limits, estimate)
    point, lost, members = max(
        within, key=lambda entry: (entry[0]["learned"]["mean"], -entry[0]["forgotten"]["mean"], entry[0]["name"])
    )
    cell, own = _median(members, limits)
    return Choice(
        point=point["name"],
        run=cell["name"],
        learned=point["learned"]["mean"],
        forgotten=point["forgotten"]["mean"],
        loss=lost,
        run_learned=cell["learned"],
        run_loss=own,
        max_loss=limits,
        estimate=estimate,
        unbound=[b["name"] for b in record["benchmarks"] if b["role"] == "knowledge" and b["name"] not in limits],
    )


def _losses(rows: Sequence[Mapping[str, Any]], name: str) -> list[float] | None:
    """List what each cell lost of a benchmark; None where a cell has no score."""
    found = []
    for row in rows:
        b = next((b for b in row["benchmarks"] if b["name"] == name), None)
        if b is None or b["before"] is None or b["after"] is None:
            return None
        found.append(loss_of(b["before"], b["after"], unit_of(b["metric"])))
    return found


def _estimated(rows: Sequence[Mapping[str, Any]], name: str, estimate: Estimate) -> float | None:
    losses = _losses(rows, name)
    if losses is None:
        return None
    over = spread(losses)
    if estimate == "mean":
        return over.mean
    ends = [_item_end(row, name) for row in rows]
    known = [end for end in ends if end is not None]
    over_items = math.fsum(known) / len(known) if len(known) == len(rows) else None
    return max((end for end in (over.high, over_items) if end is not None), default=None)


def _item_end(row: Mapping[str, Any], name: str) -> float | None:
    """Read the most that a cell lost of a benchmark by its interval over items, which is of after - before."""
    b = next(b for b in row["benchmarks"] if b["name"] == name)
    if b["interval"] is None or None in b["interval"]:
        return None
    low, high = b["interval"]
    return round(float(-low if unit_of(b["metric"]) == "share" else high), DIGITS)


def _median(
    members: Sequence[Mapping[str, Any]], limits: Mapping[str, float]
) -> tuple[Mapping[str, Any], dict[str, float]]:
    own = {row["name"]: {name: (_losses([row], name) or [math.inf])[0] for name in limits} for row in members}
    keeping = [row for row in members if all(own[row["name"]][name] <= limit for name, limit in limits.items())]
    if not keeping:
        _log.warning("choice: no single seed keeps within all limits, only their mean does; the median seed is taken")
    ranked = sorted(keeping or members, key=lambda row: (row["learned"], row["seed"]))
    cell = ranked[(len(ranked) - 1) // 2]
    return cell, own[cell["name"]]


def _nothing(
    judged: Sequence[tuple[Mapping[str, Any], dict[str, float], Any]], limits: Mapping[str, float], estimate: Estimate
) -> RecipeError:
    asked = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    if not judged or not limits:
        return RecipeError(
            _OPTION,
            got="no point with scores of " + (", ".join(limits) or "knowledge"),
            wanted="a comparison with finished cells",
            next_step="Finish the comparison first.",
        )
    point, losses, _ = min(judged, key=lambda entry: max(entry[1][name] - limits[name] for name in limits))
    lost = ", ".join(f"{loss:.4g} of {name}" for name, loss in losses.items())
    over = "mean over seeds" if estimate == "mean" else "upper end of 95% intervals"
    return RecipeError(
        _OPTION,
        got=f"no point within the limits ({asked}); the nearest, {point['name']}, loses {lost} ({over})",
        wanted="a limit that some point keeps",
        next_step="Raise it, or compare lower rates, more strength or smaller scales.",
    )


def export_choice(output: Path, record: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """Write the chosen cell's result to ``best``: copied, or, of a knob's cell, made and checked on a fresh base.

    Args:
        output: The comparison's folder.
        record: ``runs.json``.
        choice: The choice.

    Returns:
        What ``front.json`` holds as ``choice``.

    Raises:
        ArtefactError: The cell's result is not the one that was scored, or the copy is not the result.
        ExportError: ``best`` holds something that keeptune did not write.
    """
    row = next(row for row in record["runs"] if row["name"] == choice.run)
    best = output / BEST
    scored = Path(row["folder"]) / ("evaluation" if row["variant"] is None else "")
    run = Path(row["folder"]) if row["variant"] is None else Path(row["folder"]).parent.parent
    weights = {read_json(scored / f"{b['name']}.json")["weights"] for b in row["benchmarks"]}
    if weights != {result_fingerprint(find_result(run))}:
        raise ArtefactError(
            str(run),
            got="a result that is not the one that was scored",
            wanted="the chosen cell's",
            next_step="Start the comparison again; it does what is missing.",
        )
    if row["variant"] is None:
        _copy(find_result(run), best)
    else:
        recipe = make_recipe(read_json(run / "recipe.json"), folder=Path(), where=f"recipe of {run}")
        write_turned(Job(recipe.model_copy(update={"output": run})), knob_of(row["variant"]), best)
    _write_card(best, run, row, choice)
    adapter = {"adapter": str(best), "weights": result_fingerprint(best)}
    return {**choice.plain(), "max_loss": dict(choice.max_loss), **adapter}


def _write_card(best: Path, run: Path, row: Mapping[str, Any], choice: Choice) -> None:
    """Write the model card of what was chosen, with its own scores: those of a knob's cell, not of the cell beneath."""
    entry, folder = entry_of(run), Path(row["folder"])
    limits = ", ".join(f"{name} {limit:g}" for name, limit in choice.max_loss.items())
    notes = [f"Chosen by keeptune compare: it learned most of what loses at most {limits}; run {choice.run}."]
    if row["variant"] is not None:
        names = [b["name"] for b in row["benchmarks"]]
        read = [(folder / f"{name}.json", folder / f"{name}.items.jsonl") for name in names]
        results = [
            BenchmarkResult.from_jsonl(read_json(record)["summary"], items.read_text(encoding="utf-8"))
            for record, items in read
        ]
        entry |= trade_off(results) | {"benchmarks": [result.summary() for result in results]}
        notes.append(f"Turned after training, which the recipe does not do: {canonical_json(row['variant'])}.")
    text = model_card(
        entry | {"notes": [*notes, *entry["notes"]]}, read_json(best / SIDECAR), read_json(run / "recipe.json")
    )
    write_bytes(best / "README.md", text.encode())


def _copy(folder: Path, best: Path) -> None:
    refuse_foreign(best)
    wanted = result_fingerprint(folder)
    with atomic_directory(best) as fresh:
        copy_result(folder, fresh, best)
        if result_fingerprint(fresh) != wanted:
            raise ArtefactError(
                str(best),
                got="other weights than the chosen cell's",
                wanted=f"a copy of {folder}",
                next_step="Is another comparison at work in this folder? Start it again.",
            )


def choose_best(output: Path, max_loss: float | Mapping[str, float], *, estimate: Estimate = "mean") -> dict[str, Any]:
    """Choose, export to ``best``, and record the choice in ``front.json``.

    Args:
        output: The comparison's folder, with its records.
        max_loss: One number, or benchmark to number.
        estimate: ``"mean"`` or ``"upper"``.

    Returns:
        The choice as in ``front.json``.

    Raises:
        KeeptuneError: Nothing keeps within the limits, or the result cannot be written.
    """
    record, front = read_runs(output), read_front(output)
    choice = export_choice(output, record, choose(record, front, max_loss, estimate=estimate))
    write_json(output / FRONT, front | {"choice": choice})
    return choice
