"""The report stage: run folders to report.json and report.html, with K, T and KT."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeptune.adapter.load import SIDECAR
from keeptune.core.artefact import canonical_json, read_json, write_bytes, write_json
from keeptune.core.errors import ArtefactError
from keeptune.core.plan import Plan
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.pipeline.scoring import find_result, result_fingerprint
from keeptune.report.pages.card import model_card, same_but_versions
from keeptune.report.pages.items import lost_and_gained
from keeptune.report.pages.repeat import repeat
from keeptune.report.pages.run_page import write_html

__all__ = ["entry_of", "write_card", "write_report"]

_FULL = "full"
_TRACE = Path("trace", "trace.json")  # where `keeptune trace --output <run>/trace` puts it


def write_report(
    runs: Sequence[Path],
    output: Path,
    *,
    reference: Path | None = None,
    labels: Sequence[str] | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Join run folders into one report.

    T and KT are relative to full fine-tuning with the same seed (FARSS eq. 37): one of the runs, or the run
    folder given as reference. Without one they are null.

    Where the report is a run's own, the model card of its result gets the table of what was kept and lost.

    Args:
        runs: Run folders, in the order to show them.
        output: Where ``report.json`` and ``report.html`` go.
        reference: Run folder of full fine-tuning that is not itself in the report.
        labels: What to call each run; None names them by their methods and what they differ in.
        keep: Leave the files alone when they already say the same.

    Returns:
        The report.

    Raises:
        ArtefactError: A folder is not a finished run, its parts are of different recipes, or the runs are not
            of one base.
    """
    entries = [_entry(folder) for folder in runs]
    if labels is None:
        _tell_apart(entries)
    else:
        for entry, label in zip(entries, labels, strict=True):
            entry["label"] = label
    _need_one_base([*runs, *([] if reference is None else [reference])])
    full = _references(entries, runs)
    outside = None if reference is None else _results(reference)
    for entry, folder in zip(entries, runs, strict=True):
        entry |= trade_off(_results(folder), full.get(entry["seed"], outside))
    report = {"base": entries[0]["base"], "version": version("keeptune"), "methods": entries}
    for entry, folder in zip(entries, runs, strict=True):
        if folder == output:
            write_card(folder, entry)
    record, page = output / "report.json", output / "report.html"
    if keep and record.is_file() and page.is_file():
        there: dict[str, Any] = read_json(record)
        if report == {key: value for key, value in there.items() if key != "created"}:
            return there
    report["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(record, report)
    write_html(report, page, _extras(runs, entries, output))
    return report


def entry_of(folder: Path) -> dict[str, Any]:
    """Describe a finished run as a report does, without T and KT, which need full fine-tuning beside it.

    Args:
        folder: The run folder.

    Returns:
        One of the ``methods`` of a report.

    Raises:
        ArtefactError: It is not a finished run, or its parts are of different recipes.
    """
    return _entry(folder) | trade_off(_results(folder))


def write_card(folder: Path, entry: Mapping[str, Any]) -> None:
    """Put what was kept and lost into the model card of a run's result; the card of the export knew no scores.

    Args:
        folder: The run folder.
        entry: The run, one of the report's ``methods``.
    """
    result = find_result(folder)
    recipe = read_json(folder / "recipe.json")
    text = model_card(entry, read_json(result / SIDECAR), recipe)
    card = result / "README.md"
    if not card.is_file() or not same_but_versions(card.read_text(encoding="utf-8"), text):
        write_bytes(card, text.encode())


def _extras(runs: Sequence[Path], entries: Sequence[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Collect what the page shows beside the report: items lost and gained, how to repeat it, causal traces."""
    labels = [str(entry.get("label") or entry["name"]) for entry in entries]
    results = (
        {
            "label": label,
            "seed": entry["seed"],
            "benchmark": result.name,
            "role": result.role,
            "metric": result.metric,
            "items": result.items,
        }
        for label, entry, folder in zip(labels, entries, runs, strict=True)
        for result in _results(folder)
    )
    recipes = [folder / "recipe.json" for folder in runs]
    commands = [("Run it again", "\n".join(shlex.join(["keeptune", "run", str(path)]) for path in recipes))]
    if list(runs) != [output]:
        line = shlex.join(["keeptune", "report", *map(str, runs), "--output", str(output)])
        commands.append(("Join the runs", line))
    serving = "\n".join(dict.fromkeys(str(entry["serve"]) for entry in entries))
    commands.append(("Load or serve the result", serving))
    texts = [
        (f"Recipe of {label}, seed {entry['seed']}", read_json(path))
        for label, entry, path in zip(labels, entries, recipes, strict=True)
    ]
    traces = {
        label: read_json(folder / _TRACE)
        for label, folder in zip(labels, runs, strict=True)
        if (folder / _TRACE).is_file()
    }
    return {"items": lost_and_gained(results), "repeat": repeat(commands, texts), "traces": traces}


def _entry(folder: Path) -> dict[str, Any]:
    trained = _need(folder / "trained" / "train.json", "train")
    result = find_result(folder)
    exported = _need(result / "export.json", "export")
    plan = Plan.load(folder / "plan")
    _need_same(folder, "train", trained["plan"], plan.key)
    _need_same(folder, "export", exported["train"], trained["key"])
    seconds_file = folder / "plan" / "seconds.json"
    return {
        "name": _label(plan, _need(folder / "recipe.json", "run")),
        "method": plan.method,
        "seed": int(trained["arguments"].get("seed", 0)),
        "base": trained["base"],
        "adapter": str(result),
        "export_gap": exported["gap"],
        "export_relative_gap": exported["relative_gap"],
        "serve": exported["serve"],
        "options": dict(plan.options) | {f"train.{k}": v for k, v in trained["arguments"].items()},
        "trained_parameters": trained["trained_parameters"],
        "seconds": {
            "plan": read_json(seconds_file)["plan"] if seconds_file.is_file() else None,
            "train": trained["seconds"],
            "evaluate": sum(_need(path, "evaluate")["seconds"] for path in _evaluations(folder).values()),
        },
        "loss": trained["loss"],
        "plan": plan.summary(),
        "notes": [*plan.provenance.get("notes", []), *trained.get("notes", [])],
        "benchmarks": [result.summary() for result in _results(folder)],
    }


def _tell_apart(entries: Sequence[dict[str, Any]]) -> None:
    """Label runs of one method and seed by the options they differ in, as in a sweep."""
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        kinds.setdefault((entry["name"], entry["seed"]), []).append(entry)
    for (name, _), same in kinds.items():
        keys = sorted({key for entry in same for key in entry["options"]})
        differing = [key for key in keys if len({canonical_json(entry["options"].get(key)) for entry in same}) > 1]
        for entry in same if differing else []:
            told = [f"{key.removeprefix('train.')} {entry['options'].get(key)}" for key in differing]
            entry["label"] = f"{name}, {', '.join(told)}"


def _references(entries: Sequence[dict[str, Any]], runs: Sequence[Path]) -> dict[int, list[BenchmarkResult]]:
    """Find full fine-tuning per seed; of several, the one that learned the tasks best, so that T is never flattered."""
    best: dict[int, list[BenchmarkResult]] = {}
    for entry, folder in zip(entries, runs, strict=True):
        if entry["method"] == _FULL:
            results = _results(folder)
            rival = best.get(entry["seed"])
            if rival is None or (trade_off(results, rival)["T"] or 0) > 1:
                best[entry["seed"]] = results
    return best


def _need_same(folder: Path, stage: str, made_with: str, key: str) -> None:
    if made_with != key:
        raise ArtefactError(
            str(folder),
            got=f"the {stage} stage of another recipe than the stage before it",
            wanted="stages of one recipe",
            next_step=f"Run `keeptune run` (or `keeptune {stage}` and what follows) with the run's recipe.",
        )


def _need_one_base(runs: Sequence[Path]) -> None:
    bases = {Plan.load(folder / "plan").provenance.get("model") for folder in runs}
    if len(bases) > 1:
        raise ArtefactError(
            ", ".join(map(str, runs)),
            got=f"runs on {len(bases)} different bases",
            wanted="runs on one base",
            next_step="Write one report for each base.",
        )


def _label(plan: Plan, recipe: Mapping[str, Any]) -> str:
    """Name a run by its method, the variant or mode of one that has several, and what the recipe adds to it."""
    variant = plan.options.get("variant") or plan.options.get("mode")
    name = plan.method if variant is None else f"{plan.method}-{variant}"
    if variant is not None and variant.startswith(plan.method):
        name = variant
    added = [penalty["name"] for penalty in recipe.get("penalties", ())]
    return " + ".join([name, *added, *(["replay"] if recipe.get("replay") else [])])


def _results(folder: Path) -> list[BenchmarkResult]:
    found = []
    weights = result_fingerprint(find_result(folder))
    for benchmark, path in _evaluations(folder).items():
        record = _need(path, "evaluate")
        items = path.with_suffix(".items.jsonl")
        current = record["weights"] == weights and canonical_json(record["benchmark"]) == benchmark
        if not current or not items.is_file():
            raise ArtefactError(
                str(path),
                got="scores of another export or benchmark" if items.is_file() else "no scores of the items",
                wanted="scores of the adapter and the recipe that are there now",
                next_step="Run `keeptune evaluate` with the run's recipe first.",
            )
        found.append(BenchmarkResult.from_jsonl(record["summary"], items.read_text(encoding="utf-8")))
    return found


def _evaluations(folder: Path) -> dict[str, Path]:
    """Map each benchmark of the recipe, as canonical JSON, to where its scores are."""
    entries = _need(folder / "recipe.json", "run")["evaluate"]
    return {canonical_json(entry): folder / "evaluation" / f"{entry['name']}.json" for entry in entries}


def _need(path: Path, stage: str) -> Any:
    if not path.is_file():
        raise ArtefactError(
            str(path),
            got="no such file",
            wanted="a finished run",
            next_step=f"Run `keeptune {stage}` for this folder first.",
        )
    return read_json(path)
