"""The base class of losses of a task's tokens, and the list of all losses.

    L = (1/N) sum of l_t         over the N learned tokens of an optimiser step;  l_t = -log p_t for "nll"      (1)

A loss is a frozen dataclass whose fields are its options, in one file of this package or of another package under the
entry-point group ``keeptune.training.losses``. It says l_t; training/task_loss.py runs the model and leaves (1) to TRL:
gradient accumulation, the count of tokens and the mean over processes are those of plain training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

import keeptune.training.losses
from keeptune.core.options import Options
from keeptune.core.registry import registered


@dataclass(frozen=True)
class TaskLoss(Options):
    """A loss of the task's tokens.

    Laws (``tests/training/test_losses.py``): no padding, prompt or masked token enters; the loss of a batch is the sum
    of those of its tokens.

    Attributes:
        name: Its registered name.
        paper: Its source.
        reads: What it needs of each token: the log-probability of the data's token, those of all tokens (``answers``),
            or these and the base's (``base``).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    reads: ClassVar[Literal["log_probs", "answers", "base"]] = "log_probs"

    def place(self, option: str) -> str:
        """Returns ``"task.loss, alpha"`` for ``"alpha"``."""
        return f"task.loss, {option}"

    def measure(self, answers: Tensor, base: Tensor) -> Tensor:
        """Computes what the loss takes of whole distributions, for some tokens at a time.

        Args:
            answers: Log-probabilities, ``(tokens, vocabulary)``, float32.
            base: Those of the base; of a loss that does not read them, the same as ``answers``.

        Returns:
            ``(tokens,)``; it has a gradient where the loss reads ``base``.
        """
        raise NotImplementedError

    def losses(self, log_probs: Tensor, measured: Tensor) -> Tensor:
        """Computes l_t.

        Args:
            log_probs: log p_t of the data's tokens, ``(tokens,)``, float32, in nats.
            measured: From :meth:`measure`; of a loss that reads ``log_probs`` alone, these.

        Returns:
            ``(tokens,)``.
        """
        raise NotImplementedError


def losses() -> dict[str, type[Any]]:
    """Returns every loss besides nll: the files of this package and the entry points ``keeptune.training.losses``.

    Raises:
        RecipeError: Two losses share a name.
    """
    return registered(keeptune.training.losses, TaskLoss, "loss")
