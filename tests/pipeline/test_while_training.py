"""Benchmarks while a run trains: the scores that the finished adapter has, the best state exported, kill and resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import METHODS, recipe_of, values
from tests.pipeline.test_resume import train_in, trained

from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError, TrainError
from keeptune.pipeline.run import run

TRAIN = {
    "learning_rate": 5e-3,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "seed": 3,
    "save_steps": 2,
    "eval_steps": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "residual": {"method": METHODS["lora-null-v1"], "anchor": "residual"},
    "beside": {"method": METHODS["lora"], "modules_to_save": ["model.norm"]},
    "full": {"method": METHODS["full"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_while_training_is_what_the_exported_result_scores(
    kind: str, data: Path, store: Path, tmp_path: Path
) -> None:
    given = values(data, tmp_path / "out", store, train=TRAIN, stop_at_loss=1.0, **KINDS[kind])
    (report,) = run(recipe_of(given))["methods"]
    record = read_json(tmp_path / "out/trained/train.json")
    (note,) = (note for note in record["notes"] if note.startswith("stop_at_loss"))
    rows = record["evaluations"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and len({row["eval_stories"] for row in rows}) == 4
    (kept,) = (row for row in rows if f"step {row['step']} is kept" in note)
    scored = {one["name"]: one for one in report["benchmarks"]}
    assert abs(scored["stories"]["before"] - kept["eval_stories"]) > 1e-3, "training moved the model"
    for name, one in scored.items():
        assert kept[f"eval_{name}"] == pytest.approx(one["after"], rel=1e-4)
    assert kept["eval_stories_kl_to_base"] == pytest.approx(scored["stories"]["kl_to_base"], rel=1e-3)
    assert kept["eval_forgetting"] == pytest.approx(report["average_forgetting"], rel=1e-3)
    assert kept["eval_learned"] == scored["sums"]["after"] == max(row["eval_learned"] for row in rows)


def test_a_training_that_is_killed_keeps_the_same_best_state(data: Path, store: Path, tmp_path: Path) -> None:
    given = values(data, tmp_path / "a", store, train=TRAIN, stop_at_loss=1.0)
    whole = train_in(tmp_path / "a", given)
    (first,) = (whole / "checkpoints").glob("*/checkpoint-2")
    shutil.copytree(first, tmp_path / "b" / first.relative_to(whole))
    shutil.copytree(first.parent / "best", tmp_path / "b" / first.parent.relative_to(whole) / "best")
    resumed = train_in(tmp_path / "b", given)
    records = [read_json(folder / "trained/train.json") for folder in (whole, resumed)]
    assert records[0]["evaluations"] == records[1]["evaluations"] and records[0]["notes"] == records[1]["notes"]
    assert all((trained(whole)[name] == value).all() for name, value in trained(resumed).items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stop_at_loss": -0.1}, "stop_at_loss"),
        ({"stop_at_loss": 0.1, "evaluate": []}, r"stop_at_loss: got no benchmark of role knowledge in `evaluate`"),
        ({"train": {"eval_strategy": "epoch"}, "evaluate": []}, r"train\.eval_strategy: got no benchmark in"),
        ({"stop_at_loss": 0.1, "train": {"eval_strategy": "no"}}, r"stop_at_loss: got train\.eval_strategy: no"),
    ],
)
def test_wrong_evaluations_are_refused(changes: dict[str, Any], told: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe_of(values(data, tmp_path / "out", tmp_path, **changes))


def test_shards_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"eval_strategy: got steps with a model in shards"):
        run(recipe_of(values(data, tmp_path / "out", tmp_path, stop_at_loss=0.1)))


def test_a_run_that_loses_too_much_at_once_is_an_error_that_says_so(data: Path, store: Path, tmp_path: Path) -> None:
    wild = TRAIN | {"learning_rate": 0.5}
    with pytest.raises(TrainError, match=r"lost at step 1, wanted an evaluation at which at most 0\.001 is lost"):
        train_in(tmp_path / "out", values(data, tmp_path / "out", store, train=wild, stop_at_loss=0.001))
