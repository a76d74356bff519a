"""Projection: training stays off the directions of W that a plan keeps (``TargetPlan.kept``; methods/oplora.py).

    g_B <- (I - U Uᵀ) g_B,   g_A <- g_A (I - V Vᵀ)       after the backward pass, before clipping           (1)
    B <- (I - U Uᵀ) B,       A <- A (I - V Vᵀ)           after the optimiser's step                         (2)

Law: the steps are those of factors that the forward pass projects, for every optimiser that reads gradients and decays
weights. (1) alone would not hold: Adam divides element by element. A hand-written loop does the same:

    projection = keeptune.Projection(model, plan)
    loss.backward()                                  # as often as the step has micro-batches
    projection.gradients()                           # after Penalties.step(), where there are penalties
    clip_grad_norm_(...); optimizer.step(); projection.factors(); optimizer.zero_grad()
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from keeptune.adapter.install import held_parameters, sharded_like
from keeptune.adapter.trained_head import full
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.training.compatibility import refuse_trainer


class Projection:
    """The projections of a plan on the installed model in training; what wraps it (DDP, FSDP2) does not matter."""

    def __init__(self, model: PeftModel, plan: Plan) -> None:
        self._model, self._plan = model, plan
        self._moved: dict[tuple[str, str, torch.device], Tensor] = {}
        self.taken = 0

    def gradients(self) -> None:
        """Projects ``.grad`` of both factors (eq. 1): after the backward pass and penalties, before clipping."""
        self._project(0, lambda parameter: parameter.grad)

    def factors(self) -> None:
        """Projects both factors (eq. 2): after the optimiser's step."""
        self._project(1, lambda parameter: parameter.data)

    @torch.no_grad()
    def _project(self, step: int, of: Callable[[nn.Parameter], Tensor | None]) -> None:
        if self.taken % 2 != step:
            raise TrainError(
                f"method {self._plan.method}, step {self.taken // 2 + 1}",
                got="an optimiser step whose gradients or factors were not projected",
                wanted="gradients() and factors() once a step; a trainer's loop that calls training_step",
                next_step="Use another trainer, or keeptune.Projection in a loop of your own.",
            )
        self.taken += 1
        for t in self._plan.targets:
            for factor, held in held_parameters(self._model, t).items():
                tensor = of(held.parameter)
                if tensor is None or not t.kept:
                    continue
                whole = full(tensor)
                part = held.of(whole)
                key = (t.target.name, factor, part.device)
                if key not in self._moved:
                    self._moved[key] = t.kept["U" if factor == "B" else "V"].to(part.device, part.dtype)
                Q = self._moved[key]
                part.sub_(Q @ (Q.T @ part) if factor == "B" else (part @ Q) @ Q.T)
                if whole is not tensor:
                    tensor.copy_(sharded_like(whole, held.parameter))


def add_projection(trainer: Any, plan: Plan) -> Projection:
    """Has a trainer project gradients once a step; TrainError where there is no moment for it. Guard does (2)."""
    refuse_trainer(trainer, plan)
    projection, training_step = Projection(trainer.model, plan), trainer.training_step

    def projected(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            projection.gradients()
        return loss

    trainer.training_step = projected
    return projection
