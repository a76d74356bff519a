"""The report stage: run folders to report.json and report.html, with K, T and KT."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeptune.adapter.load import SIDECAR
from keeptune.core.artefact import canonical_json, read_json, write_json, write_text
from keeptune.core.errors import ArtefactError
from keeptune.evaluation.results import references_by_seed, trade_off
from keeptune.pipeline.finished import FinishedRun
from keeptune.report.pages.card import model_card, same_but_versions
from keeptune.report.pages.item_rows import lost_and_gained
from keeptune.report.pages.page import repeat
from keeptune.report.pages.run_page import write_html

_FULL = "full"
_TRACE = Path("trace", "trace.json")  # where `keeptune trace --output <run>/trace` puts it


def write_report(
    folders: Sequence[Path], output: Path, *, reference: Path | None = None, keep: bool = False
) -> dict[str, Any]:
    """Joins run folders into one report.

    T and KT are relative to full fine-tuning with the same seed (FARSS eq. 37): one of the runs, or the reference; null
    without one. Where the report is a run's own, the model card of its result gets the scores.

    Args:
        folders: Run folders, in the order to show them.
        output: Where ``report.json`` and ``report.html`` go.
        reference: Run folder of full fine-tuning that is not itself in the report.
        keep: Leave the files alone where they are the same already.

    Raises:
        ArtefactError: A folder is not a finished run, its parts are of different recipes, or the runs are not
            of one base.
    """
    runs = [FinishedRun(folder) for folder in folders]
    entries = [run.entry for run in runs]
    _label(entries)
    outside = [] if reference is None else [FinishedRun(reference)]
    bases = {run.plan.provenance.get("model") for run in (*runs, *outside)}
    if len(bases) > 1:
        raise ArtefactError(
            ", ".join(str(run.folder) for run in (*runs, *outside)),
            got=f"runs on {len(bases)} different bases",
            wanted="runs on one base",
            next_step="Write one report for each base.",
        )
    full = references_by_seed((run.entry["seed"], run.results) for run in runs if run.plan.method == _FULL)
    for run, entry in zip(runs, entries, strict=True):
        entry |= trade_off(run.results, full.get(entry["seed"], outside[0].results if outside else None))
        if run.folder == output:
            _write_card(run, entry)
    report = {"base": entries[0]["base"], "version": version("keeptune"), "methods": entries}
    record, page = output / "report.json", output / "report.html"
    if keep and record.is_file() and page.is_file():
        there: dict[str, Any] = read_json(record)
        if report == {key: value for key, value in there.items() if key != "created"}:
            return there
    report["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(record, report)
    write_html(report, page, _extras(runs, entries, output))
    return report


def _label(entries: Sequence[dict[str, Any]]) -> None:
    """Labels runs of one method and seed by the options they differ in."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["name"], entry["seed"]), []).append(entry)
    for (name, _), same in groups.items():
        keys = sorted({key for entry in same for key in entry["options"]})
        differing = [key for key in keys if len({canonical_json(entry["options"].get(key)) for entry in same}) > 1]
        for entry in same if differing else []:
            options = [f"{key.removeprefix('train.')} {entry['options'].get(key)}" for key in differing]
            entry["label"] = f"{name}, {', '.join(options)}"


def _write_card(run: FinishedRun, entry: Mapping[str, Any]) -> None:
    """Puts what was kept and lost into the model card of the result; the card of the export knew no scores."""
    text = model_card(entry, read_json(run.result / SIDECAR), run.recipe)
    card = run.result / "README.md"
    if not card.is_file() or not same_but_versions(card.read_text(encoding="utf-8"), text):
        write_text(card, text)


def _extras(runs: Sequence[FinishedRun], entries: Sequence[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Collects what the page shows beside the report: items lost and gained, how to repeat it, causal traces."""
    labels = [str(entry.get("label") or entry["name"]) for entry in entries]
    labelled = list(zip(labels, runs, entries, strict=True))
    results = (
        {"label": label, "seed": entry["seed"], "benchmark": result.name}
        | {key: getattr(result, key) for key in ("role", "metric", "items")}
        for label, run, entry in labelled
        for result in run.results
    )
    folders = [run.folder for run in runs]
    recipes = [run.folder / "recipe.json" for run in runs if "trainer" not in run.recipe]  # else it is a script's
    again = [shlex.join(["keeptune", "run", str(path)]) for path in recipes]
    commands = [("Run it again", "\n".join(again))] if again else []
    if folders != [output]:
        line = shlex.join(["keeptune", "report", *map(str, folders), "--output", str(output)])
        commands.append(("Join the runs", line))
    commands.append(("Load or serve the result", "\n".join(dict.fromkeys(str(entry["serve"]) for entry in entries))))
    texts = [(f"Recipe of {label}, seed {entry['seed']}", run.recipe) for label, run, entry in labelled]
    traces = {label: read_json(run.folder / _TRACE) for label, run, _ in labelled if (run.folder / _TRACE).is_file()}
    trained = read_json(runs[0].folder / "trained" / "train.json")
    return {
        "data": trained.get("data"),
        "items": lost_and_gained(results),
        "repeat": repeat(commands, texts),
        "traces": traces,
    }
