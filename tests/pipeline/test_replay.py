"""`replay` in a recipe: what is trained on, what is recorded, and what it cannot be asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.pipeline.support import read_jsonl, recipe_of, write_jsonl

from keeptune.adapter.install import install
from keeptune.core.artefact import read_json
from keeptune.core.errors import DataError, RecipeError
from keeptune.core.plan import Plan
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import run
from keeptune.training import trainer as training

Values = Callable[..., dict[str, Any]]


def test_a_run_with_replay_trains_on_knowledge_too_and_says_so(recipe_values: Values, tmp_path: Path) -> None:
    trained = []
    for share in (0.0, 0.2):
        output = tmp_path / str(share)
        run(recipe_of(recipe_values(replay=share, evaluate=[], output=str(output))))
        record = read_json(output / "trained" / "train.json")
        assert record["replay"] == {"share": share, "examples": 5 if share else 0}
        assert read_json(output / "recipe.json")["replay"] == share
        trained.append((record["plan"], record["key"], load_file(output / "trained" / "factors.safetensors")))
    assert trained[0][0] == trained[1][0]
    assert trained[0][1] != trained[1][1]
    assert any(not torch.equal(value, trained[1][2][name]) for name, value in trained[0][2].items())


def test_texts_are_learned_from_their_first_word_on(recipe_values: Values, tmp_path: Path) -> None:
    job = Job(recipe_of(recipe_values(replay=0.3)))
    run(recipe_of(recipe_values(evaluate=[], train={"max_steps": 1}, output=str(tmp_path / "out"))))
    plan = Plan.load(tmp_path / "out" / "plan")
    model = install(job.base(), plan)
    made = training._trainer(model, plan, job.tokenizer, job.trained_examples, job.config(tmp_path, torch.float32))
    replayed = 0
    texts = {text[:60] for part in job.knowledge for text in part.read_texts}
    for row in made.train_dataset:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        if job.tokenizer.decode(ids, skip_special_tokens=True).strip()[:60] in texts:
            replayed += 1
            assert int((labels == -100).sum()) <= 1, "the start token at most is read only"
    assert replayed == 9


def test_a_classifier_has_no_replay(recipe_values: Values, tmp_path: Path) -> None:
    rows = [{"sentence": f"word {n}", "label": "ab"[n % 2]} for n in range(8)]
    file = write_jsonl(tmp_path / "labels.jsonl", rows)
    task = {"kind": "classification", "train": str(file), "text": "{sentence}", "label": "{label}"}
    with pytest.raises(RecipeError, match="replay: got 0.1 with task.kind classification"):
        Job(recipe_of(recipe_values(replay=0.1, task=task, evaluate=[], train={}))).check()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_shares_out_of_range(share: float, recipe_values: Values) -> None:
    with pytest.raises(RecipeError, match="replay"):
        recipe_of(recipe_values(replay=share))


def test_what_is_replayed_may_not_be_scored(recipe_values: Values, tmp_path: Path, data: Path) -> None:
    values = recipe_values(replay=0.1)
    values["knowledge"]["file"] = str(write_jsonl(tmp_path / "seen.jsonl", read_jsonl(data / "stories.jsonl", 3)))
    with pytest.raises(DataError, match="stories"):
        Job(recipe_of(values)).check()
