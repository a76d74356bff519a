"""The report stage: finished runs, read from their folders and checked, to report.json and report.html."""

import datetime
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeptune.adapter.load import read_sidecar
from keeptune.core.artefact import as_written, canonical_json, read_json, write_json, write_text
from keeptune.core.errors import ArtefactError
from keeptune.core.plan import Plan
from keeptune.evaluation.results import BenchmarkResult, references_by_seed, trade_off
from keeptune.pipeline.cache import read_record, unchanged
from keeptune.pipeline.scoring import find_result, result_fingerprint
from keeptune.report.pages.card import model_card, same_but_versions
from keeptune.report.pages.item_rows import lost_and_gained
from keeptune.report.pages.page import repeat

_log = logging.getLogger(__name__)
_FULL, _NOTHING_LEFT = "full", 0.01
_TRACE = Path("trace", "trace.json")  # where `keeptune trace --output <run>/trace` puts it


@dataclass(frozen=True)
class FinishedRun:
    """A run that is finished, by its folder; each part is read when it is first needed."""

    folder: Path

    @cached_property
    def plan(self) -> Plan:
        """The plan."""
        return Plan.load(self.folder / "plan")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe as it was run."""
        return dict(_read(self.folder / "recipe.json", "run"))

    @cached_property
    def result(self) -> Path:
        """The adapter or the merged model."""
        return find_result(self.folder)

    @cached_property
    def results(self) -> list[BenchmarkResult]:
        """The scores of the result on the recipe's benchmarks."""
        weights = result_fingerprint(self.result)
        results = []
        for entry, (path, record) in zip(self.recipe["evaluate"], self._scores, strict=True):
            items = path.with_suffix(".items.jsonl")
            same = record["weights"] == weights and canonical_json(record["benchmark"]) == canonical_json(entry)
            if not same or not items.is_file():
                raise ArtefactError(
                    str(path),
                    got="scores of another export or benchmark" if items.is_file() else "no scores of the items",
                    wanted="scores of the adapter and the recipe that are there now",
                    next_step=again("evaluate"),
                )
            results.append(BenchmarkResult.from_jsonl(record["summary"], items.read_text(encoding="utf-8")))
        return results

    @cached_property
    def _scores(self) -> list[tuple[Path, dict[str, Any]]]:
        """The record of each benchmark of the recipe, and where it is."""
        paths = [self.folder / "evaluation" / f"{entry['name']}.json" for entry in self.recipe["evaluate"]]
        return [(path, _read(path, "evaluate", read_record)) for path in paths]

    @cached_property
    def entry(self) -> dict[str, Any]:
        """The run as a report describes it: one of its ``methods``, without K, T and KT.

        Raises:
            ArtefactError: It is not a finished run, or its parts are of different recipes.
        """
        trained = _read(self.folder / "trained" / "train.json", "train")
        exported = {"train": None, **_read(self.result / "export.json", "export")}
        plan, gap, notes = self.plan, exported.get("original_relative_gap"), list[str]()
        if gap is not None and exported["format"] != "merged":
            on = f"on {exported['original']} its logits are off by {gap:.0%} (relative)"
            notes.append(f"the adapter is for the quantised base; {on}")
        notes += [*plan.provenance.get("notes", []), *trained.get("notes", [])]
        for stage, same in (("train", trained["plan"] == plan.key), ("export", exported["train"] == trained["key"])):
            if not same:
                raise ArtefactError(
                    str(self.folder),
                    got=f"the {stage} stage of another recipe than the stage before it",
                    wanted="stages of one recipe",
                    next_step=f"Run `keeptune run` (or `keeptune {stage}` and what follows) with the run's recipe.",
                )
        # The method, the variant or mode of one that has several, and what the recipe adds to it.
        method, task = plan.method, self.recipe["task"]
        variant = str(plan.options.get("variant") or plan.options.get("mode") or "")
        name = variant if variant.startswith(method) else f"{method}-{variant}" if variant else method
        loss = (task.get("loss") or {"name": "nll"})["name"]
        added = [penalty["name"] for penalty in self.recipe.get("penalties", ())]
        added += [loss] * (loss != "nll") + ["stm"] * (task.get("stm_threshold") is not None)
        return {
            "name": " + ".join([name, *added, *(["replay"] if self.recipe.get("replay") else [])]),
            "method": method,
            "seed": int(trained["arguments"].get("seed", 0)),
            "base": trained["base"],
            "adapter": str(self.result),
            "export_gap": exported["gap"],
            "export_relative_gap": exported["relative_gap"],
            "serve": read_sidecar(self.result).get("export", exported)["serve"],
            "vllm": exported.get("vllm", ""),
            "options": dict(plan.options) | {f"train.{k}": v for k, v in trained["arguments"].items()},
            "trained_parameters": trained["trained_parameters"],
            "seconds": {
                "plan": plan_seconds(self.folder),
                "train": trained["seconds"],
                "evaluate": sum(record["seconds"] for _, record in self._scores),
            },
            "loss": trained["loss"],
            "plan": plan.summary(),
            "notes": notes,
            "benchmarks": [result.summary() for result in self.results],
        }


