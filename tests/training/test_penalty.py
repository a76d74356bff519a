"""Penalties in a trainer: once per optimiser step, under clipping, told apart in the logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import relative, tokens
from tests.reference.summed_loss_reference import summed_gradients
from tests.training.support import (
    MODEL,
    TRAINERS,
    largest_gap,
    plain_trainer,
    planned,
    tuned,
)
from torch import Tensor

from keeptune.adapter.install import trained_state
from keeptune.core.plan import Plan
from keeptune.methods.dora import Dora
from keeptune.methods.farss import Farss
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.methods.lora_null import LoraNull
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import load_model
from keeptune.penalties.base import penalty_named
from keeptune.penalties.l2 import L2
from keeptune.training.penalty_engine import Penalties, add_penalties

SQUARES = L2(strength=0.15, on="factors", unit="absolute")  # its gradient is known: 0.3 theta


def size(state: dict[str, Tensor]) -> float:
    return 0.15 * sum(float(value.square().sum()) for value in state.values())


# Penalties


@pytest.fixture(scope="module")
def lora() -> Plan:
    return planned(Lora(rank=2), [SQUARES])


def run_with(
    plan: Plan, trainer: str, folder: Path, *, penalised: bool = True, **extra: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    model = tuned(plan)
    made = TRAINERS[trainer](model, folder, **extra)
    if penalised:
        add_penalties(made, plan)
    made.train()
    return trained_state(model, plan), made.state.log_history


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_penalty_counts_once_per_step_whatever_the_accumulation(
    lora: Plan, trainer: str, clip: float, tmp_path: Path
) -> None:
    found = {
        size: run_with(
            lora, trainer, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            max_grad_norm=clip,
        )
        for size in (8, 2, 1)
    }  # fmt: skip
    without, _ = run_with(lora, trainer, tmp_path, penalised=False, max_grad_norm=clip)
    assert largest_gap(found[8][0], without) > 1e-4
    for size in (2, 1):
        assert largest_gap(found[8][0], found[size][0]) < 1e-6
        for a, b in zip(found[8][1], found[size][1], strict=True):
            for key in {"loss", "penalty", "penalty_grad_norm", "grad_norm", "drift/layer_0"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_a_loss_that_trainer_itself_divides_gets_the_penalty_once_too(lora: Plan, tmp_path: Path) -> None:
    """For a model that takes no num_items_in_batch, Trainer divides by the number of micro-batches after us."""
    found = []
    for size in (8, 1):
        model = tuned(lora)
        extra = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        made = plain_trainer(model, tmp_path, **extra)
        made.model_accepts_loss_kwargs = False
        add_penalties(made, lora)
        made.train()
        found.append(trained_state(model, lora))
    assert largest_gap(*found) < 1e-6


def test_the_step_is_that_of_the_sum_of_loss_and_penalty(lora: Plan, tmp_path: Path) -> None:
    """Plain descent without clipping: B1 = B0 - rate (g + 0.3 B0)."""
    extra = {"max_steps": 1, "max_grad_norm": 0.0}
    start = trained_state(tuned(lora), lora)
    without, _ = run_with(lora, "trl", tmp_path, penalised=False, **extra)
    found, _ = run_with(lora, "trl", tmp_path, **extra)
    for name, value in found.items():
        torch.testing.assert_close(value, without[name] - 0.05 * 0.3 * start[name], rtol=0, atol=1e-6)


def test_clipping_acts_on_the_sum(lora: Plan, tmp_path: Path) -> None:
    start = trained_state(tuned(lora), lora)
    found, log = run_with(lora, "trl", tmp_path, max_steps=1, max_grad_norm=0.01)
    assert log[0]["grad_norm"] > 0.01
    moved = sum(float(((found[name] - value) ** 2).sum()) for name, value in start.items()) ** 0.5
    assert moved == pytest.approx(0.05 * 0.01, rel=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_logs_tell_loss_and_penalty_apart(lora: Plan, trainer: str, tmp_path: Path) -> None:
    start = size(trained_state(tuned(lora), lora))
    _, plain = run_with(lora, trainer, tmp_path, penalised=False, max_steps=1)
    _, log = run_with(lora, trainer, tmp_path, max_steps=1, gradient_accumulation_steps=1)
    assert log[0]["penalty"] == pytest.approx(start, rel=1e-5)
    assert log[0]["penalty/l2"] == log[0]["penalty"]
    assert log[0]["penalty_grad_norm"] == pytest.approx(2 * (0.15 * start) ** 0.5, rel=1e-5)
    assert log[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert "penalty" not in plain[0]


def test_the_logged_penalty_is_the_mean_over_the_steps_since_the_last_log(lora: Plan, tmp_path: Path) -> None:
    _, each = run_with(lora, "trl", tmp_path, max_steps=4)
    _, halves = run_with(lora, "trl", tmp_path, max_steps=4, logging_steps=2)
    values = [row["penalty"] for row in each if "penalty" in row]
    assert len({*values}) == 4
    assert [row["penalty"] for row in halves if "penalty" in row] == pytest.approx(
        [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2], rel=1e-5
    )


def test_evaluation_losses_have_no_penalty(lora: Plan, tmp_path: Path) -> None:
    model = tuned(lora)
    made = plain_trainer(model, tmp_path)
    wanted = made.evaluate(made.train_dataset)["eval_loss"]
    add_penalties(made, lora)
    assert made.evaluate(made.train_dataset)["eval_loss"] == wanted


# Against autograd through the sum

ADDED = {
    "relative": [L2(strength=30.0), L2(strength=30.0, on="factors")],
    "absolute": [L2(strength=3e-2, unit="absolute"), SQUARES],
}
METHODS: dict[str, Any] = {
    "lora": Lora(rank=2, alpha=6.0),
    "pissa": Pissa(rank=2),
    "lora-null v1": LoraNull(rank=2),
    "lora-null v2": LoraNull(rank=2, variant="v2"),
    "farss": Farss(rank=2, r_max=4, r_avg=2, boundary=1),
    "lora-fa": LoraFA(rank=2),
    "dora": Dora(rank=2),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", METHODS)
def test_the_gradients_are_those_of_autograd_through_the_sum(name: str, added: str, store: Path) -> None:
    """Moved factors, one process: every gradient and the value; what is frozen gets none."""
    method, base = METHODS[name], load_model(MODEL)
    plan = planned(method, ADDED[added], store=store)
    model = tuned(plan).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator) + 0.01)
    ids = tokens(0, (2, 8))
    specs = [penalty_named(p.name, p.options) for p in plan.penalties]
    assert len(specs) == len(ADDED[added])
    wanted, value = summed_gradients(model, plan, base, specs, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = Penalties(model, plan).step()
    assert float(found) == pytest.approx(value, rel=1e-5)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert max(relative(plain[name], wanted[name]) for name in wanted) > 0.01
    for name in wanted:
        assert relative(got[name], wanted[name]) < 2e-5, name
