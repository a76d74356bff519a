"""Small data, recipes and the command line in this process, for the tests of the job."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA, STORIES

from keeptune.cli import main as cli
from keeptune.recipe.schema import Recipe, make_recipe

MODEL = STORIES

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "dora": {"name": "dora", "rank": 4, "dropout": 0.1},
    "lora-fa": {"name": "lora-fa", "rank": 4, "dropout": 0.1},
    "lora-null-v1": {"name": "lora-null", "rank": 4, "variant": "v1"},
    "lora-null-v2": {"name": "lora-null", "rank": 4, "variant": "v2"},
    "full": {"name": "full"},
}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path, count: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def _stories(name: str, count: int) -> list[dict[str, Any]]:
    # This model was trained on stories without blank lines.
    rows = read_jsonl(DATA / name / "stories.jsonl", count)
    return [{"text": row["text"].replace("\n\n", "\n")[:200]} for row in rows]


def write_data(folder: Path) -> Path:
    """Knowledge, task and evaluation data of the project's own kind, cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "knowledge.jsonl", _stories("tinystories_train_piece", 8))
    write_jsonl(folder / "stories.jsonl", _stories("tinystories", 3))
    for name, split, count in (("task", "train", 20), ("test", "test", 3)):
        rows = read_jsonl(DATA / "gsm8k" / f"{split}.jsonl", count)
        short = [{"question": r["question"][:80], "answer": r["answer"].rpartition("#### ")[2]} for r in rows]
        write_jsonl(folder / f"{name}.jsonl", short)
    animals = ["dog", "cat", "bird"]
    write_jsonl(
        folder / "choices.jsonl",
        [{"question": f"Once there was a {a}. The", "choices": animals, "label": i} for i, a in enumerate(animals)],
    )
    return folder


def values(data: Path, output: Path, store: Path, **changes: Any) -> dict[str, Any]:
    """A recipe with three benchmarks and three steps."""
    question = {"prompt": "{question}\nAnswer:"}
    recipe: dict[str, Any] = {
        "model": str(MODEL),
        "method": METHODS["lora"],
        "knowledge": {"file": str(data / "knowledge.jsonl"), "text": "{text}", "examples": 8, "max_length": 64},
        "task": {"train": str(data / "task.jsonl"), **question, "completion": " {answer}"},
        "train": {"learning_rate": 5e-3, "max_steps": 3, "per_device_train_batch_size": 4, "seed": 0},
        "evaluate": [
            {
                "name": "stories",
                "role": "knowledge",
                "file": str(data / "stories.jsonl"),
                "text": "{text}",
                "metric": "cross_entropy",
            },
            {
                "name": "sums",
                "role": "task",
                "file": str(data / "test.jsonl"),
                **question,
                "answer": "{answer}",
                "metric": "exact_match",
                "max_new_tokens": 3,
            },
            {
                "name": "animals",
                "role": "knowledge",
                "file": str(data / "choices.jsonl"),
                "prompt": "{question}",
                "choices": "{choices}",
                "answer": "{label}",
                "metric": "multiple_choice",
            },
        ],
        "output": str(output),
        "store": str(store),
        "device": "cpu",
    }
    return recipe | changes


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    return make_recipe(given, folder=Path(), where="recipe")


def write_recipe(path: Path, given: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(given), encoding="utf-8")  # JSON is YAML
    return path


@dataclass(frozen=True)
class Said:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def keeptune(*words: object, capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs the command line in this process, with the error handling of the installed command.

    pytest has its own log handlers, so stderr holds errors only; stages' messages are in ``caplog``.
    """
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["keeptune", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = capsys.readouterr()
    code = ended.value.code
    return Said(code if isinstance(code, int) else 0 if code is None else 1, said.out, said.err)
