"""Post-hoc variants of weights: scaled changes, and variants as values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tests.models import gpt2, llama
from torch import Tensor

from keeptune.adapter.probe import logits_of, random_probe
from keeptune.experiments.posthoc_variants import Variant, put_between, refusal, scaled_adapter


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
    set_peft_model_state_dict(model, scaled_adapter(tensors, Variant("scale", 0.25)))
    after = changes(model)
    assert len(before) == 4
    for name, change in before.items():
        torch.testing.assert_close(after[name], 0.25 * change)


def test_a_scale_of_nothing_is_the_base_and_of_one_the_adapter() -> None:
    model, tensors = adapted()
    probe = random_probe(model)
    tuned, base = logits_of(model, probe), logits_of(llama(), probe)
    assert not torch.allclose(tuned, base)
    set_peft_model_state_dict(model, scaled_adapter(tensors, Variant("scale", 0)))
    assert torch.equal(logits_of(model, probe), base)
    set_peft_model_state_dict(model, scaled_adapter(tensors, Variant("scale", 1)))
    assert torch.equal(logits_of(model, probe), tuned)


# PEFT takes the bias of an adapter for a shard of a matrix.
@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")
def test_the_bias_of_an_adapter_is_scaled_with_it() -> None:
    model, tensors = adapted(gpt2(), lora_bias=True, fan_in_fan_out=True)
    found = scaled_adapter(tensors, Variant("scale", 0.5))
    biases = [name for name in tensors if name.endswith("lora_B.bias")]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(found[name], 0.5 * tensors[name])


def test_what_sets_lengths_or_trains_more_has_no_scale() -> None:
    model, tensors = adapted(use_dora=True)
    assert "DoRA" in refusal(tensors, model.peft_config["default"])
    model, tensors = adapted()
    with_head = {**tensors, "base_model.model.score.weight": torch.zeros(2, 2)}
    assert refusal(with_head, model.peft_config["default"]) == ""
    assert "in full" in refusal(with_head, LoraConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_lies_between_base_and_tuned(dtype: torch.dtype) -> None:
    base, tuned, model = llama(0, dtype), llama(1, dtype), llama(2, dtype)
    end = {name: weight.detach().clone() for name, weight in tuned.named_parameters()}
    for factor, same in ((0, base), (1, tuned)):
        put_between(model, base, end, Variant("scale", factor).between)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    put_between(model, base, end, Variant("scale", 0.25).between, ["model.norm"])
    for (name, weight), start in zip(model.named_parameters(), base.parameters(), strict=True):
        factor = 1.0 if name == "model.norm.weight" else 0.25
        expected = (start.float() + factor * (end[name].float() - start.float())).to(dtype)
        torch.testing.assert_close(weight.detach(), expected)


def test_a_head_that_the_base_has_not_stays_as_tuned() -> None:
    base, tuned, model = llama(0), llama(1), llama(2)
    end = {name: weight.detach().clone() for name, weight in tuned.named_parameters()}
    put_between(model, base, end, Variant("scale", 0).between, ["lm_head"])
    assert torch.equal(model.lm_head.weight, tuned.lm_head.weight)
    assert torch.equal(model.model.norm.weight, base.model.norm.weight)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_variant_is_read_back_and_has_a_folder_of_its_own(value: float, other: float) -> None:
    variant = Variant("scale", value)
    assert Variant(*next(iter(variant.record.items()))) == variant
    assert len(variant.slug) < 80
    assert (variant.slug == Variant("scale", other).slug) == (value == other)
    assert (Variant("scale", 0.5).slug, Variant("scale", 1).slug) == ("scale-0.5", "scale-1")
