"""Runs on a quantised base, from the recipe: what is refused and when, and one run to the end, with its repair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models import NF4
from tests.pipeline.support import MODEL, keeptune, recipe_of, write_recipe

from keeptune.adapter.load import check_base
from keeptune.core.errors import KeeptuneError, ModelError, PlanError, RecipeError
from keeptune.core.plan import Plan
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import load_model
from keeptune.pipeline.dry_run.describe import describe
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import run
from keeptune.pipeline.trained_changes import TrainedModel

# stories260K has 172 inner features, no multiple of a block of scales.
PACKED: dict[str, Any] = NF4 | {"llm_int8_skip_modules": ["lm_head", "down_proj"]}
Values = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"method": {"name": "full"}}, PlanError, "got a quantised base.*changes whole weights"),
        ({"anchor": "residual"}, PlanError, "would have to be quantised again"),
        ({"quantization": {"load_in_4bit": True, "bnb_quant_type": "nf4"}}, RecipeError, "Did you mean"),
        ({"quantization": {"quant_method": "eetq"}}, ModelError, "quantisation that runs here"),
    ],
)
@pytest.mark.parametrize("act", [run, describe])
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    recipe_values: Values,
    changes: dict[str, Any],
    kind: type[KeeptuneError],
    message: str,
    act: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("keeptune.pipeline.job.load_model", refused)
    with pytest.raises(kind, match=message):
        act(recipe_of(recipe_values(**{"quantization": PACKED, **changes})))


def test_a_checkpoint_that_is_stored_quantised_refuses_full_too(recipe_values: Values, tmp_path: Path) -> None:
    recipe = recipe_of(recipe_values(quantization=PACKED))
    Job(recipe).base().save_pretrained(tmp_path / "packed")
    Job(recipe).tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(PlanError, match="got a quantised base"):
        run(recipe_of(recipe_values(model=str(tmp_path / "packed"), method={"name": "full"})))


def test_only_a_base_of_floats_is_read_by_one_process_for_all(
    recipe_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is stored quantised has no weights of floats that another process could get a place for."""
    recipe = recipe_of(recipe_values(quantization=PACKED))
    Job(recipe).base().save_pretrained(tmp_path / "packed")
    shared: list[str] = []
    monkeypatch.setattr("keeptune.pipeline.job.load_to_share", lambda name, _: shared.append(name))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for values in (recipe_values(model=str(tmp_path / "packed")), recipe_values(quantization=PACKED), recipe_values()):
        Job(recipe_of(values)).base_to_train()
    assert shared == [str(MODEL)]


def test_a_quantisation_is_part_of_what_a_plan_is_made_from(recipe_values: Values) -> None:
    plain, packed = (Job(recipe_of(recipe_values(quantization=fields))) for fields in (None, PACKED))
    assert packed.plan_inputs["quantization"] == PACKED
    assert "quantization" not in plain.plan_inputs
    assert packed.base_fingerprint != plain.base_fingerprint


def test_a_run_on_four_bits_ends_in_an_adapter_for_that_base_which_can_be_repaired(
    recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    values = recipe_values(quantization=PACKED, method={"name": "keep", "rank": 4}, penalties=["l2"], replay=0.2)
    path = write_recipe(tmp_path / "recipe.yaml", values)
    said = keeptune("run", path, capsys=capsys)
    assert said.code == 0, said.err
    plan = Plan.load(folder / "plan")
    job = Job(recipe_of(values))
    assert plan.provenance["model"] == job.base_fingerprint
    check_base(folder / "adapter", job.base_fingerprint)
    with pytest.raises(ModelError, match="not the ones it was made for"):
        check_base(folder / "adapter", body_fingerprint(load_model(str(MODEL))))
    trained = TrainedModel.of(str(folder))
    assert trained.quantization == PACKED
    assert body_fingerprint(trained.load_base()) == job.base_fingerprint
    assert all(change is not None for _, _, change in trained.changes())
    repaired = tmp_path / "repaired"
    said = keeptune("repair", folder, "--output", repaired, "--store", values["store"], capsys=capsys)
    assert said.code == 0, said.err
    check_base(repaired, job.base_fingerprint)
