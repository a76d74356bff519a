"""Post-hoc variants of weights: scaled changes and reduced intruder dimensions, and variants as values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tests.models import gpt2, llama
from tests.reference.intruders_reference import without_intruders
from torch import Tensor

from keeptune.adapter.probe import logits_of, random_probe
from keeptune.core.errors import ModelError, RecipeError
from keeptune.experiments.posthoc_scaling import (
    Variant,
    interpolate,
    put_adapter,
    refusal,
    standard_variants,
    variant_adapter,
    variant_of,
)


def adapted(base: Any = None, size: float = 0.5, **config: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """A tiny model with a random adapter of rank 4 and scale 2, and the adapter's tensors."""
    targets = ["q_proj", "down_proj"] if base is None else ["c_attn"]
    model = get_peft_model(
        llama() if base is None else base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return model.eval(), {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def changes(model: PeftModel) -> dict[str, Tensor]:
    """Each layer's change, as PEFT merges it."""
    return {
        name: module.get_delta_weight("default").detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "lora_B")
    }


def test_a_scale_multiplies_every_change() -> None:
    model, tensors = adapted()
    before = changes(model)
    put_adapter(model, variant_adapter(model, tensors, Variant("scale", 0.25)))
    after = changes(model)
    assert len(before) == 4
    for name, change in before.items():
        torch.testing.assert_close(after[name], 0.25 * change)


def test_a_scale_of_nothing_is_the_base_and_of_one_the_adapter() -> None:
    model, tensors = adapted()
    probe = random_probe(model)
    tuned, base = logits_of(model, probe), logits_of(llama(), probe)
    assert not torch.allclose(tuned, base)
    put_adapter(model, variant_adapter(model, tensors, Variant("scale", 0)))
    assert torch.equal(logits_of(model, probe), base)
    put_adapter(model, variant_adapter(model, tensors, Variant("scale", 1)))
    assert torch.equal(logits_of(model, probe), tuned)


# PEFT takes the bias of an adapter for a shard of a matrix.
@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")
def test_the_bias_of_an_adapter_is_scaled_with_it() -> None:
    model, tensors = adapted(gpt2(), lora_bias=True, fan_in_fan_out=True)
    found = variant_adapter(model, tensors, Variant("scale", 0.5))
    biases = [name for name in tensors if name.endswith("lora_B.bias")]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(found[name], 0.5 * tensors[name])


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_intruders_are_reduced_as_written_out_in_loops(keep: float) -> None:
    model, tensors = adapted()
    before = changes(model)
    put_adapter(model, variant_adapter(model, tensors, Variant("intruders", keep)))
    moved = 0
    for name, change in changes(model).items():
        weight = model.get_submodule(name).get_base_layer().weight.detach()
        expected = without_intruders(weight, before[name], keep, rank=4)
        torch.testing.assert_close(change.double(), expected, rtol=1e-3, atol=1e-4)
        moved += not torch.allclose(change, before[name], atol=1e-3)
    assert moved  # there were intruders


def test_keeping_intruders_whole_keeps_the_change() -> None:
    model, tensors = adapted()
    before = changes(model)
    put_adapter(model, variant_adapter(model, tensors, Variant("intruders", 1.0)))
    for name, change in changes(model).items():
        torch.testing.assert_close(change, before[name], rtol=1e-3, atol=1e-4)


def test_a_reduction_leaves_model_and_random_state_as_they_were() -> None:
    model, tensors = adapted()
    probe = random_probe(model)
    tuned, state = logits_of(model, probe), torch.get_rng_state()
    first = variant_adapter(model, tensors, Variant("intruders", 0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model, probe), tuned)
    put_adapter(model, variant_adapter(model, tensors, Variant("scale", 0.5)))
    again = variant_adapter(model, tensors, Variant("intruders", 0.5))  # of the adapter as trained
    assert all(torch.equal(first[name], again[name]) for name in tensors)


# PEFT takes the bias of an adapter for a shard of a matrix.
@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")
@pytest.mark.parametrize(
    ("variant", "base", "config", "part"),
    [
        (Variant("scale", 0.5), None, {"use_dora": True}, "DoRA"),
        (Variant("intruders", 0.5), gpt2, {"lora_bias": True, "fan_in_fan_out": True}, "biases"),
        (Variant("intruders", 0.5), gpt2, {"fan_in_fan_out": True}, "transposed"),
    ],
)
def test_what_cannot_be_made_is_refused(variant: Any, base: Any, config: dict[str, Any], part: str) -> None:
    model, tensors = adapted(base and base(), **config)
    with pytest.raises(ModelError, match=part):
        variant_adapter(model, tensors, variant)


def test_peft_writes_factors_of_another_shape_for_transposed_weights() -> None:
    """Why Conv1D is refused; when this fails, PEFT has corrected it."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model, _ = adapted(gpt2(), fan_in_fan_out=True, size=5.0)
    reduce_intruder_dimension(model, mitigation_lambda=0.0, logging_sink=None)
    layer = next(m for m in model.modules() if hasattr(m, "lora_B"))
    assert layer.lora_B["intruder_reduced"].weight.shape != layer.lora_B["default"].weight.shape


def test_a_head_and_a_whole_model_have_no_intruders_to_reduce() -> None:
    model, tensors = adapted()
    with_head = {**tensors, "base_model.model.score.weight": torch.zeros(2, 2)}
    assert "head" in refusal(Variant("intruders", 0.5), with_head, model.peft_config["default"])
    assert refusal(Variant("scale", 0.5), with_head) == ""
    assert "whole models" in refusal(Variant("intruders", 0.5), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_lies_between_base_and_tuned(dtype: torch.dtype) -> None:
    base, tuned, model = llama(0, dtype), llama(1, dtype), llama(2, dtype)
    end = {name: weight.detach().clone() for name, weight in tuned.named_parameters()}
    for factor, same in ((0, base), (1, tuned)):
        interpolate(model, base, end, factor)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    interpolate(model, base, end, 0.25, whole=["model.norm"])
    for (name, weight), start in zip(model.named_parameters(), base.parameters(), strict=True):
        factor = 1.0 if name == "model.norm.weight" else 0.25
        expected = (start.float() + factor * (end[name].float() - start.float())).to(dtype)
        torch.testing.assert_close(weight.detach(), expected)


def test_a_head_that_the_base_has_not_stays_as_tuned() -> None:
    base, tuned, model = llama(0), llama(1), llama(2)
    end = {name: weight.detach().clone() for name, weight in tuned.named_parameters()}
    interpolate(model, base, end, 0, whole=["lm_head"])
    assert torch.equal(model.lm_head.weight, tuned.lm_head.weight)
    assert torch.equal(model.model.norm.weight, base.model.norm.weight)


def test_standard_variants_leave_out_the_run_itself() -> None:
    assert [variant.slug for variant in standard_variants([0.25, 1.0])] == ["scale-0.25", "intruders-0.5"]
    assert [variant.slug for variant in standard_variants([0.5], intruders=[])] == ["scale-0.5"]


@given(st.sampled_from(["scale", "intruders"]), st.floats(0, 1), st.floats(0, 1))
def test_a_variant_is_read_back_and_has_a_folder_of_its_own(kind: str, value: float, other: float) -> None:
    variant = Variant(kind, value)
    assert variant_of(variant.plain()) == variant
    assert len(variant.slug) < 80
    assert (variant.slug == Variant(kind, other).slug) == (value == other)
    assert (Variant("scale", 0.5).slug, Variant("scale", 1).slug) == ("scale-0.5", "scale-1")


@pytest.mark.parametrize("plain", [{"scale": 1.5}, {"intruders": float("nan")}, {"size": 1}, {}, {"scale": 1, "x": 1}])
def test_what_is_no_variant_is_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        variant_of(plain)