def again(stage: str) -> str:
    """Returns what to do where a stage's result is missing or damaged."""
    return f"Run `keeptune {stage}` with the run's recipe, or `keeptune run`: what is missing or damaged is done again."


def plan_seconds(folder: Path) -> float | None:
    """Returns how long a run's plan took; None where that is not known."""
    try:
        with as_written(folder):
            return float(read_json(folder / "plan" / "seconds.json")["plan"])
    except ArtefactError:
        return None


def _read(path: Path, stage: str, read: Callable[[Path, str], Any] = read_json) -> Any:
    if not path.exists():
        raise ArtefactError(str(path), got="no such file", wanted="a finished run", next_step=again(stage))
    return read(path, again(stage))


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
    entries = []
    for run in runs:
        with as_written(run.folder, again=again("run")):
            entries.append(run.entry)
    alike: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        alike.setdefault((entry["name"], entry["seed"]), []).append(entry)
    for (name, _), same in alike.items():  # labelled by the options they differ in
        keys = sorted({key for entry in same for key in entry["options"]})
        differing = [key for key in keys if len({canonical_json(entry["options"].get(key)) for entry in same}) > 1]
        for entry in same if differing else []:
            options = [f"{key.removeprefix('train.')} {entry['options'].get(key)}" for key in differing]
            entry["label"] = f"{name}, {', '.join(options)}"
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
        with as_written(run.folder, again=again("run")):
            entry |= trade_off(run.results, full.get(entry["seed"], outside[0].results if outside else None))
            entry["notes"] = [*entry["notes"], *_lost_all(run.folder, entry["K"])]
            if run.folder != output:
                continue
            # What was kept and lost; the card of the export knew no scores.
            text, card = model_card(entry, read_sidecar(run.result), run.recipe), run.result / "README.md"
            there = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
            if not same_but_versions(there, text):
                write_text(card, text)
    report = {"base": entries[0]["base"], "version": version("keeptune"), "methods": entries}
    record, page = output / "report.json", output / "report.html"
    if keep and page.is_file() and (written := unchanged("report", record, report)) is not None:
        return written
    report["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    from keeptune.report.pages.run_page import write_html  # loads plotly

    with as_written(output, again=again("run")):
        write_html(report, page, _extras(runs, entries, output))
    write_json(record, report)  # last: where it is, the page is of it
    return report


def _lost_all(folder: Path, kept: float | None) -> list[str]:
    if kept is None or kept >= _NOTHING_LEFT:
        return []
    told = f"K = {kept:.1g}: hardly any knowledge is left, whatever the loss: training diverged, or its rate is far"
    _log.warning("report %s: %s too high; lower train.learning_rate", folder, told)
    return [f"{told} too high; lower train.learning_rate"]


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
    lines = (line for entry in entries for line in (entry["serve"], entry["vllm"] and f"# {entry['vllm']}") if line)
    commands.append(("Load or serve the result", "\n".join(dict.fromkeys(lines))))
    texts = [(f"Recipe of {label}, seed {entry['seed']}", run.recipe) for label, run, entry in labelled]
    traces = {label: read_json(run.folder / _TRACE) for label, run, _ in labelled if (run.folder / _TRACE).is_file()}
    trained = read_json(runs[0].folder / "trained" / "train.json")
    return {
        "data": trained.get("data"),
        "items": lost_and_gained(results),
        "repeat": repeat(commands, texts),
        "traces": traces,
    }
