"""`task.loss` and `task.stm_threshold` in a recipe: what is trained and recorded, and what it cannot be asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from tests.pipeline.support import recipe_of

from keeptune.core.artefact import read_json
from keeptune.core.errors import KeeptuneError, RecipeError, TrainError
from keeptune.pipeline.dry_run.describe import describe
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import run
from keeptune.pipeline.training import trained_result
from keeptune.training.guard import divergence

Values = Callable[..., dict[str, Any]]


def with_task(make: Values, **keys: Any) -> dict[str, Any]:
    given = make(evaluate=[])
    return given | {"task": given["task"] | keys}


def test_a_run_says_by_what_it_learned(recipe_values: Values) -> None:
    recipe = recipe_of(with_task(recipe_values, loss={"name": "eaft", "alpha": 0.5}, stm_threshold=2000.0))
    report = run(recipe)
    record = read_json(recipe.output / "trained" / "train.json")
    assert record["task_loss"] == {"name": "eaft", "alpha": 0.5}
    assert record["stm"]["threshold"] == 2000.0
    assert 0 < record["stm"]["masked"] < record["stm"]["tokens"]
    assert all(math.isfinite(row["nll"]) and row["nll"] != row["loss"] for row in record["loss"])
    (entry,) = report["methods"]
    assert entry["name"].endswith(" + eaft + stm")
    assert any(
        note.startswith(f"stm: {record['stm']['masked']} of {record['stm']['tokens']} tokens")
        for note in entry["notes"]
    )


def test_sdft_goes_through_the_whole_job(recipe_values: Values) -> None:
    given = recipe_values(evaluate=recipe_values()["evaluate"][:1])
    given["task"] |= {"loss": {"name": "sdft", "max_completion_length": 4}}
    given["train"] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "learning_rate": 0.05,
    }
    recipe = recipe_of(given)
    report = run(recipe)
    record = read_json(recipe.output / "trained" / "train.json")
    assert len(record["loss"]) == describe(recipe).train.steps == 4  # the last 4 of 20 examples make no step
    assert all(0 < row["loss"] < math.inf and 0 < row["completions/mean_length"] <= 4 for row in record["loss"])
    assert divergence([row["loss"] for row in record["loss"]]) and not record["notes"]  # its texts are others each time
    (entry,) = report["methods"]
    assert entry["name"].endswith(" + sdft") and entry["benchmarks"][0]["n"] == 3
    assert (recipe.output / "adapter" / "adapter_model.safetensors").is_file()


def test_what_is_learned_is_part_of_the_key(recipe_values: Values) -> None:
    weights = [{"loss": {"name": "asft", "kl_weight": weight}} for weight in (0.1, 0.2)]
    keys = []
    for task in (
        {},
        {"loss": "nll"},
        {"loss": "dft"},
        {"loss": "asft"},
        *weights,
        {"stm_threshold": 2.5},
        {"truncate": "left"},
    ):
        job = Job(recipe_of(with_task(recipe_values, **task)))
        keys.append(trained_result(job, _Plan()).key)  # type: ignore[arg-type]
    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys)) == 6


class _Plan:
    key = "plan"


@pytest.mark.parametrize(
    ("task", "others", "error", "told"),
    [
        ({"loss": "daft"}, {}, RecipeError, 'task.loss: got "daft".*dft'),
        ({"loss": {"alpha": 1}}, {}, RecipeError, "task.loss: got no name"),
        ({"loss": {"name": "eaft", "power": 1}}, {}, RecipeError, "task.loss.power"),
        ({"stm_threshold": 0.5}, {}, RecipeError, "task.stm_threshold"),
        ({"stm_threshold": math.inf}, {}, RecipeError, "task.stm_threshold"),
        ({"loss": "dft"}, {"train": {"label_smoothing_factor": 0.1}}, TrainError, "label_smoothing_factor beside"),
        ({"loss": "dft"}, {"train": {"loss_type": "dft"}}, TrainError, r"train\.loss_type beside"),
        ({"loss": "sdft"}, {"replay": 0.1}, TrainError, "task.loss sdft: got whole texts, several files or replay"),
        ({"loss": "sdft"}, {"train": {"packing": True}}, TrainError, r"train\.packing"),
        ({"loss": "asft"}, {"method": "full"}, TrainError, "the method full, which overwrites the base"),
        ({"loss": "asft"}, {"modules_to_save": ["embed_tokens"]}, TrainError, "embed_tokens trained beside"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_is_computed(
    task: dict[str, Any], others: dict[str, Any], error: type[KeeptuneError], told: str, recipe_values: Values
) -> None:
    with pytest.raises(error, match=told):
        Job(recipe_of(with_task(recipe_values, **task) | others)).check()


def test_a_classifier_has_no_such_loss(recipe_values: Values) -> None:
    task = {"train": "x.jsonl", "kind": "classification", "text": "{a}", "label": "{b}", "loss": "dft"}
    with pytest.raises(RecipeError, match="task.loss: got a key that kind classification does not use"):
        recipe_of(recipe_values() | {"task": task})


def test_the_account_knows_what_each_loss_takes(recipe_values: Values) -> None:
    found = {}
    for loss in ("nll", "dft", "eaft", "asft", "sdft"):
        account = describe(recipe_of(with_task(recipe_values, loss=loss)))
        found[loss] = (account.memory["training"]["logits"], account.work["train"])
    assert found["nll"] == found["dft"]
    assert found["eaft"][1] == found["nll"][1] < found["asft"][1] < found["sdft"][1]
    assert found["nll"][0] <= found["eaft"][0] <= found["asft"][0]
