"""What one process, and two of a launcher, do in :mod:`tests.experiments.test_processes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import LlamaForCausalLM

from keeptune.cli.compare import run_and_show
from keeptune.cli.shared import Ended
from keeptune.core import processes
from keeptune.core.errors import DataError
from keeptune.core.processes import by_first, gathered, is_first, joined, met_by_all, rank
from keeptune.experiments.plan_runs import load_comparison
from keeptune.experiments.sequence.run_stages import run_sequence
from keeptune.experiments.sequence.stages_section import load_sequence
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import run
from keeptune.pipeline.scoring import evaluate_stage
from keeptune.recipe.schema import load_recipe


def scored(recipe: Path, adapter: Path) -> list[int]:
    """Scores an adapter; returns how many texts went through the model in each process."""
    texts, forward = [0], LlamaForCausalLM.forward

    def counting(model: Any, input_ids: Any, **given: Any) -> Any:
        texts[0] += len(input_ids) if input_ids.shape[1] > 1 else 0  # not the next token of a text
        return forward(model, input_ids=input_ids, **given)

    with mock.patch.object(LlamaForCausalLM, "forward", counting):
        evaluate_stage(Job(load_recipe(recipe)), adapter)
    return gathered(texts[0])


def error_of_first() -> DataError:
    return DataError("here", got="nothing", wanted="a row", next_step="Add one.")


def _raised() -> str:
    def fails() -> None:
        raise error_of_first()

    try:
        by_first(fails)
    except DataError as error:
        return str(error)
    return "no error"


def _code(recipe: Path) -> int:
    shown = run_and_show(load_comparison(recipe))
    return int(shown.code) if isinstance(shown, Ended) else 0


def work(folder: Path, adapter: Path) -> None:
    """Does the run, the comparison and the stages of a folder, and scores an adapter as the run scores its own."""
    run(load_recipe(folder / "run.yaml"))
    texts = scored(folder / "run.yaml", adapter)
    found = {"texts": texts, "errors": gathered(_raised()), "met": gathered(met_by_all(f"on {rank()}"))}
    found["codes"] = gathered(_code(folder / "compare.yaml"))
    for name, value in found.items() if is_first() else ():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    run_sequence(load_sequence(folder / "stages.yaml"))


def main(folder: str, adapter: str) -> None:
    """Works as one of the processes of a launcher."""
    processes._ALIKE = 3  # seconds
    with joined():
        work(Path(folder), Path(adapter))
