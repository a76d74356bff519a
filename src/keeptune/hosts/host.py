"""The trainer that a callback runs in: found, checked, and its processes made to agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback

from keeptune.core.errors import KeeptuneError, TrainError
from keeptune.training.guard import Guard

T = TypeVar("T")


def trainer_of(callback: TrainerCallback) -> Any:
    """Returns the trainer that has just called one of a callback's events, which are not told.

    Raises:
        TrainError: It is none of Transformers'.
    """
    frame = inspect.currentframe()
    while frame is not None:
        own = frame.f_locals.get("self")
        if isinstance(own, Trainer) and any(one is callback for one in own.callback_handler.callbacks):
            return own
        frame = frame.f_back
    raise TrainError(
        "keeptune.Callback",
        got="a training loop that is no transformers.Trainer",
        wanted="one of Transformers' or TRL's trainers, or a class on them",
        next_step="Call keeptune.Penalties.step in a loop of your own.",
    )


def refuse_host(trainer: Any, callback: TrainerCallback) -> None:
    """Raises TrainError for a trainer with another callback of the kind, or with a plan that was attached to it."""
    callbacks = trainer.callback_handler.callbacks
    for refused, got, wanted, next_step in (
        (
            sum(isinstance(one, type(callback)) for one in callbacks) > 1,
            "two of them in one trainer",
            "one: penalties would count twice",
            "Leave one out; one callback takes several `penalties`.",
        ),
        (
            any(isinstance(one, Guard) and one.attached for one in callbacks),
            "a trainer that keeptune.attach was called with",
            "one of the two: penalties would count twice",
            "Leave keeptune.attach out, and pass keeptune.Callback(plan=plan).",
        ),
        (
            trainer.hp_search_backend is not None,
            "a search of hyperparameters, which makes model after model",
            "one training of one model",
            "Train the chosen hyperparameters with it, in a trainer of their own.",
        ),
    ):
        if refused:
            raise TrainError("keeptune.Callback", got=got, wanted=wanted, next_step=next_step)


def agreed(make: Callable[[], T]) -> T:
    """Returns what the first process makes, in all; its error is that of all."""
    made: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            made = [make()]
        except KeeptuneError as error:
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], KeeptuneError):
        raise made[0]
    result: T = made[0]
    return result
