"""The base class of losses of a task's tokens, and the list of all losses.

    L = (1/N) sum of l_t         over the N learned tokens of an optimiser step;  l_t = -log p_t for "nll"      (1)

A loss is a frozen dataclass whose fields are its options, in one file of this package or of another package under the
entry-point group ``keeptune.training.losses``. It says l_t; training/task_loss.py leaves the sum to TRL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

import keeptune.training.losses
from keeptune.core.options import Options
from keeptune.core.registry import made, registered


@dataclass(frozen=True)
class TaskLoss(Options):
    """A loss of the task's tokens.

    Attributes:
        name: Its registered name.
        paper: Its source.
        reads: Whether it needs the log-probabilities of all tokens (``answers``), and those of the base (``base``); or
            texts that the model writes (``own texts``), with which TRL's SDFTTrainer takes the place of ``losses``.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    reads: ClassVar[Literal["log_probs", "answers", "base", "own texts"]] = "log_probs"

    def losses(self, log_probs: Tensor, answers: Tensor, base: Tensor) -> Tensor:
        """Computes l_t of some tokens, ``(tokens,)``.

        Args:
            log_probs: log p_t of the data's tokens, ``(tokens,)``, float32, in nats.
            answers: Log-probabilities of all tokens, ``(tokens, vocabulary)``, with a gradient for a loss that reads
                the base; of a loss that reads none, the same as ``log_probs``.
            base: Those of the base; of a loss that does not read them, the same as ``answers``.
        """
        raise NotImplementedError


def loss_named(name: str, options: Mapping[str, Any]) -> TaskLoss | None:
    """Returns the loss of a name with options, its fields; None for ``"nll"``, which is TRL's own.

    Raises:
        RecipeError: The name or an option is unknown, or a value does not fit.
    """
    if name == "nll" and not options:
        return None
    loss: TaskLoss = made(name, options, losses(), "task.loss", "loss, or nll")
    return loss


def losses() -> dict[str, type[Any]]:
    """Returns every loss besides nll by name; a RecipeError says that two share one."""
    return registered(keeptune.training.losses, TaskLoss, "loss")
