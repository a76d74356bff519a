"""attach: add to any Hugging Face or TRL trainer what a plan needs of it besides the model.

A plan says it in plain values (``Plan.training``), which are saved with it and part of its key:

    {"optimizer": "lora-fa"}            PEFT's preconditioned optimiser (methods/lora_fa.py)
    {"learning_rate_factor": 0.4}       times the trainer's learning rate (methods/loki.py)

and in ``Plan.penalties``, terms of the loss (training/penalty_engine.py).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer

from keeptune.adapter.install import starting_values
from keeptune.core.errors import TrainError, nearest
from keeptune.core.plan import Plan
from keeptune.training.guard import Guard
from keeptune.training.losses.base import TaskLoss, loss_named
from keeptune.training.penalty_engine import add_penalties
from keeptune.training.task_loss import add_loss

_log = logging.getLogger(__name__)


def attach(trainer: Any, plan: Plan, loss: str | TaskLoss = "nll") -> None:
    """Adds the plan's optimiser, penalties and :class:`Guard` to a trainer; a second call changes nothing.

    Args:
        trainer: A ``transformers.Trainer`` or any of TRL's, with the installed model, before ``train()``.
        plan: The plan that was installed.
        loss: What TRL's SFTTrainer learns of each token: ``"nll"``, ``"dft"``, ``"eaft"`` or ``"asft"``, or one of
            these with options, such as ``Asft(kl_weight=0.05)``.

    Raises:
        TrainError: The plan needs something that this version does not have, the trainer has an optimiser of its own
            where the plan chooses one or scales the learning rate, or it cannot count a penalty exactly once.
    """
    guards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Guard)]
    if any(guard.attached for guard in guards):
        return
    _keep_precise(trainer.model, plan)
    for key, value in sorted(plan.training.items()):  # an optimiser takes the learning rate as it is then
        _known(key, _PARTS, "training")
        _PARTS[key](trainer, plan, value)
    if plan.penalties:
        add_penalties(trainer, plan)
    chosen = loss_named(loss, {}) if isinstance(loss, str) else loss
    if chosen is not None:
        add_loss(trainer, plan, chosen)
    guard = guards[0] if guards else Guard(plan)
    if not guards:
        trainer.add_callback(guard)
    guard.attached = True


def _keep_precise(model: Any, plan: Plan) -> None:
    """Puts trained factors back to float32: TRL's SFTTrainer rounds those on a quantised base to bfloat16.

    So rounded, a start that is a part of W would differ from what is taken out of W, and small steps would be lost.
    """
    if not isinstance(model, PeftModel) or plan.scope != "adapter":
        return
    for parameter, value in starting_values(model, plan).items():
        if parameter.dtype == torch.bfloat16:
            start = value.to(parameter.device)
            rounded = torch.equal(parameter, start.to(parameter.dtype))
            parameter.data = start.clone() if rounded else parameter.data.float()


def _attach_optimizer(trainer: Any, plan: Plan, name: str) -> None:
    _known(name, _OPTIMIZERS, "training.optimizer")
    default = next(field.default for field in dataclasses.fields(trainer.args) if field.name == "optim")
    if trainer.args.optim != default:
        raise TrainError(
            "train.optim",
            got=str(getattr(trainer.args.optim, "value", trainer.args.optim)),
            wanted=f"no optim: the method {plan.method} makes its own ({name})",
            next_step="Leave `train.optim` out, or choose the method's `optimizer: adamw`.",
        )
    trainer.optimizer = _OPTIMIZERS[name](trainer.model, trainer.args)


def _scale_rate(trainer: Any, plan: Plan, factor: float) -> None:
    if trainer.optimizer is not None:
        raise TrainError(
            f"training with {plan.method}",
            got="an optimiser of your own, with its own learning rate",
            wanted="a trainer that makes one from its arguments: the method scales the rate",
            next_step="Leave the optimiser to the trainer, or set the method's `rate: fixed`.",
        )
    trainer.args.learning_rate *= factor
    _log.info(
        "train: the method %s takes %.3g of the learning rate: %.3g", plan.method, factor, trainer.args.learning_rate
    )


def _lora_fa(model: PeftModel, args: Any) -> Any:
    """Returns PEFT's optimiser; it reads each layer's own scale, so r and lora_alpha of the config do not matter."""
    config = model.peft_config["default"]
    made = create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate, weight_decay=args.weight_decay
    )
    for group in made.param_groups:
        group["betas"] = (args.adam_beta1, args.adam_beta2)
    made.register_step_pre_hook(_fill_missing_gradients)
    return made


def _fill_missing_gradients(optimizer: Any, *_: Any) -> None:
    """Adds zeros for trained parameters without a gradient (experts without tokens), on which PEFT's would fail."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _known(name: str, choices: Mapping[str, Any], where: str) -> None:
    if name not in choices:
        raise TrainError(
            f"plan, {where}", got=f'"{name}"', wanted="one that this version knows", next_step=nearest(name, choices)
        )


_PARTS: Mapping[str, Callable[[Any, Plan, Any], None]] = {
    "learning_rate_factor": _scale_rate,
    "optimizer": _attach_optimizer,
}
_OPTIMIZERS = {"lora-fa": _lora_fa}
