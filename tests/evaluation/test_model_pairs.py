from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from keeptune.core.errors import ModelError
from keeptune.evaluation.model_pairs import AdapterPair, scoring

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[1, 5, 9, 14]])


def adapted(model: Any, **extra: Any) -> Any:
    torch.manual_seed(5)
    peft_model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **extra)
    )
    for name, weight in peft_model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    return peft_model


def test_adapter_off_is_the_base_and_on_is_the_tuned_model(tiny: Any) -> None:
    with torch.no_grad():
        base = tiny(input_ids=IDS).logits
        peft_model = adapted(tiny).eval()
        tuned = peft_model(input_ids=IDS).logits
    pair = AdapterPair(peft_model)
    assert not torch.allclose(base, tuned)
    for _ in range(2):
        with scoring(pair, "before") as model:
            assert torch.equal(model(input_ids=IDS).logits, base)
        with scoring(pair, "after") as model:
            assert torch.equal(model(input_ids=IDS).logits, tuned)


def test_gradients_and_modes_are_as_before(tiny: Any) -> None:
    peft_model = adapted(tiny, lora_dropout=0.5).train()
    peft_model.get_base_model().lm_head.eval()
    grads = [weight.requires_grad for weight in peft_model.parameters()]
    modes = [module.training for module in peft_model.modules()]
    assert any(grads) and not all(modes)
    for side in ("before", "after"):
        with pytest.raises(ZeroDivisionError), scoring(AdapterPair(peft_model), side) as model:
            assert not any(module.training for module in model.modules())
            assert not model(input_ids=IDS).logits.requires_grad
            _ = 1 / 0
        assert [weight.requires_grad for weight in peft_model.parameters()] == grads
        assert [module.training for module in peft_model.modules()] == modes
        assert torch.is_grad_enabled()
    assert peft_model.active_adapters == ["default"]


def test_adapters_that_cannot_be_switched_off_are_refused(tiny: Any, other: Any) -> None:
    with pytest.raises(ModelError, match="bias: lora_only"):
        AdapterPair(adapted(tiny, bias="lora_only"))
    with pytest.raises(ModelError, match="prompt learning"):
        AdapterPair(get_peft_model(other, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
