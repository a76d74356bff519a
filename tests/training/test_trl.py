"""DPO and GRPO: penalties under each loss's own normalisation, and what their reference is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.models import logits
from tests.training.support import EXAMPLES, MODEL, TOKENIZER, arguments, largest_gap, planned, tuned
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

from keeptune.adapter.install import install, trained_state
from keeptune.core.plan import Plan
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import load_model
from keeptune.penalties.l2 import L2
from keeptune.training.attach import attach

SQUARES = L2(strength=0.15, on="factors", unit="absolute")  # its gradient is known: 0.3 theta
IDS = torch.arange(3, 23).view(2, 10)


def dpo(model: Any, folder: Path, **extra: Any) -> Any:
    pairs = [
        {"prompt": p, "chosen": c, "rejected": f" {n + 20}"}
        for n, (p, c) in enumerate(zip(EXAMPLES.prompts, EXAMPLES.completions, strict=True))
    ]
    config = DPOConfig(**arguments(folder, bf16=False, activation_checkpointing=False, **extra))
    return DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=TOKENIZER)


def grpo(model: Any, folder: Path, **extra: Any) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    own = {"num_generations": 2, "max_completion_length": 6} | extra
    config = GRPOConfig(**arguments(folder, bf16=False, activation_checkpointing=False, **own))
    data = Dataset.from_list([{"prompt": prompt} for prompt in EXAMPLES.prompts])
    return GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=TOKENIZER)


MAKERS = {"dpo": dpo, "grpo": grpo}
# Means over the tokens of a micro-batch are another loss for other micro-batches, as bnpo's.
SPLITTING = [("dpo", "sigmoid"), ("dpo", "ipo"), ("grpo", "grpo"), ("grpo", "dr_grpo"), ("grpo", "dapo")]
LOSSES = [*SPLITTING, ("dpo", "hinge"), ("grpo", "bnpo")]


@pytest.fixture(scope="module")
def lora() -> Plan:
    return planned(Lora(rank=2), [SQUARES])


def run_with(plan: Plan, trainer: str, folder: Path, *, penalised: bool = True, **extra: Any) -> dict[str, Tensor]:
    model = tuned(plan)
    made = MAKERS[trainer](model, folder, **extra)
    if penalised:
        attach(made, plan)
    made.train()
    return trained_state(model, plan)


def micro(size: int) -> dict[str, int]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}


@pytest.mark.parametrize(("trainer", "loss"), SPLITTING)
def test_micro_batches_take_the_clipped_step_of_one_batch(lora: Plan, trainer: str, loss: str, tmp_path: Path) -> None:
    one, eight = (
        run_with(lora, trainer, tmp_path, loss_type=loss, max_grad_norm=0.05, **micro(size)) for size in (8, 1)
    )
    assert largest_gap(one, eight) < 1e-6
    assert largest_gap(one, trained_state(tuned(lora), lora)) > 1e-4


@pytest.mark.parametrize(("trainer", "loss"), LOSSES)
def test_the_penaltys_gradient_is_added_once_whatever_the_loss(
    lora: Plan, trainer: str, loss: str, tmp_path: Path
) -> None:
    """Plain descent without clipping: B1 = B0 - rate (g + 0.3 B0)."""
    extra = {"loss_type": loss, "max_steps": 1, "max_grad_norm": 0.0, **micro(4)}
    start = trained_state(tuned(lora), lora)
    without = run_with(lora, trainer, tmp_path, penalised=False, **extra)
    found = run_with(lora, trainer, tmp_path, **extra)
    assert largest_gap(without, start) > 1e-4
    for name, value in found.items():
        torch.testing.assert_close(value, without[name] - 0.05 * 0.3 * start[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainer", MAKERS)
def test_logs_tell_the_penalty_apart(lora: Plan, trainer: str, tmp_path: Path) -> None:
    model = tuned(lora)
    size = sum(float((value**2).sum()) for value in trained_state(model, lora).values())
    made = MAKERS[trainer](model, tmp_path, max_steps=1)
    attach(made, lora)
    made.train()
    first = made.state.log_history[0]
    assert first["penalty"] == first["penalty/l2"] == pytest.approx(0.15 * size, rel=1e-5)
    assert first["penalty_grad_norm"] == pytest.approx(0.3 * size**0.5, rel=1e-5)
    assert first["loss"] < 1


# The reference: TRL copies the adapter as it starts


@pytest.mark.parametrize("method", [Pissa(rank=2), LoraFA(rank=2)], ids=lambda method: method.name)
@pytest.mark.parametrize("anchor", ["twin", "residual"])
@pytest.mark.parametrize("trainer", MAKERS)
def test_the_reference_is_the_base_before_and_after_training(
    method: Any, anchor: Any, trainer: str, tmp_path: Path
) -> None:
    plan = planned(method)
    model = install(load_model(MODEL), plan, anchor=anchor)
    own = {"beta": 0.1} if trainer == "grpo" else {}
    made = MAKERS[trainer](model, tmp_path, **own)
    attach(made, plan)  # Guard: what is trained is what the plan says, for all the switching to and fro
    base = logits(load_model(MODEL), IDS)
    for moved in (False, True):
        if moved:
            made.train()
        with use_adapter(model, "ref"):
            torch.testing.assert_close(logits(model.eval(), IDS), base, rtol=0, atol=1e-4)
        assert torch.allclose(logits(model, IDS), base, rtol=0, atol=1e-4) != moved


def test_a_twin_stays_where_text_is_generated_after_a_resume() -> None:
    """``generate`` does not pass through PeftModel's forward, and a resume activates one adapter only."""
    model = install(load_model(MODEL), planned(Pissa(rank=2)), anchor="twin").eval()
    assert isinstance(model.base_model.active_adapters, list)
    wanted = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    model.set_adapter("default")
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), wanted)
    assert torch.equal(load_model(MODEL).generate(input_ids=IDS, max_new_tokens=4, do_sample=False), wanted)
