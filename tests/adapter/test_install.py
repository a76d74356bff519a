from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.models import MODELS, copies, handmade_plan, logits, off_by, relative, tokens, train_steps, trained_factors

from keeptune.adapter.anchor import ANCHOR_NAME, resolve, start_errors
from keeptune.adapter.install import (
    check_frozen,
    install,
    lora_layer,
    restore_state,
    trained_state,
)
from keeptune.adapter.trained_change import change_of
from keeptune.adapter.trained_head import trained_head
from keeptune.core.errors import PlanError, TrainError
from keeptune.core.plan import Plan

every_model = pytest.mark.parametrize("architecture", MODELS)


def installed(
    architecture: str, anchor: Any = "twin", dtype: torch.dtype = torch.float32, **plan: Any
) -> tuple[Any, Plan]:
    base = MODELS[architecture](dtype=dtype)
    made = handmade_plan(base, **plan)
    return install(base, made, anchor=anchor), made


# What install makes


@every_model
@pytest.mark.parametrize("anchor", ["twin", "residual"])
@pytest.mark.parametrize("anchored", [True, False])
def test_ranks_scales_and_factors_are_the_plans_at_every_target(architecture: str, anchor: str, anchored: bool) -> None:
    model, plan = installed(architecture, anchor, anchored=anchored)
    for target_plan in plan.targets:
        layer = lora_layer(model, target_plan.target.name)
        assert layer.r["default"] == target_plan.decision.rank
        assert layer.scaling["default"] == pytest.approx(target_plan.scale)
        assert torch.equal(layer.lora_A["default"].weight, target_plan.init.A)
        assert torch.equal(layer.lora_B["default"].weight, target_plan.init.B)
    wanted = ["default", ANCHOR_NAME] if anchored and anchor == "twin" else ["default"]
    assert list(model.peft_config) == wanted


@every_model
@pytest.mark.parametrize("anchor", ["twin", "residual"])
def test_other_ranks_and_scales_per_target_leave_the_output_unchanged(architecture: str, anchor: str) -> None:
    wanted = logits(MODELS[architecture](), tokens())
    model, _ = installed(architecture, anchor)
    assert off_by(logits(model, tokens()), wanted) < 1e-5


@every_model
def test_negative_control_without_its_anchor_the_start_changes_the_output(architecture: str) -> None:
    model, plan = installed(architecture)
    with torch.no_grad():
        for target_plan in plan.targets:
            lora_layer(model, target_plan.target.name).lora_B[ANCHOR_NAME].weight.zero_()
    assert off_by(logits(model, tokens()), logits(MODELS[architecture](), tokens())) > 0.1


@every_model
def test_a_twin_leaves_the_base_weights_bit_identical_and_a_residual_takes_the_start_out(architecture: str) -> None:
    base = copies(MODELS[architecture]())
    for anchor in ("twin", "residual"):
        model, plan = installed(architecture, anchor)
        for target_plan in plan.targets:
            weight = lora_layer(model, target_plan.target.name).get_base_layer().weight
            original = base[f"{target_plan.target.name}.weight"]
            if anchor == "twin":
                assert torch.equal(weight, original)
            else:
                start = target_plan.scale * target_plan.init.dense()
                start = start.T if target_plan.target.transposed else start
                assert relative(original - weight, start) < 1e-5


def test_only_anchored_targets_get_a_twin() -> None:
    base = MODELS["llama"]()
    plain, anchored = handmade_plan(base, anchored=False), handmade_plan(base)
    plan = dataclasses.replace(plain, targets=(*plain.targets[:-1], anchored.targets[-1]))
    model: Any = install(base, plan, anchor="twin")
    twins = [t.target.name for t in plan.targets if ANCHOR_NAME in lora_layer(model, t.target.name).lora_A]
    assert twins == [plan.targets[-1].target.name]
    assert off_by(logits(model, tokens()), logits(MODELS["llama"](), tokens())) < 1e-5


def test_extra_fields_of_the_plan_reach_peft() -> None:
    base = MODELS["llama"]()
    plan = dataclasses.replace(handmade_plan(base, anchored=False), peft={"lora_dropout": 0.25})
    model: Any = install(base, plan)
    assert model.peft_config["default"].lora_dropout == 0.25


# Anchors


@pytest.mark.parametrize(
    ("anchor", "dtype", "wanted"),
    [
        ("auto", torch.float32, "residual"),
        ("auto", torch.bfloat16, "twin"),
        ("auto", torch.float16, "twin"),
        ("twin", torch.float32, "twin"),
        ("residual", torch.bfloat16, "residual"),
    ],
)
def test_auto_takes_the_twin_unless_the_base_is_float32(anchor: Any, dtype: torch.dtype, wanted: str) -> None:
    assert resolve(anchor, dtype) == wanted
    if dtype != torch.float16:
        model, _ = installed("llama", anchor, dtype)
        assert (ANCHOR_NAME in model.peft_config) is (wanted == "twin")


@every_model
@pytest.mark.parametrize("trainable", ["AB", "B", "A"])
def test_twin_and_residual_train_alike(architecture: str, trainable: str) -> None:
    """Five AdamW steps in float32: the same logits and the same exported changes."""
    runs = []
    for anchor in ("twin", "residual"):
        model, plan = installed(architecture, anchor, trainable=trainable)
        train_steps(model, steps=5, rate=3e-3)
        runs.append((logits(model.eval(), tokens(9)), change_of(model, plan).weights))
    (twin, changes), (residual, others) = runs
    assert off_by(twin, logits(MODELS[architecture](), tokens(9))) > 1e-3
    assert off_by(twin, residual) < 1e-5
    size = max(float(change.norm_squared().sqrt()) for change in changes.values())
    for name, change in changes.items():
        assert float((change.dense() - others[name].dense()).norm()) < 1e-4 * size


