"""Penalties: terms of the loss that depend on the trained factors only, once per optimiser step.

    L = L_task + sum over penalties, over targets, of P(A, B)

Their gradients are in closed form and are added to ``.grad`` after the last micro-batch's backward pass and before
clipping. So they count once whatever the gradient accumulation, the normalisation of the loss and the number of
processes (gradients are averaged before), and take part in clipping. A hand-written loop does the same:

    penalties = keeptune.Penalties(model, plan)
    loss.backward()                                  # as often as the step has micro-batches
    penalties.step()
    clip_grad_norm_(...); optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from keeptune.adapter.install import held_parameters
from keeptune.core.errors import TrainError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Factor, Plan
from keeptune.linalg.factor import Identity
from keeptune.penalties.base import NORM, Term, start_of, terms_of
from keeptune.penalties.kronecker import KroneckerChange

__all__ = ["Penalties", "add_penalties"]

# Optimisers that change weights inside the backward pass leave no gradient to add to.
_STEP_IN_BACKWARD = ("lomo", "layerwise")
_KNOWN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
}


class Penalties:
    """The penalties of a plan, on the model in training.

    Args:
        model: The installed model; what wraps it afterwards (DDP, FSDP2) does not matter.
        plan: The plan that was installed.
    """

    def __init__(self, model: PeftModel, plan: Plan) -> None:
        """Remember both; parameters are looked up at each step, for sharding may replace them."""
        self._model, self._plan = model, plan
        self._terms: list[list[tuple[str, Term]]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.taken = 0

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> Tensor:
        """Add the gradients of all penalties to ``.grad``: after the backward pass, before clipping.

        Args:
            scale: What gradients are scaled by at this moment: ``scaler.get_scale()`` under a ``GradScaler``.

        Returns:
            The sum of the penalties.
        """
        parameters = [held_parameters(self._model, target_plan) for target_plan in self._plan.targets]
        if not self._terms:
            self._bind([next(iter(found.values())).device for found in parameters])
        values: dict[str, list[Tensor]] = defaultdict(list)
        for of_target, terms in zip(parameters, self._terms, strict=True):
            gradients = _gradients(of_target, terms, values)
            for factor, gradient in gradients.items():
                _add(of_target[factor], gradient * scale)
            values["penalty_grad_norm"] += [gradient.square().sum() for gradient in gradients.values()]
        home = next(iter(parameters[0].values())).device
        sums = {name: torch.stack([value.to(home) for value in parts]).sum() for name, parts in values.items()}
        norm = sums.pop("penalty_grad_norm").sqrt()
        total = torch.stack(list(sums.values())).sum()
        found = {"penalty": total, "penalty_grad_norm": norm} | {f"penalty/{name}": v for name, v in sums.items()}
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in found.items()}
        self._steps += 1
        self.taken += 1
        return total

    def read(self) -> dict[str, float]:
        """Give the means over the steps since the last reading, and how far each layer is from its start now.

        Returns:
            ``penalty``, the sum; ``penalty/l2`` and the like; ``penalty_grad_norm``; ``drift/layer_0`` and the
            like, ``‖ΔW‖ / ‖W‖``, the mean over the layer's targets. Empty where there was no step.
        """
        if not self._steps:
            return {}
        means = {name: float(value) / self._steps for name, value in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means | self._drift()

    def _bind(self, devices: list[torch.device]) -> None:
        targets = self._plan.targets
        on = {device: [_On(p.tensors, device) for p in self._plan.penalties] for device in devices}
        self._terms = [
            [
                (plan.name, terms_of(plan, [target_plan], tensors)[0])
                for plan, tensors in zip(self._plan.penalties, on[device], strict=True)
            ]
            for target_plan, device in zip(targets, devices, strict=True)
        ]

    @torch.no_grad()
    def _drift(self) -> dict[str, float]:
        by_layer: dict[int, list[float]] = defaultdict(list)
        for target_plan in self._plan.targets:
            target = target_plan.target
            factors = {name: _whole(p) for name, p in held_parameters(self._model, target_plan).items()}
            B, one = factors["B"] * factors.get("diag", 1.0), torch.ones((), device=factors["B"].device)
            change = KroneckerChange(
                Omega=Identity(target.in_features, one),
                Gamma=Identity(target.out_features, one),
                scale=target_plan.scale,
                weight=1.0,
                start=start_of(target_plan, B.device),
            )
            norm = float(self._plan.penalties[0].tensors[f"{NORM}:{target.name}"])
            moved = float(change.value(LowRank(B, factors["A"])).clamp_min(0).sqrt())
            by_layer[target.layer].append(moved / norm if norm else 0.0)
        return {f"drift/layer_{layer}": sum(found) / len(found) for layer, found in sorted(by_layer.items())}


def add_penalties(trainer: Any, plan: Plan) -> Penalties:
    """Give a trainer the penalties of a plan, once per optimiser step.

    Laws: n micro-batches of b examples give the step of one batch of n b, n processes that of one; evaluation losses
    have no penalty; ``loss`` in the logs stays the task's own.

    Args:
        trainer: A ``transformers.Trainer`` or any of TRL's; this one is changed, its class is not.
        plan: A plan with penalties.

    Returns:
        The penalties.

    Raises:
        TrainError: The trainer's back-end or optimiser leaves no moment at which a gradient can be added once.
    """
    _refuse(trainer, plan)
    penalties = Penalties(trainer.model, plan)
    training_step, log = trainer.training_step, trainer.log

    def with_penalties(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            scaler = trainer.accelerator.scaler
            penalties.step(1.0 if scaler is None else scaler.get_scale())
        return loss

    def with_parts(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= penalties.read()
        log(logs, *args, **kwargs)

    trainer.training_step, trainer.log = with_penalties, with_parts
    trainer.add_callback(_Count(penalties, plan))
    return penalties


class _Count(TrainerCallback):
    """Stops a trainer that takes steps without penalties, since its loop has no ``training_step``."""

    def __init__(self, penalties: Penalties, plan: Plan) -> None:
        self._penalties, self._plan, self._seen = penalties, plan, 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the penalties' count of steps with the trainer's."""
        self._seen += 1
        if self._penalties.taken != self._seen:
            raise TrainError(
                f"step {state.global_step}",
                got=f"an optimiser step without the penalties {', '.join(p.name for p in self._plan.penalties)}"
                if self._penalties.taken < self._seen
                else f"{self._penalties.taken} penalties in {self._seen} optimiser steps",
                wanted="a trainer whose loop calls training_step and ends each step at its last micro-batch",
                next_step="Use another trainer, or call keeptune.Penalties.step in a loop of your own.",
            )


