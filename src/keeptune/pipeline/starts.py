"""Which weights of a quantised base a method reads for its starts and scores: its own, or the original ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import PlanError
from keeptune.core.target import Target
from keeptune.core.weights import is_quantised, read_weight
from keeptune.methods.base import Method
from keeptune.model.pretrained import LoadOptions, StartFrom, load_floats
from keeptune.statistics.covariance import DirectionVariances

# Weights quantised to two bits are off by up to 0.5, those of another model by 1.4 (relative, Frobenius).
_UNRELATED = 0.7


def weight_reader(
    model: PreTrainedModel, method: Method, start_from: StartFrom, original: PreTrainedModel | str | None
) -> Callable[[Target], Tensor]:
    """Returns what reads a target's W for a method, one at a time.

    Args:
        model: The base, which may be quantised.
        method: The method.
        start_from: Which weights.
        original: The base before it was quantised, by path or hub id, or loaded; its weights may be on disk.

    Raises:
        PlanError: The original is wanted and not given, or the method has statistics taken along the directions of the
            weights that the model computes with.
    """
    if start_from == "quantised":
        return partial(read_weight, model)
    if start_from != "original" or original is None:
        raise PlanError(
            "start_from",
            got=f'"{start_from}"' + (" without the original" if start_from == "original" else ""),
            wanted='"quantised", or "original" and the base before it was quantised',
            next_step="Set PlanOptions.original (in a recipe `original:`) to its path or hub id.",
        )
    if any(isinstance(request, DirectionVariances) for request in method.statistics):
        raise PlanError(
            f"method {method.name}",
            got="start_from: original",
            wanted="quantised: its statistics are taken along the directions of the model's own weights",
            next_step="Leave `start_from` out, or let the method take whole covariances.",
        )
    whole = load_floats(original, LoadOptions(device=model.device)) if isinstance(original, str) else original
    if is_quantised(whole):
        raise PlanError("start_from", got="an original that is quantised", wanted="floats", next_step="Name another.")
    return partial(_original, whole, model)


def _original(whole: PreTrainedModel, model: PreTrainedModel, target: Target) -> Tensor:
    """Reads W of the original, held against what it was quantised to."""
    W, near = read_weight(whole, target), read_weight(model, target)
    apart = float((W.to(near.device) - near).norm() / W.norm()) if W.shape == near.shape else float("inf")
    if not apart <= _UNRELATED:
        raise PlanError(
            f"start_from: original, {target.name}",
            got=f"weights that are not near those of the quantised base (relative difference {apart:.2f})",
            wanted=f"the model that the base was quantised from, not {whole.name_or_path}",
            next_step="Name it with `original:`.",
        )
    return W