def test_the_twin_is_put_back_after_set_adapter() -> None:
    """Trainer activates "default" alone when it resumes; without the anchor the model would be another one."""
    model, _ = installed("llama")
    wanted = logits(model, tokens())
    model.set_adapter("default")
    assert model.base_model.active_adapters == ["default"]
    assert torch.equal(logits(model, tokens()), wanted)
    assert model.base_model.active_adapters == ["default", ANCHOR_NAME]


def test_the_twin_is_not_put_back_where_another_adapter_is_chosen() -> None:
    model, _ = installed("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    logits(model, tokens())
    assert model.base_model.active_adapters == ["other"]


def test_the_twin_stays_out_while_adapters_are_disabled() -> None:
    model, _ = installed("llama")
    train_steps(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), logits(MODELS["llama"](), tokens()))


# start_errors


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_start_errors_are_rounding_of_the_residual_and_nothing_for_a_twin(architecture: str) -> None:
    def largest(dtype: torch.dtype, anchor: Any) -> float:
        base = MODELS[architecture](dtype=dtype)
        before = copies(base)
        found = start_errors(base, handmade_plan(base), anchor=anchor)
        assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
        return max(found.values())

    assert largest(torch.bfloat16, "twin") == largest(torch.float32, "twin") == largest(torch.bfloat16, "auto") == 0.0
    assert 0 < largest(torch.float32, "residual") == largest(torch.float32, "auto") < 1e-6
    assert 1e-3 < largest(torch.bfloat16, "residual") < 1e-2


# Factors


@every_model
def test_the_trained_state_goes_out_and_in(architecture: str) -> None:
    model, plan = installed(architecture)
    train_steps(model)
    kept = trained_state(model, plan)
    factors = {f"{t.target.name}.{factor}" for t in plan.targets for factor in "AB"}
    assert kept.keys() == factors | trained_head(model, plan).keys()
    fresh, _ = installed(architecture)
    restore_state(fresh, plan, kept)
    assert torch.equal(logits(fresh, tokens()), logits(model.eval(), tokens()))
    assert all(torch.equal(value, kept[name]) for name, value in trained_state(fresh, plan).items())


def test_factors_that_were_read_do_not_change_when_training_goes_on() -> None:
    model, plan = installed("llama")
    kept = trained_factors(model, plan)
    before = {name: factors.B.clone() for name, factors in kept.items()}
    train_steps(model, steps=2)
    assert all(torch.equal(kept[name].B, B) for name, B in before.items())


# check_frozen


def unfreeze_factor(model: PeftModel) -> str:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    model.get_parameter(name).requires_grad_(True)
    return name


def unfreeze_base(model: PeftModel) -> str:
    name = "base_model.model.model.norm.weight"
    model.get_parameter(name).requires_grad_(True)
    return name


def unfreeze_twin(model: PeftModel) -> str:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.anchor.weight"
    model.get_parameter(name).requires_grad_(True)
    return name


def freeze_trained(model: PeftModel) -> str:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    model.get_parameter(name).requires_grad_(False)
    return name


@pytest.mark.parametrize("change", [unfreeze_factor, unfreeze_base, unfreeze_twin, freeze_trained])
def test_a_parameter_that_is_not_as_planned_is_named(change: Callable[[PeftModel], str]) -> None:
    model, plan = installed("llama", trainable="B")
    check_frozen(model, plan)
    name = change(model)
    with pytest.raises(TrainError) as caught:
        check_frozen(model, plan)
    assert caught.value.where == f"parameter {name}"
    assert caught.value.got == ("frozen" if change is freeze_trained else "trainable")


def test_several_are_counted() -> None:
    model, plan = installed("llama", trainable="B")
    unfreeze_base(model)
    unfreeze_factor(model)
    freeze_trained(model)
    with pytest.raises(TrainError, match="and 2 more"):
        check_frozen(model, plan)


# Refusals


def test_a_model_already_wrapped_is_refused() -> None:
    model, plan = installed("llama")
    with pytest.raises(PlanError, match="already wrapped by PEFT"):
        install(model, plan)
    wrapped: Any = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PlanError, match="already wrapped by PEFT"):
        install(wrapped, plan)


def test_a_model_with_peft_layers_inside_is_refused() -> None:
    """get_peft_model changes the model that it wraps; the wrapper may have been dropped since."""
    base = MODELS["llama"]()
    plan = handmade_plan(base)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PlanError, match="already wrapped by PEFT"):
        install(base, plan)


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (lambda: MODELS["gpt2"](), "no such module"),
        (lambda: MODELS["llama"](head_dim=16), r"a weight of shape \(64, 32\)"),
    ],
    ids=["architecture", "size"],
)
def test_a_plan_for_another_model_is_refused_and_the_model_left_alone(other: Callable[[], Any], got: str) -> None:
    model = other()
    before = copies(model)
    with pytest.raises(PlanError, match=got):
        install(model, handmade_plan(MODELS["llama"]()))
    assert copies(model).keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_head_of_a_16_bit_classifier_is_trained_in_float32() -> None:
    """A step of 1e-4 on weights around 0.5 would round away in bfloat16."""
    base = MODELS["roberta"](dtype=torch.bfloat16)
    wanted = logits(base, tokens())
    plan = handmade_plan(base, anchored=False)
    model = install(base, plan)
    assert isinstance(model, PeftModel)
    assert relative(logits(model, tokens()), wanted) < 1e-2
    before = trained_head(model, plan)
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    train_steps(model, steps=1, rate=1e-4)
    for name, value in trained_head(model, plan).items():
        moved = (value - before[name]).abs()
        assert float((moved > 5e-5).float().mean()) > 0.9, name
