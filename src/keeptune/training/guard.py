"""Guard: what must hold while training, checked in any trainer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerState

from keeptune.adapter.install import check_frozen
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.training.projection import Projection


class Guard(TrainerCallback):
    """Checks what must hold while training with a plan that was installed; add it to your own trainer too.

    At the start: exactly the factors that the plan trains are trainable, and the trainer has what the plan needs.
    While training: the loss is finite. At the end: so is every trained parameter. Else a TrainError is raised.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.attached = False
        self.projection: Projection | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Checks the frozen factors, after any checkpoint was loaded."""
        needed = [*self.plan.training, *(f"penalty {penalty.name}" for penalty in self.plan.penalties)]
        if needed and not self.attached:
            raise TrainError(
                f"training with {self.plan.method}",
                got=f"a trainer without the plan's {' and '.join(needed)}",
                wanted="one that has it",
                next_step="Call keeptune.attach(trainer, plan) before trainer.train().",
            )
        if isinstance(kwargs["model"], PeftModel):
            check_frozen(kwargs["model"], self.plan)
        if self.projection is not None:
            self.projection.taken = 0  # training may have been interrupted within a step

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keeps the factors off the directions that the plan keeps."""
        if self.projection is not None:
            self.projection.factors()

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stops at a loss that is not finite."""
        for value in (kwargs["logs"].get(key, 0.0) for key in ("loss", "penalty", "train_loss")):
            if not math.isfinite(value):
                raise _diverged(state.global_step, f"loss or penalty {value}", "a finite one")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Checks that the last step left numbers."""
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise _diverged(state.global_step, f"NaN or infinite numbers in {name}", "finite parameters")


def divergence(losses: Sequence[float]) -> str | None:
    """Returns a sentence where the loss ends above its start, by half of it at least; None where it does not.

    Start and end are means over a fifth of the log each.

    Args:
        losses: As they were logged, in nats or as a mean squared error.
    """
    fifth = max(len(losses) // 5, 1)
    first, last = (sum(part) / fifth for part in (losses[:fifth], losses[-fifth:]))
    if len(losses) < 2 or last <= 1.5 * first:
        return None
    return f"training diverged: the loss went from {first:.3g} to {last:.3g}; lower train.learning_rate"


def _diverged(step: int, got: str, wanted: str) -> TrainError:
    advice = "Lower train.learning_rate, or train in float32 or bfloat16."
    return TrainError(f"training step {step}", got=got, wanted=wanted, next_step=advice)
