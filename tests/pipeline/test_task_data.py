"""Data as a recipe names them: their formats, several files, and knowledge in the same formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keeptune.core.errors import DataError, RecipeError
from keeptune.data.completions import Conversations
from keeptune.pipeline.job import Job
from keeptune.posthoc.repair_files import Files, read_files
from keeptune.recipe.schema import make_recipe

TURNS = [({"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}) for n in range(9)]
CHAT = [{"messages": list(turns)} for turns in TURNS]
PAIRS = [{"prompt": f"p{n}", "completion": f" c{n}"} for n in range(9)]
Values = Callable[..., dict[str, Any]]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files of two formats; that of conversations is as Windows writes it."""
    paths = {"chat": tmp_path / "chat 模型.jsonl", "pairs": tmp_path / "pairs.jsonl"}
    paths["chat"].write_text("\r\n".join(map(json.dumps, CHAT)), encoding="utf-8-sig", newline="")
    paths["pairs"].write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def job(values: dict[str, Any], tmp_path: Path) -> Job:
    return Job(make_recipe(values, folder=tmp_path, where="recipe"))


def test_a_file_is_enough_of_a_task_and_of_knowledge(
    files: dict[str, str], recipe_values: Values, tmp_path: Path
) -> None:
    found = job(recipe_values(task={"train": files["chat"]}, knowledge={"file": files["chat"]}), tmp_path)
    assert isinstance(found.task, Conversations)
    assert [len(part) for part in found.knowledge] == [9]
    assert found.task.read_texts == found.knowledge[0].read_texts == [f"q{n}\na{n}" for n in range(9)]


def test_several_files_keep_their_formats_and_their_shares(
    files: dict[str, str], recipe_values: Values, tmp_path: Path
) -> None:
    train = [{"file": files["chat"], "weight": 2}, {"file": files["pairs"], "weight": 6}]
    seeds = [recipe_values(task={"train": train}, train={"seed": seed}) for seed in (0, 0, 1)]
    first, same, other = (job(values, tmp_path).task for values in seeds)
    assert sorted(text[0] for text in first.read_texts) == ["p"] * 9 + ["q"] * 3
    assert first.fingerprint == same.fingerprint != other.fingerprint
    half = job(recipe_values(task={"train": train, "examples": 6}), tmp_path).task
    assert half.read_texts == first.read_texts[:6]
    plain = [{"file": files[name]} for name in ("chat", "pairs")]
    assert len(job(recipe_values(task={"train": plain}), tmp_path).task) == 18


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"format": "mesages"}, r"key task, format: .*messages"),
        ({"format": "text", "prompt": "{q}", "completion": "{a}"}, r"key task\.prompt: got a template beside"),
        ({"completion": "{a}"}, r"task\.prompt: got nothing"),
        ({"train": [{"file": "a"}, {"file": "b"}], "kind": "classification", "text": "{a}", "label": "{b}"}, "2 files"),
        ({"train": [{"file": "a", "weight": 0}]}, "weight: got 0"),
    ],
)
def test_keys_of_formats_are_checked_with_the_recipe(
    task: dict[str, Any], told: str, recipe_values: Values, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        job(recipe_values(task={"train": "x.jsonl", **task}), tmp_path)


def test_repair_reads_the_data_of_a_run_as_the_run_did(
    files: dict[str, str], recipe_values: Values, tmp_path: Path
) -> None:
    run = job(recipe_values(task={"train": files["chat"]}, knowledge={"file": files["chat"]}), tmp_path)
    (tmp_path / "out" / "plan").mkdir(parents=True)
    (tmp_path / "out" / "recipe.json").write_text(json.dumps(run.recipe.written()), encoding="utf-8")
    knowledge, task, _ = read_files(str(tmp_path / "out"), Files(task_examples=4))
    assert task is not None
    assert knowledge is not None
    assert knowledge[0].read_texts == run.knowledge[0].read_texts
    assert len(task) == 4
    assert set(task.read_texts) <= set(run.task.read_texts)


def test_conversations_without_a_template_are_refused_before_anything_is_computed(
    files: dict[str, str], recipe_values: Values, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"task\.train: got conversations.*chat_template: chatml"):
        job(recipe_values(task={"train": files["chat"]}), tmp_path).check()
