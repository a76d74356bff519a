"""A finished run, read from its folder and checked: all its parts must be of one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from keeptune.core.artefact import canonical_json, read_json
from keeptune.core.errors import ArtefactError
from keeptune.core.plan import Plan
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.pipeline.scoring import find_result, result_fingerprint


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
        recipe: dict[str, Any] = _read(self.folder / "recipe.json", "run")
        return recipe

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
                    next_step="Run `keeptune evaluate` with the run's recipe first.",
                )
            results.append(BenchmarkResult.from_jsonl(record["summary"], items.read_text(encoding="utf-8")))
        return results

    @cached_property
    def _scores(self) -> list[tuple[Path, dict[str, Any]]]:
        """The record of each benchmark of the recipe, and where it is."""
        paths = [self.folder / "evaluation" / f"{entry['name']}.json" for entry in self.recipe["evaluate"]]
        return [(path, _read(path, "evaluate")) for path in paths]

    @cached_property
    def entry(self) -> dict[str, Any]:
        """The run as a report describes it: one of its ``methods``, without K, T and KT.

        Raises:
            ArtefactError: It is not a finished run, or its parts are of different recipes.
        """
        trained = _read(self.folder / "trained" / "train.json", "train")
        exported = _read(self.result / "export.json", "export")
        plan, seconds = self.plan, self.folder / "plan" / "seconds.json"
        self._check_same("train", trained["plan"], plan.key)
        self._check_same("export", exported["train"], trained["key"])
        return {
            "name": self._name,
            "method": plan.method,
            "seed": int(trained["arguments"].get("seed", 0)),
            "base": trained["base"],
            "adapter": str(self.result),
            "export_gap": exported["gap"],
            "export_relative_gap": exported["relative_gap"],
            "serve": exported["serve"],
            "options": dict(plan.options) | {f"train.{k}": v for k, v in trained["arguments"].items()},
            "trained_parameters": trained["trained_parameters"],
            "seconds": {
                "plan": read_json(seconds)["plan"] if seconds.is_file() else None,
                "train": trained["seconds"],
                "evaluate": sum(record["seconds"] for _, record in self._scores),
            },
            "loss": trained["loss"],
            "plan": plan.summary(),
            "notes": [*_of_export(exported), *plan.provenance.get("notes", []), *trained.get("notes", [])],
            "benchmarks": [result.summary() for result in self.results],
        }

    @property
    def _name(self) -> str:
        """The method, the variant or mode of one that has several, and what the recipe adds to it."""
        method, options = self.plan.method, self.plan.options
        variant = str(options.get("variant") or options.get("mode") or "")
        name = variant if variant.startswith(method) else f"{method}-{variant}" if variant else method
        task = self.recipe["task"]
        loss = (task.get("loss") or {"name": "nll"})["name"]
        added = [penalty["name"] for penalty in self.recipe.get("penalties", ())]
        added += [loss] * (loss != "nll") + ["stm"] * (task.get("stm_threshold") is not None)
        return " + ".join([name, *added, *(["replay"] if self.recipe.get("replay") else [])])

    def _check_same(self, stage: str, made_with: str, key: str) -> None:
        if made_with != key:
            raise ArtefactError(
                str(self.folder),
                got=f"the {stage} stage of another recipe than the stage before it",
                wanted="stages of one recipe",
                next_step=f"Run `keeptune run` (or `keeptune {stage}` and what follows) with the run's recipe.",
            )


def _of_export(exported: Mapping[str, Any]) -> list[str]:
    """Returns what vLLM makes of the adapter, and on a quantised base how far it is from training on the original."""
    vllm, gap = filter(None, [exported.get("vllm")]), exported.get("original_relative_gap")
    if gap is None or exported["format"] == "merged":
        return [*vllm]
    return [
        *vllm,
        f"the adapter is for the quantised base; on {exported['original']} its logits are off by {gap:.0%} (relative)",
    ]


def entry_of(folder: Path) -> dict[str, Any]:
    """Describes a finished run as one of a report's ``methods``, without T and KT, which need full fine-tuning too.

    Raises:
        ArtefactError: It is not a finished run, or its parts are of different recipes.
    """
    run = FinishedRun(folder)
    return run.entry | trade_off(run.results)


def _read(path: Path, stage: str) -> Any:
    if not path.is_file():
        raise ArtefactError(
            str(path),
            got="no such file",
            wanted="a finished run",
            next_step=f"Run `keeptune {stage}` for this folder first.",
        )
    return read_json(path)
