"""Penalties: terms of the loss that depend on the trained factors only.

    L = L_task + P(factors)

``L_task`` is taken over the micro-batches of an optimiser step, P once per step. The trainer sums micro-batch
losses, so each gets P / (number of micro-batches): the gradient of P enters exactly once, before clipping, which
acts on the sum. ``loss`` in the logs is L; ``task_loss`` and ``penalty`` tell its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from keeptune.adapter.install import lora_layer
from keeptune.core.plan import Plan
from keeptune.methods.kasa import Regularizer, orthogonality

__all__ = ["PENALTIES", "Penalty", "add_penalty"]

Penalty = Callable[..., Tensor]


class _Mean:
    """Mean of a penalty over the optimiser steps since it was last read."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.steps = 0.0

    def add(self, value: Tensor, share: float) -> None:
        self.total = self.total + value.detach() * share
        self.steps += share

    def read(self) -> float:
        mean = float(self.total) / self.steps
        self.total, self.steps = 0.0, 0.0
        return mean


def add_penalty(trainer: Any, penalty: Callable[[PeftModel], Tensor]) -> None:
    """Add a penalty to the loss of a trainer, once per optimiser step.

    Laws: n micro-batches of b examples give the step of one batch of n b; evaluation losses have no penalty.

    Args:
        trainer: A ``transformers.Trainer`` or any of TRL's; this one is changed, its class is not.
        penalty: Computes a scalar from the model.
    """
    compute_loss, log, seen = trainer.compute_loss, trainer.log, _Mean()

    def with_penalty(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        found = compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not model.training:
            return found
        loss, *outputs = found if return_outputs else (found,)
        steps = trainer.current_gradient_accumulation_steps
        with torch.autocast(loss.device.type, enabled=False):
            value = penalty(trainer.accelerator.unwrap_model(model))
        seen.add(value, 1 / steps)
        total = loss + (value / steps if _is_scaled(trainer, num_items_in_batch) else value)
        return (total, *outputs) if return_outputs else total

    def with_parts(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and seen.steps:
            mean = seen.read()
            logs |= {"task_loss": logs["loss"] - mean, "penalty": mean}
        log(logs, *args, **kwargs)

    trainer.compute_loss, trainer.log = with_penalty, with_parts


def kasa(model: PeftModel, plan: Plan, *, beta: float, gamma: float, regularizer: Regularizer) -> Tensor:
    """Compute KaSA's two regularisers, the mean over the targets, float32.

    Args:
        model: The model in training.
        plan: Its plan.
        beta: Weight of sum d².
        gamma: Weight of the distance of B and A from orthonormal ones.
        regularizer: The form of that distance.

    Returns:
        ``beta L_2 + gamma L_3`` (methods/kasa.py), a scalar.
    """
    terms = []
    for target_plan in plan.targets:
        # Looked up at each step: sharding and checkpoints may replace parameters.
        layer = lora_layer(model, target_plan.target.name)
        d = layer.lora_diag["default"].float()
        B, A = (part["default"].weight.float() for part in (layer.lora_B, layer.lora_A))
        terms.append(beta * (d**2).sum() + gamma * orthogonality(B, A, regularizer))
    return torch.stack(terms).mean()


PENALTIES: Mapping[str, Penalty] = {"kasa": kasa}


def _is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Tell whether micro-batch losses are summed as they are, or divided by their number after ``compute_loss``."""
    if trainer.loss_is_scaled_for_ga is not None:
        return bool(trainer.loss_is_scaled_for_ga)
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_model or trainer.compute_loss_func is not None
