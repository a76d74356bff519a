"""attach: add to any Hugging Face or TRL trainer what a plan needs of it besides the model.

A plan says it in plain values (``Plan.training``), which are saved with it and part of its key:

    {"learning_rate_factor": 0.4}       times the trainer's learning rate (methods/loki.py)
    {"kept_directions": 16}             steps stay off directions of W (methods/oplora.py, training/projection.py)

and in ``Plan.penalties``, terms of the loss (training/penalty_engine.py).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from keeptune.adapter.install import starting_values
from keeptune.core.errors import TrainError, need_known
from keeptune.core.plan import Plan
from keeptune.model.head import refuse_unknown_tokens
from keeptune.model.pretrained import load_config
from keeptune.training.guard import Guard
from keeptune.training.losses.base import TaskLoss, loss_named
from keeptune.training.penalty_engine import add_penalties
from keeptune.training.projection import add_projection
from keeptune.training.task_loss import add_loss
from keeptune.training.zero import refuse_zero

_log = logging.getLogger(__name__)
_FACTOR, _KEPT = "learning_rate_factor", "kept_directions"


def attach(trainer: Any, plan: Plan, loss: str | TaskLoss = "nll") -> None:
    """Adds the plan's learning rate, penalties and :class:`Guard` to a trainer; a second call changes nothing.

    Args:
        trainer: A ``transformers.Trainer`` or any of TRL's, with the installed model, before ``train()``.
        plan: The plan that was installed.
        loss: What TRL's SFTTrainer learns of each token: ``"nll"``, ``"dft"``, ``"eaft"`` or ``"asft"``, or one of
            these with options, such as ``Asft(kl_weight=0.05)``.

    Raises:
        TrainError: The plan needs something that this version does not have, the trainer has an optimiser of its own
            where the plan scales the learning rate, or it cannot count a penalty exactly once; or the adapter's base
            was resized in memory only.
        DataError: The data have tokens that the model's embedding does not know.
    """
    guards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Guard)]
    if any(guard.attached for guard in guards):
        return
    if trainer.is_in_train:
        got, wanted = "a trainer that has started", "one before train(), for all steps are to have the penalties"
        raise TrainError("attach", got=got, wanted=wanted, next_step="Make it anew, and attach before trainer.train().")
    add_plan(trainer, plan, loss)


def add_plan(trainer: Any, plan: Plan, loss: str | TaskLoss = "nll") -> None:
    """Adds the same, of a plan that may be made only as training begins (:class:`keeptune.Callback`)."""
    guards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Guard)]
    refuse_zero(trainer.args)
    _refuse_resized(trainer.model)
    data = trainer.train_dataset
    for column in data.column_names if isinstance(data, Dataset) else ():
        if column in ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids"):
            refuse_unknown_tokens(trainer.model, data[column], "the training data")
    _keep_precise(trainer.model, plan)
    for key, value in plan.training.items():
        need_known(key, (_FACTOR, _KEPT), "plan, training", "one that this version knows", TrainError)
        if key == _FACTOR:
            _scale_rate(trainer, plan, value)
    if plan.penalties:
        add_penalties(trainer, plan)
    projection = add_projection(trainer, plan) if _KEPT in plan.training else None  # of penalties' gradients too
    chosen = loss_named(loss, {}) if isinstance(loss, str) else loss
    if chosen is not None:
        add_loss(trainer, plan, chosen)
    guard = guards[0] if guards else Guard(plan)
    if not guards:
        trainer.add_callback(guard)
    guard.attached, guard.projection = True, projection


def _refuse_resized(model: Any) -> None:
    """Refuses an adapter whose base was resized in memory: it would not fit the one that is saved."""
    base = model.get_base_model() if isinstance(model, PeftModel) else None
    if base is not None and base.name_or_path and Path(base.name_or_path).is_dir():
        now, saved = (one.get_text_config().vocab_size for one in (base.config, load_config(base.name_or_path)))
        if now != saved:
            raise TrainError(
                f"the base {base.name_or_path}",
                got=f"an embedding of {now} rows, where {saved} are saved",
                wanted="the base as it is saved, which the adapter will be loaded on",
                next_step="Save the resized model and its tokenizer, and load and plan from there.",
            )


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


def _scale_rate(trainer: Any, plan: Plan, factor: float) -> None:
    if trainer.optimizer is not None:
        raise TrainError(
            f"training with {plan.method}",
            got="an optimiser of your own, with its own learning rate",
            wanted="a trainer that makes one from its arguments: the method scales the rate",
            next_step="Leave it to the trainer (callbacks are to be there before), or set the method's `rate: fixed`.",
        )
    trainer.args.learning_rate *= factor
    _log.info(
        "train: the method %s takes %.3g of the learning rate: %.3g", plan.method, factor, trainer.args.learning_rate
    )
