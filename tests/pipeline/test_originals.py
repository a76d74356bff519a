"""Runs on quantised bases and their originals: both gaps and both scores, merges, and what is asked for without one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.gguf_files import gguf_llama, write_gguf
from tests.models import NF4, logits, off_by
from tests.pipeline.support import MODEL, keeptune, recipe_of, write_recipe

from keeptune.adapter.install import install
from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError
from keeptune.core.weights import is_quantised
from keeptune.model.pretrained import LoadOptions, load_config, load_model
from keeptune.pipeline.job import Job
from keeptune.pipeline.originals import original_of
from keeptune.pipeline.run import plan_stage, run

Values = Callable[..., dict[str, Any]]
# down_proj has inputs of no multiple of 64, which bitsandbytes reads wrong on the CPU.
PACKED = NF4 | {"llm_int8_skip_modules": ["down_proj", "lm_head"]}


def test_a_run_scores_its_adapter_on_both_bases_and_merges_into_the_original(
    recipe_values: Values, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe_values(quantization=PACKED, export={"check_original": True}, targets=["q_proj", "v_proj"])
    recipe = recipe_of(asked)
    with caplog.at_level(logging.INFO, "keeptune"):
        run(recipe)
    export = read_json(recipe.output / "adapter" / "export.json")
    assert export["original"] == str(MODEL) and export["original_gap"] > 3 * export["gap"]
    assert "training on the quantised base; on the original" in caplog.text
    for name in ("stories", "sums", "animals"):
        assert f"{name} on the original {MODEL}: " in caplog.text
        own, other = (
            read_json(recipe.output / folder / f"{name}.json") for folder in ("evaluation", "evaluation-original")
        )
        assert own["weights"] == other["weights"]
    kept = [
        read_json(recipe.output / folder / "stories.json")["summary"]["before"]
        for folder in ("evaluation", "evaluation-original")
    ]
    assert kept[0] != kept[1]  # the bases differ

    run(recipe_of(asked | {"export": {"format": "merged"}}))
    merged = load_model(str(recipe.output / "merged"))
    assert not is_quantised(merged)
    assert read_json(recipe.output / "merged" / "export.json")["original_gap"] == pytest.approx(export["original_gap"])
    before = read_json(recipe.output / "evaluation" / "stories.json")["summary"]["before"]
    assert before == pytest.approx(kept[1])  # scored against the original
    own = load_model(str(MODEL)).state_dict()
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, own[name])}
    assert moved and all("q_proj" in name or "v_proj" in name for name in moved)


def test_a_start_from_the_original_is_another_plan_of_which_training_starts_at_the_quantised_base(
    recipe_values: Values,
) -> None:
    asked = recipe_values(quantization=PACKED, method={"name": "pissa", "rank": 2}, targets=["q_proj"], evaluate=[])
    own = Job(recipe_of(asked))
    other = Job(recipe_of(asked | {"start_from": "original", "output": f"{asked['output']}-original"}))
    assert own.plan_inputs != other.plan_inputs
    plans = [plan_stage(job) for job in (own, other)]
    assert not any(torch.equal(a.init.A, b.init.A) for a, b in zip(*(plan.targets for plan in plans), strict=True))
    ids = torch.arange(3, 60)[None]
    for plan in plans:
        tuned = install(other.base_to_train(), plan, anchor=other.recipe.anchor)
        assert off_by(logits(tuned.eval(), ids), logits(other.base(), ids)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"start_from": "original"}, "key start_from: got original without the original weights"),
        ({"export": {"check_original": True}}, r"key export.check_original: got true without the original weights"),
        ({"original": str(MODEL)}, "which is not quantised, wanted none"),
    ],
)
def test_an_original_that_is_not_at_hand_is_an_error_before_anything_is_computed(
    changes: dict[str, Any], wanted: str, recipe_values: Values, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_values(**changes))
    said = keeptune("run", path, capsys=capsys)
    assert said.code == 2
    with pytest.raises(RecipeError, match=wanted):
        Job(recipe_of(recipe_values(**changes))).check()
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_stored_quantised_needs_the_original_named_and_of_its_shape(
    recipe_values: Values, tmp_path: Any
) -> None:
    packed = load_model(str(MODEL), LoadOptions(quantization=PACKED))
    packed.save_pretrained(tmp_path / "packed")
    base = {"model": str(tmp_path / "packed")}
    config = load_config(base["model"])
    assert original_of(recipe_of(recipe_values(**base)), config) is None
    with pytest.raises(RecipeError, match=r"key export.format: got merged without the original weights"):
        Job(recipe_of(recipe_values(**base, export={"format": "merged"}))).check()
    named = recipe_of(recipe_values(**base, original=str(MODEL)))
    assert original_of(named, config) == str(MODEL)
    write_gguf(gguf_llama(), tmp_path / "other.gguf")
    with pytest.raises(RecipeError, match="original: got .*of another"):
        Job(recipe_of(recipe_values(**base, original=str(tmp_path / "other.gguf")))).check()
    with pytest.raises(RecipeError, match="quantised itself"):
        Job(recipe_of(recipe_values(**base, original=base["model"]))).check()
