"""What one process, and two of a launcher, do in :mod:`tests.experiments.test_processes`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import LlamaForCausalLM

from keeptune.core.processes import gathered, is_first, joined
from keeptune.experiments.plan_runs import load_comparison
from keeptune.experiments.run_comparison import run_comparison
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


def work(folder: Path, adapter: Path) -> None:
    """Does the run, the comparison and the stages of a folder, and scores an adapter as the run scores its own."""
    run(load_recipe(folder / "run.yaml"))
    texts = scored(folder / "run.yaml", adapter)
    if is_first():
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    run_comparison(load_comparison(folder / "compare.yaml"), "keeptune compare")
    run_sequence(load_sequence(folder / "stages.yaml"))


if __name__ == "__main__":
    with joined():
        work(*map(Path, sys.argv[1:]))
