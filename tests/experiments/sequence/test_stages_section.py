"""The recipe of a sequence: strict, with what a stage overrides and what it takes from the stages before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, write_recipe

from keeptune.core.errors import KeeptuneError, RecipeError
from keeptune.experiments.sequence.stages_section import StageSequence, load_sequence, make_sequence
from keeptune.recipe.schema import make_recipe

Make = Callable[..., StageSequence]


def test_a_stage_overrides_keys_of_the_recipe(make: Make) -> None:
    sequence = make()
    cats, dogs, sums = sequence.stages
    assert [stage.folder for stage in sequence.stages] == ["1-cats", "2-dogs", "3-sums"]
    assert [stage.recipe.method["name"] for stage in sequence.stages] == ["lora", "lora-null", "lora"]  # type: ignore[call-overload]
    assert cats.recipe.train == sums.recipe.train
    assert dogs.recipe.train == {**cats.recipe.train, "learning_rate": 1e-2}
    assert (cats.recipe.targets, sums.recipe.targets) == (None, ["q_proj", "down_proj"])
    assert cats.recipe.model == dogs.recipe.model
    assert sequence.output == cats.recipe.output


def test_benchmarks_belong_to_the_stage_of_their_name_or_to_the_one_told(make: Make) -> None:
    assert make().owners == {"cats": "cats", "dogs": "dogs", "sums": "sums"}
    told = make(sequence={"benchmarks": {"cats": "sums"}})
    assert told.owners == {"cats": "sums", "dogs": "dogs", "sums": "sums"}


def test_earlier_stages_as_knowledge(make: Make, data: Path) -> None:
    facts = {"file": str(data / "knowledge.jsonl"), "text": "{text}", "examples": 4}
    sequence = make(knowledge=[facts, {"file": "stages:earlier", "examples": 5}])
    sets = [list(stage.recipe.knowledge_sets.values()) for stage in sequence.stages]
    assert [[Path(part.file).name for part in parts] for parts in sets] == [
        ["knowledge.jsonl"],
        ["knowledge.jsonl", "cats.jsonl"],
        ["knowledge.jsonl", "cats.jsonl", "dogs.jsonl"],
    ]
    assert (sets[1][1].prompt, sets[1][1].completion, sets[1][1].examples) == ("{question}\nAnswer:", " {answer}", 5)


def test_one_earlier_stage_as_texts_of_what_it_trained_on(make: Make, recipe_of_stages: Any, tmp_path: Path) -> None:
    values = recipe_of_stages(tmp_path / "out")
    values["stages"][0]["task"]["examples"] = 3
    values["stages"][2]["knowledge"] = {"file": "stages:cats", "text": "{question} {answer}"}
    last = make(stages=values["stages"]).stages[-1].recipe
    (part,) = last.knowledge_sets.values()
    assert (Path(part.file).name, part.text, part.prompt, part.examples) == (
        "cats.jsonl",
        "{question} {answer}",
        None,
        3,
    )


def test_the_first_stage_has_nothing_to_replay(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="keeptune"):
        sequence = make(knowledge={"file": "stages:earlier"}, replay=0.5, method={"name": "lora", "rank": 2})
    assert [stage.recipe.replay for stage in sequence.stages] == [0.0, 0.5, 0.5]
    assert [len(stage.recipe.knowledge_sets) for stage in sequence.stages] == [0, 1, 2]
    assert "stage cats" in caplog.text


def _stages(**first: Any) -> dict[str, Any]:
    task = {"train": "x.jsonl", "prompt": "{a}", "completion": "{b}"}
    return {"stages": [{"name": "cats", "task": task, **first}, {"name": "dogs", "task": task}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": []}, ["key stages", "a list of stages"]),
        ({"stages": {"a": 1}}, ["key stages", "a list of stages"]),
        ({"stages": [{"task": {}}]}, ["stage 1", "no name"]),
        ({"stages": [{"name": "a/b"}]}, ["stage 1", "'a/b'"]),
        ({"stages": [{"name": "earlier"}]}, ["stage 1", "'earlier'"]),
        ({"stages": [{"name": "a"}, {"name": "A"}]}, ["stage 2", "'A' twice"]),
        (_stages(model="x"), ["stage cats", "no change of model", "the first stage starts from the base"]),
        (_stages(**{"export.rank": 4}), ["stage cats", "no change of export"]),
        (_stages(evaluate=[]), ["stage cats", "scored after each stage"]),
        (_stages(lerning=1), ["stage cats", "key lerning", "unknown key"]),
        (_stages(method={"name": "lora", "rnk": 3}), ["stage cats", "rnk", "rank"]),
        (_stages(**{"train.learning_rat": 1}), ["stage cats", "learning_rat", "learning_rate"]),
        (_stages(knowledge={"file": "stages:cats"}), ["stage cats", "stages:cats", "none before it"]),
        ({"sequence": {"keep_model": True}}, ["key sequence", "keep_model", "keep_models"]),
        ({"sequence": {"benchmarks": {"catz": "cats"}}}, ["sequence.benchmarks", "'catz'", "cats"]),
        ({"sequence": {"benchmarks": {"cats": "dog"}}}, ["sequence.benchmarks", "stage 'dog'", "dogs"]),
        ({"sequence": {"benchmarks": {"stories": "dogs"}}}, ["sequence.benchmarks", "knowledge", "stories"]),
        ({"evaluate": []}, ["key evaluate", "after each stage"]),
        ({"modle": "x"}, ["modle", "model"]),
    ],
)
def test_refusals(make: Make, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        make(**changes)
    assert all(word in str(error.value) for word in said), str(error.value)


def test_an_unknown_earlier_stage_names_the_nearest(make: Make, recipe_of_stages: Any, tmp_path: Path) -> None:
    values = recipe_of_stages(tmp_path / "out")
    values["stages"][1]["knowledge"] = {"file": "stages:cat"}
    with pytest.raises(RecipeError, match=r"stage dogs.*stages:cat.*cats"):
        make(stages=values["stages"])


def test_a_classifier_is_refused(make: Make, recipe_of_stages: Any, tmp_path: Path) -> None:
    values = recipe_of_stages(tmp_path / "out")
    task = {"train": values["stages"][1]["task"]["train"], "kind": "classification", "text": "{a}", "label": "{b}"}
    values["stages"][1]["task"] = task
    with pytest.raises(RecipeError, match=r"stage dogs, key task.kind.*stages share one model, and .* one task"):
        make(stages=values["stages"])


def test_other_commands_refuse_stages(
    recipe_of_stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe_of_stages(tmp_path / "out")
    with pytest.raises(RecipeError, match=r"key stages.*no single task.*keeptune run"):
        make_recipe(values, folder=tmp_path, where="recipe")
    path = write_recipe(tmp_path / "recipe.yaml", values)
    for command in ("plan", "train", "sweep"):
        said = keeptune(command, path, capsys=capsys)
        assert said.code == 2
        assert "stages" in said.err or "sweep" in said.err


def test_a_file_and_overrides(recipe_of_stages: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_of_stages(tmp_path / "out"))
    sequence = load_sequence(path, {"train.seed": 5, "stages.1.train.seed": 6})
    assert [stage.recipe.train["seed"] for stage in sequence.stages] == [5, 6, 5]


def test_relative_files_start_at_the_recipe(recipe_of_stages: Any, data: Path, tmp_path: Path) -> None:
    values = recipe_of_stages(tmp_path / "out")
    values["stages"][0]["task"]["train"] = "cats.jsonl"
    values["stages"][1]["knowledge"] = {"file": "stages:cats"}
    stages = make_sequence(values, folder=data, where="recipe").stages
    assert stages[0].recipe.task.train == str(data / "cats.jsonl") == stages[1].recipe.knowledge_sets["knowledge"].file


def test_errors_of_a_stage_name_it_once(make: Make) -> None:
    with pytest.raises(KeeptuneError) as error:
        make(method={"name": "lroa"})
    assert str(error.value).count("stage cats") == 1
