"""sequence.json: the matrix stage x benchmark, and what it says of learning and forgetting."""

import datetime
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeptune.core.artefact import write_json
from keeptune.core.intervals import lower_is_better
from keeptune.experiments.sequence.stages_section import StageSequence
from keeptune.experiments.sequence.transfer_metrics import transfer_of
from keeptune.pipeline.cache import unchanged


def write_record(
    sequence: StageSequence,
    stages: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[Mapping[str, Any]]],
    *,
    adapter: Path,
    export: Mapping[str, Any] | None,
    final: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Writes ``sequence.json``; a file with the same content is left alone.

    ``stages`` are what ``stage.json`` holds, of each stage, with the folders of its ``run`` and ``product``; ``scores``
    the summary of every benchmark after each stage; ``export`` is how the product was written (None for a whole model),
    and ``final`` its summaries, where it is not what the last stage left: cut to a rank, or rounded.
    """
    benchmarks = [
        {key: row[key] for key in ("name", "role", "metric", "n")} | {"stage": sequence.owners.get(row["name"])}
        for row in scores[0]
    ]
    matrix = [[_number(row["before"]) for row in scores[0]]]
    matrix += [[_number(row["after"]) for row in part] for part in scores]
    intervals: list[Any] = [[None] * len(benchmarks)]
    intervals += [[_pair(row["interval"]) for row in part] for part in scores]
    kept = ("name", "method", "options", "seed", "rank", "gap", "relative_gap", "note", "trained_parameters", "seconds")
    record: dict[str, Any] = {
        "base": sequence.whole.model,
        "version": version("keeptune"),
        "stages": [
            {key: one[key] for key in kept}
            | {"folder": one["run"], "adapter": one["product"], "loss": one["loss"]}
            | {"evaluation": str(Path(one["product"]).parent / "evaluation")}
            for one in stages
        ],
        "benchmarks": benchmarks,
        "scores": matrix,
        "intervals": intervals,
        **measures([stage.name for stage in sequence.stages], benchmarks, matrix),
        "knowledge": [
            {"name": b["name"], "metric": b["metric"], "before": matrix[0][i], "after": matrix[-1][i]}
            | {"interval": intervals[-1][i]}
            for i, b in enumerate(benchmarks)
            if b["role"] == "knowledge"
        ],
        "adapter": str(adapter),
        "export": None if export is None else dict(export),
        "final": None if final is None else [dict(row) for row in final],
        "recipes": {stage.name: stage.recipe.written() for stage in sequence.stages},
    }
    path = sequence.output / "sequence.json"
    if (same := unchanged("sequence", path, record)) is not None:
        return same
    record["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, record)
    return record


def measures(
    stages: Sequence[str], benchmarks: Sequence[Mapping[str, Any]], scores: Sequence[Sequence[float | None]]
) -> dict[str, Any]:
    """Computes what :mod:`keeptune.experiments.sequence.transfer_metrics` defines, of a matrix stage x benchmark.

    The score of a task is the mean over its benchmarks (by ``stage``) that are shares, not nats per token.

    Benchmarks have ``metric`` and ``stage``, whose task they measure; scores are ``(T + 1, benchmarks)``, the first row
    the base, None is not a number.

    Returns:
        The four measures, ``forgetting_of_each`` stage, the ``course`` over the tasks seen after each stage, and
        ``why`` they are None, where they are.
    """
    columns = {
        stage: [i for i, b in enumerate(benchmarks) if b["stage"] == stage and not lower_is_better(b["metric"])]
        for stage in stages
    }
    missing = [stage for stage in stages if not columns[stage]]
    names = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")
    if missing:
        why = f"no benchmark in shares belongs to stage {', '.join(missing)}: name it like the stage, or in sequence"
        return {**dict.fromkeys(names), "forgetting_of_each": {}, "course": [], "why": why}
    tasks = [[_mean([row[i] for i in columns[stage]]) for stage in stages] for row in scores]
    seen = [[row[: k + 1] for row in tasks[1 : k + 2]] for k in range(len(stages))]
    course = [transfer_of(part, tasks[0]) for part in seen]
    found = course[-1]
    each = dict(zip(stages, map(_number, found["forgetting_of_each"]), strict=False))
    return {
        **{name: found[name] for name in names},
        "forgetting_of_each": each,
        "course": [{key: part[key] for key in ("average_accuracy", "forgetting")} for part in course],
        "why": "a score is not a number" if len(stages) > 1 and any(found[name] is None for name in names) else "",
    }


def _mean(values: Sequence[float | None]) -> float:
    return math.fsum(math.nan if value is None else value for value in values) / len(values)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _pair(interval: Sequence[float]) -> list[float] | None:
    low, high = (_number(end) for end in interval)
    return None if low is None or high is None else [low, high]
