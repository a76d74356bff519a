"""What a plan asks of a trainer: its optimiser and its penalty, once per step, in any trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from keeptune.adapter.install import install, lora_layer, trained_state
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.data.sft import TaskExamples
from keeptune.methods.kasa import Kasa, orthogonality
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.model.load import load_model, load_tokenizer
from keeptune.planning import plan_for
from keeptune.stats.store import StatStore
from keeptune.train.attach import attach
from keeptune.train.guard import Guard
from keeptune.train.penalty import add_penalty, kasa
from keeptune.train.trainer import train

MODEL = str(Path(__file__).parents[3] / "shared" / "models" / "stories260K")
TOKENIZER = load_tokenizer(MODEL)
EXAMPLES = TaskExamples(
    prompts=tuple(f"Q: what is {n} plus {n}?\nA:" for n in range(8)), completions=tuple(f" {2 * n}" for n in range(8))
)


def planned(method: Any) -> Plan:
    return plan_for(load_model(MODEL), method, StatStore(Path("unused")), data={})


def arguments(folder: Path, **extra: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "learning_rate": 0.05, "optim": "sgd",
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False,
    } | extra  # fmt: skip


def trl_trainer(model: PeftModel, folder: Path, **extra: Any) -> Any:
    config = SFTConfig(**arguments(folder, bf16=False, activation_checkpointing=False, **extra))
    return SFTTrainer(model=model, args=config, train_dataset=EXAMPLES.dataset(), processing_class=TOKENIZER)


def plain_trainer(model: PeftModel, folder: Path, **extra: Any) -> Any:
    rows = [TOKENIZER(p + c)["input_ids"][:16] for p, c in zip(EXAMPLES.prompts, EXAMPLES.completions, strict=True)]
    data: Any = [{"input_ids": ids, "labels": ids} for ids in rows]
    return Trainer(model=model, args=TrainingArguments(**arguments(folder, **extra)), train_dataset=data)


TRAINERS: dict[str, Callable[..., Any]] = {"trl": trl_trainer, "transformers": plain_trainer}


def tuned(plan: Plan) -> PeftModel:
    model = install(load_model(MODEL), plan)
    assert isinstance(model, PeftModel)
    return model


def squares(model: PeftModel) -> Tensor:
    """A penalty whose gradient is known: 0.3 theta."""
    return 0.15 * sum((p**2).sum() for p in model.parameters() if p.requires_grad)


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


# Penalties


@pytest.fixture(scope="module")
def lora() -> Plan:
    return planned(Lora(rank=2))


def run_with(
    penalty: Any, lora: Plan, trainer: str, folder: Path, **extra: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    model = tuned(lora)
    made = TRAINERS[trainer](model, folder, **extra)
    if penalty is not None:
        add_penalty(made, penalty)
    made.train()
    return trained_state(model, lora), made.state.log_history


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_penalty_counts_once_per_step_whatever_the_accumulation(
    lora: Plan, trainer: str, clip: float, tmp_path: Path
) -> None:
    found = {
        size: run_with(
            squares, lora, trainer, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            max_grad_norm=clip,
        )
        for size in (8, 2, 1)
    }  # fmt: skip
    without, _ = run_with(None, lora, trainer, tmp_path, max_grad_norm=clip)
    assert largest_gap(found[8][0], without) > 1e-4
    for size in (2, 1):
        assert largest_gap(found[8][0], found[size][0]) < 1e-6
        for a, b in zip(found[8][1], found[size][1], strict=True):
            for key in {"loss", "task_loss", "penalty", "grad_norm"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_a_loss_that_trainer_itself_divides_gets_the_penalty_once_too(lora: Plan, tmp_path: Path) -> None:
    """For a model that takes no num_items_in_batch, Trainer divides by the number of micro-batches after us."""
    found = []
    for size in (8, 1):
        model = tuned(lora)
        extra = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        made = plain_trainer(model, tmp_path, **extra)
        made.model_accepts_loss_kwargs = False
        add_penalty(made, squares)
        made.train()
        found.append(trained_state(model, lora))
    assert largest_gap(*found) < 1e-6


def test_the_step_is_that_of_the_sum_of_loss_and_penalty(lora: Plan, tmp_path: Path) -> None:
    """Plain descent without clipping: B1 = B0 - rate (g + 0.3 B0)."""
    extra = {"max_steps": 1, "max_grad_norm": 0.0}
    start = trained_state(tuned(lora), lora)
    without, _ = run_with(None, lora, "trl", tmp_path, **extra)
    found, _ = run_with(squares, lora, "trl", tmp_path, **extra)
    for name, value in found.items():
        torch.testing.assert_close(value, without[name] - 0.05 * 0.3 * start[name], rtol=0, atol=1e-6)


def test_clipping_acts_on_the_sum(lora: Plan, tmp_path: Path) -> None:
    start = trained_state(tuned(lora), lora)
    found, log = run_with(squares, lora, "trl", tmp_path, max_steps=1, max_grad_norm=0.01)
    assert log[0]["grad_norm"] > 0.01
    moved = sum(float(((found[name] - value) ** 2).sum()) for name, value in start.items()) ** 0.5
    assert moved == pytest.approx(0.05 * 0.01, rel=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_logs_tell_loss_and_penalty_apart(lora: Plan, trainer: str, tmp_path: Path) -> None:
    start = float(squares(tuned(lora)).detach())
    _, plain = run_with(None, lora, trainer, tmp_path, max_steps=1)
    _, log = run_with(squares, lora, trainer, tmp_path, max_steps=1, gradient_accumulation_steps=1)
    assert log[0]["penalty"] == pytest.approx(start, rel=1e-5)
    assert log[0]["task_loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert log[0]["loss"] == pytest.approx(log[0]["task_loss"] + log[0]["penalty"], rel=1e-5)
    assert "penalty" not in plain[0]


def test_the_logged_penalty_is_the_mean_over_the_steps_since_the_last_log(lora: Plan, tmp_path: Path) -> None:
    _, each = run_with(squares, lora, "trl", tmp_path, max_steps=4)
    _, halves = run_with(squares, lora, "trl", tmp_path, max_steps=4, logging_steps=2)
    values = [row["penalty"] for row in each if "penalty" in row]
    assert len({*values}) == 4
    assert [row["penalty"] for row in halves if "penalty" in row] == pytest.approx(
        [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2], rel=1e-5
    )


def test_evaluation_losses_have_no_penalty(lora: Plan, tmp_path: Path) -> None:
    model = tuned(lora)
    made = plain_trainer(model, tmp_path)
    wanted = made.evaluate(made.train_dataset)["eval_loss"]
    add_penalty(made, squares)
    assert made.evaluate(made.train_dataset)["eval_loss"] == wanted


# KaSA's


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("anchor", ["twin", "residual"])
def test_kasas_regularisers_count_once_per_step_whatever_the_accumulation(
    trainer: str, anchor: Any, tmp_path: Path
) -> None:
    plan, found = planned(Kasa(rank=2, beta=0.5, gamma=0.5)), {}
    for size in (8, 1):
        model = install(load_model(MODEL), plan, anchor=anchor)
        extra = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_grad_norm": 1.0}
        made = TRAINERS[trainer](model, tmp_path, **extra)
        attach(made, plan)
        made.train()
        found[size] = trained_state(model, plan)
    assert largest_gap(found[8], found[1]) < 1e-6
    for t in plan.targets:
        assert not torch.equal(found[8][f"{t.target.name}.diag"], t.vectors["diag"])


def test_kasas_regularisers_make_factors_more_orthogonal_and_without_weights_change_nothing(tmp_path: Path) -> None:
    gaps, states = [], []
    for gamma in (0.0, 50.0):
        plan = planned(Kasa(rank=2, beta=0.0, gamma=gamma))
        model = tuned(plan)
        made = trl_trainer(model, tmp_path, max_steps=5)
        attach(made, plan)
        made.train()
        layers = [lora_layer(model, t.target.name) for t in plan.targets]
        parts = [(layer.lora_B["default"].weight, layer.lora_A["default"].weight) for layer in layers]
        gaps.append(float(torch.stack([orthogonality(B, A, "gram").detach() for B, A in parts]).mean()))
        states.append(trained_state(model, plan))
    assert gaps[1] < gaps[0] - 0.01
    bare = tuned(plan)
    trl_trainer(bare, tmp_path, max_steps=5).train()
    assert largest_gap(states[0], trained_state(bare, plan)) == 0.0


def test_the_loss_curve_of_kasa_is_the_tasks_with_the_penalty_apart(tmp_path: Path) -> None:
    plan = planned(Kasa(rank=2, beta=0.5, gamma=0.5))
    extra = arguments(tmp_path, bf16=False, activation_checkpointing=False)
    loss = train(tuned(plan), plan, TOKENIZER, EXAMPLES, SFTConfig(**extra))
    fresh = tuned(plan)
    bare = trl_trainer(fresh, tmp_path)
    bare.train()
    assert loss[0]["loss"] == pytest.approx(bare.state.log_history[0]["loss"], rel=1e-5)
    start = kasa(tuned(plan), plan, beta=0.5, gamma=0.5, regularizer="gram")
    assert loss[0]["penalty"] == pytest.approx(float(start.detach()), rel=1e-5)


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
    plan = planned(Kasa(rank=2))
    made = trl_trainer(tuned(plan), tmp_path)
    attach(made, plan)
    before = (made.compute_loss, made.log, len(made.callback_handler.callbacks))
    attach(made, plan)
    assert (made.compute_loss, made.log, len(made.callback_handler.callbacks)) == before


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"optimiser": "lora-fa"}, 'training: got "optimiser".*Did you mean "optimizer"'),
        ({"optimizer": "lora-ga"}, 'Did you mean "lora-fa"'),
        ({"penalty": {"name": "kasar"}}, 'penalty: got "kasar"'),
    ],
)
def test_what_this_version_does_not_know_is_refused(
    lora: Plan, training: dict[str, Any], told: str, tmp_path: Path
) -> None:
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
