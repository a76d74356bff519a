"""What the probes share: hidden states of blocks read and replaced by hooks, and a check of fast ways."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
T = TypeVar("T")


class UnfitError(Exception):
    """The fast way cannot serve this architecture."""


@dataclass
class BlockCalls:
    """What blocks were given in a run.

    Args:
        keep: Cuts the hidden states that are kept.
        inputs: ``(B, C, hidden)`` of each block.
        calls: What else each block was given.
    """

    keep: Callable[[Tensor], Tensor] = lambda hidden: hidden
    inputs: list[Tensor] = field(default_factory=list)
    calls: list[inspect.BoundArguments] = field(default_factory=list)

    def watch(self, blocks: Sequence[nn.Module], stack: ExitStack) -> None:
        """Records the calls of blocks until the stack is closed."""

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = inspect.signature(block.forward).bind(*args, **kwargs)
            self.inputs.append(self.keep(next(iter(call.arguments.values()))))
            self.calls.append(call)

        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)


def first_argument(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the hidden states that a block is called with."""
    hidden: Tensor = next(iter(inspect.signature(block.forward).bind(*args, **kwargs).arguments.values()))
    return hidden


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states in what a module returned: the tensor, or a tuple that starts with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Returns a module's output with other hidden states in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def take(values: Tensor, columns: Tensor) -> Tensor:
    """Returns columns ``(B, Q)`` of ``(B, W, ...)``, or of ``(1, W, ...)`` for all texts alike: ``(B, Q, ...)``."""
    rows = torch.arange(len(columns), device=columns.device)[:, None] if len(values) > 1 else columns * 0
    return values[rows, columns]


def probabilities(logits: Tensor, wanted: Tensor) -> Tensor:
    """Computes the probability of tokens ``(...)`` at logits ``(..., vocabulary)``, in float32 or better: ``(...)``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, wanted[..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(dim=-1)).exp()


def fast_or_none(
    model: PreTrainedModel, fast: Callable[[], T], gap: Callable[[T], float], tolerance: float, probe: str
) -> T | None:
    """Returns the result of the fast way on a first batch; None where it does not serve the model, which is logged.

    The ``gap`` to the slow way may be as large as the tolerance. ``probe`` names the probe and what the slow way runs
    once for, such as ``"trace: state"``.
    """
    name, _, unit = probe.partition(": ")
    try:
        result = fast()
    except torch.OutOfMemoryError:
        raise
    # What a block of an unforeseen form may raise.
    except (UnfitError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        distance = gap(result)
        if distance <= tolerance:
            return result
        wrong = f"it differs from one run per {unit} by {distance:.1e}"
    _log.warning(
        "%s: %s cannot be measured the fast way (%s): one run per %s is done, which takes much longer",
        name,
        type(model).__name__,
        wrong,
        unit,
    )
    return None
