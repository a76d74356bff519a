"""Penalties under mixed precision: a GradScaler's scale, autocast, factors that are themselves of 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import tokens
from tests.training.support import largest_gap, planned, trl_trainer, tuned
from torch import Tensor

from keeptune.adapter.install import lora_layer, trained_state
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.methods.lora import Lora
from keeptune.methods.pissa import Pissa
from keeptune.penalties.l2 import L2
from keeptune.training.attach import attach
from keeptune.training.penalty_engine import Penalties

SQUARES = L2(strength=0.15, on="factors", unit="absolute")  # its gradient is known: 0.3 theta
RATE = 0.05


@pytest.fixture(scope="module")
def lora() -> Plan:
    return planned(Lora(rank=2), [SQUARES])


def loop(plan: Plan, scale: float | None, *, clip: float, steps: int = 2) -> dict[str, Tensor]:
    """A loop by hand, with a scaler or without."""
    model = tuned(plan).train()
    penalties = Penalties(model, plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(steps):
        for half in tokens(step, (4, 12)).chunk(2):
            scaler.scale(model(input_ids=half, labels=half).loss / 2).backward()
        penalties.step(scaler.get_scale())
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(trained, clip)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
    return trained_state(model, plan)


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_a_scale_of_the_loss_scales_the_penalty_too(lora: Plan, clip: float) -> None:
    plain = loop(lora, None, clip=clip)
    assert largest_gap(plain, loop(lora, 1024.0, clip=clip)) < 1e-6
    assert largest_gap(plain, trained_state(tuned(lora), lora)) > 1e-3


def fp16(trainer: Any) -> None:
    """What accelerate sets up for fp16 on a GPU, on the CPU."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_trainers_mixed_precision_leaves_the_penaltys_gradient_exact(
    lora: Plan, precision: str, tmp_path: Path
) -> None:
    """Plain descent without clipping: B1 = B0 - rate (g + 0.3 B0), with g as autocast computes it."""
    found = []
    for penalised in (True, False):
        model = tuned(lora)
        extra = {"max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
        trainer = trl_trainer(model, tmp_path, per_device_train_batch_size=4, **extra)
        if precision == "fp16":
            fp16(trainer)
        else:
            trainer.accelerator.state._mixed_precision = "bf16"
            trainer.accelerator.native_amp = True
        if penalised:
            attach(trainer, lora)
        seen = set()
        hook = (
            lora_layer(model, lora.targets[0].target.name)
            .lora_A["default"]
            .register_forward_hook(lambda _, __, out, seen=seen: seen.add(out.dtype))
        )
        trainer.train()
        hook.remove()
        assert seen == {torch.float16 if precision == "fp16" else torch.bfloat16}
        found.append(trained_state(model, lora))
    start = trained_state(tuned(lora), lora)
    assert largest_gap(found[1], start) > 1e-3
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name] - RATE * 0.3 * start[name], rtol=0, atol=1e-6)


def test_a_step_that_overflows_is_skipped_and_the_penalty_with_it(lora: Plan) -> None:
    model = tuned(lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, scaler = torch.optim.SGD(trained, RATE), torch.amp.GradScaler("cpu", init_scale=1024.0)
    ids = tokens(0, (2, 8))
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    trained[0].grad[0, 0] = torch.inf
    Penalties(model, lora).step(scaler.get_scale())
    scaler.step(optimiser)
    assert largest_gap(trained_state(model, lora), trained_state(tuned(lora), lora)) == 0


def test_factors_of_16_bits_get_gradients_of_16_bits_and_values_of_32() -> None:
    """As TRL casts them for QLoRA."""
    plan = planned(Pissa(rank=2), [L2(strength=100.0), SQUARES])
    model = tuned(plan)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = (parameter * 1.1).to(torch.bfloat16)
    value = Penalties(model, plan).step()
    wanted = 0.0
    for t in plan.targets:
        layer = lora_layer(model, t.target.name)
        A, B = (getattr(layer, f"lora_{name}")["default"].weight for name in "AB")
        assert A.grad.dtype == B.grad.dtype == torch.bfloat16
        change = LowRank(B.detach().double(), A.detach().double()).dense() - t.init.to(torch.float64).dense()
        weight = float(plan.penalties[0].tensors[f"weight:{t.target.name}"])
        wanted += weight * float((t.scale * change).square().sum())
        wanted += 0.15 * float(A.detach().double().square().sum() + B.detach().double().square().sum())
        wanted_B = 2 * weight * t.scale**2 * change @ A.detach().double().T + 0.3 * B.detach().double()
        torch.testing.assert_close(B.grad.double(), wanted_B, rtol=5e-3, atol=1e-8)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(wanted, rel=1e-5)
