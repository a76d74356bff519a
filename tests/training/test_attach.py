"""What a plan asks of a trainer: its optimiser, in any trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from tests.training.support import EXAMPLES, TOKENIZER, TRAINERS, arguments, planned, trl_trainer, tuned
from torch import Tensor
from trl import SFTConfig

from keeptune.adapter.install import lora_layer, trained_state
from keeptune.core.errors import TrainError
from keeptune.methods.l2_lora import L2Lora
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.training.attach import attach
from keeptune.training.guard import Guard
from keeptune.training.trainer import train

# The optimiser


def test_the_preconditioned_optimiser_steps_by_the_gradient_times_the_inverse_gram(tmp_path: Path) -> None:
    """Adam's first step is the sign of g (A Aᵀ)⁻¹ (LoRA-FA eq. 2); PEFT forms it in bfloat16."""
    plan = planned(LoraFA(rank=4, optimizer="preconditioned"))
    model = tuned(plan)
    made = trl_trainer(model, tmp_path, optim=SFTConfig.optim, max_steps=1, max_grad_norm=0.0)
    attach(made, plan)
    grads: dict[str, Tensor] = {}
    for t in plan.targets:
        weight = lora_layer(model, t.target.name).lora_B["default"].weight
        weight.register_post_accumulate_grad_hook(lambda p, name=t.target.name: grads.update({name: p.grad.clone()}))
    made.train()
    assert isinstance(made.optimizer.optimizer, LoraFAOptimizer)
    same, plain, count = 0, 0, 0
    for t in plan.targets:
        step = -trained_state(model, plan)[f"{t.target.name}.B"].sign()
        A = t.init.A.double()
        wanted = grads[t.target.name].double() @ torch.linalg.inv(A @ A.T)
        same += int((step == wanted.sign()).sum())
        plain += int((step == grads[t.target.name].sign()).sum())
        count += step.numel()
    assert same > 0.99 * count
    assert plain < 0.95 * count


def test_a_target_without_a_gradient_stays_where_it_is(tmp_path: Path) -> None:
    """As an expert that no token reached; PEFT's optimiser fails on it."""
    plan = planned(LoraFA(rank=2, optimizer="preconditioned"))
    model = tuned(plan)
    made = trl_trainer(model, tmp_path, optim=SFTConfig.optim)
    attach(made, plan)
    idle = lora_layer(model, plan.targets[3].target.name).lora_B["default"].weight
    idle.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    made.train()
    for name, value in trained_state(model, plan).items():
        if name.endswith(".B"):
            assert bool(value.any()) == (name != f"{plan.targets[3].target.name}.B")


def test_another_optimiser_than_the_plans_is_refused(tmp_path: Path) -> None:
    plan = planned(LoraFA(rank=2, optimizer="preconditioned"))
    with pytest.raises(TrainError, match=r"train\.optim: got sgd"):
        attach(trl_trainer(tuned(plan), tmp_path), plan)


def test_betas_and_weight_decay_come_from_the_trainers_arguments(tmp_path: Path) -> None:
    plan = planned(LoraFA(rank=2, optimizer="preconditioned"))
    made = trl_trainer(tuned(plan), tmp_path, optim=SFTConfig.optim, weight_decay=0.3, adam_beta2=0.95)
    attach(made, plan)
    (group,) = made.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.05, 0.3, (0.9, 0.95))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_plan_may_ask_for_a_share_of_the_learning_rate(trainer: str, tmp_path: Path) -> None:
    """Once, however often it is attached; steps of SGD are that much shorter."""
    lora = planned(Lora(rank=2))
    plan = dataclasses.replace(lora, training={"learning_rate_factor": 0.4})
    found = []
    for asked, rate in ((plan, 0.05), (lora, 0.02)):
        model = tuned(asked)
        made = TRAINERS[trainer](model, tmp_path, learning_rate=rate)
        attach(made, asked)
        attach(made, asked)
        made.train()
        assert made.state.log_history[0]["learning_rate"] == pytest.approx(0.02)
        found.append(trained_state(model, asked))
    assert all(torch.allclose(found[0][name], value) for name, value in found[1].items())


def test_a_rate_cannot_be_scaled_in_an_optimiser_that_is_there(tmp_path: Path) -> None:
    plan = dataclasses.replace(planned(Lora(rank=2)), training={"learning_rate_factor": 0.4})
    model = tuned(plan)
    made = trl_trainer(model, tmp_path)
    made.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainError, match="an optimiser of your own"):
        attach(made, plan)


# attach and Guard


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_without_what_the_plan_asks_for_does_not_start(trainer: str, tmp_path: Path) -> None:
    plan = planned(LoraFA(rank=2, optimizer="preconditioned"))
    made = TRAINERS[trainer](tuned(plan), tmp_path, optim=SFTConfig.optim)
    made.add_callback(Guard(plan))
    with pytest.raises(TrainError, match=r"without the plan's optimizer.*keeptune\.attach"):
        made.train()
    attach(made, plan)
    made.train()


def test_attaching_twice_adds_nothing(tmp_path: Path) -> None:
    plan = planned(L2Lora(rank=2))
    made = trl_trainer(tuned(plan), tmp_path)
    attach(made, plan)
    before = (made.training_step, made.log, len(made.callback_handler.callbacks))
    attach(made, plan)
    assert (made.training_step, made.log, len(made.callback_handler.callbacks)) == before


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"optimiser": "lora-fa"}, 'training: got "optimiser".*Did you mean "optimizer"'),
        ({"optimizer": "lora-ga"}, 'Did you mean "lora-fa"'),
    ],
)
def test_what_this_version_does_not_know_is_refused(training: dict[str, Any], told: str, tmp_path: Path) -> None:
    lora = planned(Lora(rank=2))
    plan = dataclasses.replace(lora, training=training)
    with pytest.raises(TrainError, match=told):
        attach(trl_trainer(tuned(lora), tmp_path, optim=SFTConfig.optim), plan)


def test_keeptunes_own_training_attaches(tmp_path: Path) -> None:
    plan = planned(LoraFA(rank=2, optimizer="preconditioned"))
    model = tuned(plan)
    extra = arguments(tmp_path, bf16=False, activation_checkpointing=False, optim=SFTConfig.optim)
    loss = train(model, plan, TOKENIZER, EXAMPLES, SFTConfig(**extra))
    assert [point["step"] for point in loss] == [1, 2]
    assert all(p.keys() == {"step", "loss", "learning_rate"} for p in loss)