def _refuse(trainer: Any, plan: Plan) -> None:
    """Refuse what cannot count a penalty exactly once, before anything is trained."""
    where = f"penalties {', '.join(penalty.name for penalty in plan.penalties)}"
    if plan.scope != "adapter":
        raise TrainError(
            where,
            got=f"the method {plan.method}, which changes whole weights",
            wanted="a method that trains low-rank factors",
            next_step="Leave `penalties` out, or take another method.",
        )
    kind = trainer.accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise TrainError(
            where,
            got="DeepSpeed, whose engine steps inside the backward pass and keeps the gradients to itself",
            wanted="a single process, DDP or FSDP2",
            next_step="Use FSDP2 (`fsdp_version: 2`) where the model does not fit one device.",
        )
    sharding = trainer.accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
    if sharding is not None and sharding.fsdp_version != 2:
        raise TrainError(
            where,
            got="FSDP 1, which flattens the factors of several modules into one tensor",
            wanted="FSDP2",
            next_step="Set `fsdp_version: 2` in the config of accelerate.",
        )
    if kind not in _KNOWN:
        raise TrainError(
            where,
            got=f"the back-end {kind.value}",
            wanted="a single process, DDP or FSDP2",
            next_step="Train with one of these.",
        )
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if any(part in optimizer for part in _STEP_IN_BACKWARD):
        raise TrainError(
            where,
            got=f"the optimiser {optimizer}, which changes weights inside the backward pass",
            wanted="one that steps after it",
            next_step="Set train.optim to adamw_torch.",
        )


def _gradients(
    parameters: Mapping[Factor, nn.Parameter], terms: list[tuple[str, Term]], values: dict[str, list[Tensor]]
) -> dict[Factor, Tensor]:
    """Sum the gradients of a target's terms; note their values."""
    factors = {factor: _whole(parameter) for factor, parameter in parameters.items()}
    summed: dict[Factor, Tensor] = {}
    for name, term in terms:
        value, gradients = term.value_and_grad(factors)
        values[name].append(value)
        for factor, gradient in gradients.items():
            if parameters[factor].requires_grad:
                summed[factor] = summed[factor] + gradient if factor in summed else gradient
    return summed


def _whole(parameter: nn.Parameter) -> Tensor:
    """Read a parameter in float32; one that is sharded is gathered, which for a low-rank factor is little."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).float()


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to ``.grad``; every process has the whole gradient, and keeps its shard."""
    gradient = gradient.to(parameter.dtype if parameter.grad is None else parameter.grad.dtype)
    if isinstance(parameter.data, DTensor):
        mesh = parameter.data.device_mesh
        same = DTensor.from_local(gradient, mesh, [Replicate()] * mesh.ndim, run_check=False)
        gradient = same.redistribute(placements=parameter.data.placements)
    if parameter.grad is None:
        parameter.grad = gradient.contiguous()
    else:
        parameter.grad.add_(gradient)


class _On(Mapping[str, Tensor]):
    """Tensors on a device, moved when they are first asked for: those of targets that live elsewhere stay."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors, self.device = tensors, device
        self.moved: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.moved:
            self.moved[name] = self.tensors[name].to(self.device)
        return self.moved[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
