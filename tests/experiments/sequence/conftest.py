"""Data and the recipe of a sequence of three short stages on a small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import MODEL, values, write_data, write_jsonl

from keeptune.experiments.sequence.stages_section import StageSequence, make_sequence


def _rows(first: str, count: int) -> list[dict[str, Any]]:
    return [{"question": f"{first} {index}?", "answer": f"{first} {index % 7}"} for index in range(count)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data"))
    for name in ("cats", "dogs"):
        rows = _rows(name, 24)
        write_jsonl(folder / f"{name}.jsonl", rows[:20])
        write_jsonl(folder / f"{name}.test.jsonl", rows[20:])
    return folder


@pytest.fixture(scope="session")
def recipe_of_stages(data: Path, store: Path) -> Callable[..., dict[str, Any]]:
    """Make the values of a recipe with the stages cats, dogs and sums."""
    question = {"prompt": "{question}\nAnswer:"}

    def make(output: Path, **changes: Any) -> dict[str, Any]:
        found = values(data, output, store, model=str(MODEL))
        found["train"]["max_steps"] = 3
        sums = found.pop("task")
        stories, tested, _ = found["evaluate"]
        scored = [
            tested | {"name": name, "file": str(data / f"{name}.test.jsonl"), "max_new_tokens": 4}
            for name in ("cats", "dogs")
        ]
        tasks = [
            {"train": str(data / f"{name}.jsonl"), **question, "completion": " {answer}"} for name in ("cats", "dogs")
        ]
        found |= {
            "evaluate": [stories, *scored, tested],
            "stages": [
                {"name": "cats", "task": tasks[0]},
                {
                    "name": "dogs",
                    "task": tasks[1],
                    "method": {"name": "lora-null", "rank": 2},
                    "train.learning_rate": 1e-2,
                },
                {"name": "sums", "task": sums, "targets": ["q_proj", "down_proj"]},
            ],
        }
        return found | changes

    return make


@pytest.fixture
def make(recipe_of_stages: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., StageSequence]:
    """Make a sequence whose output is in this test's folder."""

    def sequence(**changes: Any) -> StageSequence:
        output = changes.pop("output", tmp_path / "out")
        return make_sequence(recipe_of_stages(output, **changes), folder=Path(), where="recipe")

    return sequence
