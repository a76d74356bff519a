"""The report stage: run folders to report.json and report.html, with K, T and KT."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeptune.core.artefact import read_json, write_json
from keeptune.core.errors import ArtefactError
from keeptune.core.plan import Plan
from keeptune.evaluate.results import BenchmarkResult, trade_off
from keeptune.report.html import write_html
from keeptune.scoring import find_result, result_fingerprint

__all__ = ["write_report"]

_FULL = "full"


def write_report(runs: Sequence[Path], output: Path, *, reference: Path | None = None) -> dict[str, Any]:
    """Join run folders into one report.

    T and KT are relative to full fine-tuning with the same seed (FARSS eq. 37): one of the runs, or the run
    folder given as reference. Without one they are null.

    Args:
        runs: Run folders, in the order to show them.
        output: Where ``report.json`` and ``report.html`` go.
        reference: Run folder of full fine-tuning that is not itself in the report.

    Returns:
        The report.

    Raises:
        ArtefactError: A folder is not a finished run.
    """
    entries = [_entry(folder) for folder in runs]
    full = {
        entry["seed"]: _results(folder) for entry, folder in zip(entries, runs, strict=True) if entry["name"] == _FULL
    }
    outside = None if reference is None else _results(reference)
    for entry, folder in zip(entries, runs, strict=True):
        entry |= trade_off(_results(folder), full.get(entry["seed"], outside))
    report = {
        "base": entries[0]["base"],
        "version": version("keeptune"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "methods": entries,
    }
    write_json(output / "report.json", report)
    write_html(report, output / "report.html")
    return report


def _entry(folder: Path) -> dict[str, Any]:
    recipe = _need(folder / "recipe.json", "run")
    trained = _need(folder / "trained" / "train.json", "train")
    result = find_result(folder)
    exported = _need(result / "export.json", "export")
    plan = Plan.load(folder / "plan")
    seconds_file = folder / "plan" / "seconds.json"
    return {
        "name": _label(plan),
        "method": plan.method,
        "seed": int(recipe["train"].get("seed", 0)),
        "base": recipe["model"],
        "adapter": str(result),
        "export_gap": exported["gap"],
        "export_relative_gap": exported["relative_gap"],
        "serve": exported["serve"],
        "options": dict(plan.options) | {f"train.{k}": v for k, v in recipe["train"].items()},
        "trained_parameters": trained["trained_parameters"],
        "seconds": {
            "plan": read_json(seconds_file)["plan"] if seconds_file.is_file() else None,
            "train": trained["seconds"],
            "evaluate": sum(_need(path, "evaluate")["seconds"] for path in _evaluations(folder)),
        },
        "loss": trained["loss"],
        "plan": plan.summary(),
        "benchmarks": [result.summary() for result in _results(folder)],
    }


def _label(plan: Plan) -> str:
    variant = plan.options.get("variant")
    return plan.method if variant is None else f"{plan.method}-{variant}"


def _results(folder: Path) -> list[BenchmarkResult]:
    found = []
    weights = result_fingerprint(find_result(folder))
    for path in _evaluations(folder):
        if _need(path, "evaluate")["weights"] != weights:
            raise ArtefactError(
                str(path),
                got="scores of another export",
                wanted="scores of the adapter that is there now",
                next_step="Run `keeptune evaluate` with the run's recipe first.",
            )
        text = path.with_suffix(".items.jsonl").read_text(encoding="utf-8")
        found.append(BenchmarkResult.from_jsonl(_need(path, "evaluate")["summary"], text))
    return found


def _evaluations(folder: Path) -> list[Path]:
    names = [entry["name"] for entry in _need(folder / "recipe.json", "run")["evaluate"]]
    return [folder / "evaluation" / f"{name}.json" for name in names]


def _need(path: Path, stage: str) -> Any:
    if not path.is_file():
        raise ArtefactError(
            str(path),
            got="no such file",
            wanted="a finished run",
            next_step=f"Run `keeptune {stage}` for this folder first.",
        )
    return read_json(path)
