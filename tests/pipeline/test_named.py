"""A run whose recipe names a standard benchmark: checked, scored, kept and taken again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA
from tests.pipeline.support import recipe_of

from keeptune.core.errors import RecipeError
from keeptune.pipeline.job import Job
from keeptune.pipeline.scoring import evaluate_stage

pytest.importorskip("lm_eval")


def test_a_standard_benchmark_in_a_run(
    recipe_values: Callable[..., dict[str, Any]], finished: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    name = {"name": "arc_easy", "data": str(DATA / "commonsense"), "shots": 1, "examples": 3}
    given = recipe_values(evaluate=[name])
    job = Job(recipe_of(given))
    job.check()
    adapter = finished("lora") / "adapter"
    (summary,) = evaluate_stage(job, adapter)
    assert (summary["name"], summary["role"], summary["metric"], summary["n"]) == (
        "arc_easy",
        "knowledge",
        "accuracy_norm",
        3,
    )
    (path,) = Path(given["output"]).glob("evaluation-*/arc_easy.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["engine"]["lm_eval"]
    assert len(path.with_suffix(".items.jsonl").read_text("utf-8").splitlines()) == 3
    with caplog.at_level(logging.INFO):
        assert evaluate_stage(job, adapter) == [summary]
    assert "evaluate arc_easy: taken from" in caplog.text
    other = Job(recipe_of(recipe_values(evaluate=[name | {"examples": 2}])))
    assert evaluate_stage(other, adapter)[0]["n"] == 2


def test_a_classifier_has_no_standard_benchmarks(recipe_values: Callable[..., dict[str, Any]], data: Path) -> None:
    task = {"kind": "classification", "train": str(data / "choices.jsonl"), "text": "{question}", "label": "{label}"}
    given = recipe_values(evaluate=["triviaqa"], task=task)
    with pytest.raises(RecipeError, match=r"evaluate.triviaqa.*task.kind classification"):
        Job(recipe_of(given)).check()
