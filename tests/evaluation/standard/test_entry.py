"""Names of standard benchmarks in a recipe: what is understood, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keeptune.core.errors import RecipeError
from keeptune.evaluation import FileBenchmark
from keeptune.evaluation.standard import NAMES, NamedBenchmark
from keeptune.recipe.schema import Recipe, load_recipe, make_recipe

VALUES: dict[str, Any] = {
    "model": "atlas",
    "method": "lora",
    "task": {"train": "train.jsonl", "prompt": "{a}", "completion": "{b}"},
    "output": "out",
}
OWN = {"name": "facts", "file": "f.jsonl", "metric": "exact_match", "prompt": "{a}", "answer": "{b}", "role": "task"}


def recipe(*entries: Any) -> Recipe:
    return make_recipe(VALUES | {"evaluate": list(entries)}, folder=Path(), where="recipe x")


def test_names_and_files_stand_side_by_side() -> None:
    found = recipe("triviaqa", {"name": "gsm8k", "shots": 0, "examples": 5}, OWN).evaluate
    assert found[:2] == [
        NamedBenchmark(name="triviaqa", role="knowledge"),
        NamedBenchmark(name="gsm8k", role="task", shots=0, examples=5),
    ]
    assert isinstance(found[2], FileBenchmark)


def test_what_is_written_is_read_again_the_same() -> None:
    found = recipe("triviaqa", {"name": "x", "task": "lambada_openai", "role": "task"}, OWN)
    assert make_recipe(found.written(), folder=Path(), where="again") == found


def test_every_name_of_the_table_can_stand_alone() -> None:
    for name, row in NAMES.items():
        data = None if row.hub else "data"
        entry = NamedBenchmark(name=name, data=data, run_code=row.code)
        assert (entry.role, entry.lm_eval_task, entry.row) == (row.role, row.task, row)
        for scoring in row.scorings:
            chosen = NamedBenchmark(name=name, data=data, run_code=row.code, scoring=scoring)
            assert chosen.metric == row.scorings[scoring].metric


def test_every_name_and_scoring_is_in_the_docs() -> None:
    page = (Path(__file__).parents[3] / "docs/guides/benchmarks.md").read_text("utf-8")
    words = [*NAMES, *(how for row in NAMES.values() for how in row.scorings)]
    assert [word for word in words if f"`{word}`" not in page] == []


def test_a_name_may_be_any_where_the_task_is_named() -> None:
    assert NamedBenchmark(name="mine", task="gsm8k").row == NAMES["gsm8k"]
    assert NamedBenchmark(name="mine", task="gsm8k_cot").lm_eval_task == "gsm8k_cot"
    assert NamedBenchmark(name="mine", task="gsm8k_cot").role == "knowledge"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("triviqa", 'Did you mean "triviaqa"'),
        ("glue", "cola, .*mrpc"),
        ({"name": "gsm8k", "shot": 3}, 'evaluate.0.shot.*Did you mean "shots"'),
        ({"name": "gsm8k", "scoring": "metamat"}, 'evaluate.gsm8k.scoring.*Did you mean "metamath"'),
        ({"name": "gsm8k", "role": "both"}, "evaluate.0.role"),
        ({"name": "gsm8k", "shots": -1}, "evaluate.gsm8k.shots.*0 or more"),
        ({"name": "gsm8k", "examples": 0}, "evaluate.gsm8k.examples.*1 or more"),
        ({"name": "gsm8k", "batch_size": 0}, "evaluate.gsm8k.batch_size.*1 or more"),
        ({"name": "gsm8k", "max_length": 4}, "evaluate.gsm8k.max_length.*8 or more"),
        ("humaneval", "evaluate.humaneval.run_code.*Add `run_code: true`"),
        ({"name": "code", "task": "mbpp"}, "evaluate.code.run_code.*Add `run_code: true`"),
        ("efficientqa", "evaluate.efficientqa.data.*Add `data: path`"),
        ({"name": "x", "task": "lambada_openai", "scoring": "paper"}, "evaluate.x.scoring.*standard"),
        ({"name": "facts", "file": "f.jsonl", "role": "task"}, "evaluate.0.metric"),
        ({"name": "facts", "metrik": "exact_match", "file": "f"}, "evaluate.0"),
        ({"role": "task"}, "evaluate.0.name"),
        (5, "evaluate.0"),
    ],
)
def test_wrong_entries_are_refused_with_what_to_do(entry: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(entry)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match='"gsm8k" twice'):
        recipe("gsm8k", {"name": "gsm8k", "scoring": "flexible"})


def test_keys_can_be_set_on_a_short_form(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: atlas\nmethod: lora\noutput: o\nevaluate: [triviaqa, gsm8k]\n"
        "task: {train: t.jsonl, prompt: '{a}', completion: '{b}'}\n",
        encoding="utf-8",
    )
    found = load_recipe(path, {"evaluate.1.shots": 2}).evaluate
    assert found == [NamedBenchmark(name="triviaqa"), NamedBenchmark(name="gsm8k", shots=2)]


def test_data_are_sought_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "gsm").mkdir()
    found = make_recipe(VALUES | {"evaluate": [{"name": "gsm8k", "data": "gsm"}]}, folder=tmp_path, where="x")
    assert found.evaluate == [NamedBenchmark(name="gsm8k", data=str(tmp_path / "gsm"))]
