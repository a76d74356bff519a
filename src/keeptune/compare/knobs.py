"""Knobs that need no training: the size of a finished change, and PEFT's reduction of intruder dimensions.

With W0 the base's weights and W1 the tuned ones, s in [0, 1] for all weights or for each block,

    W_s = W0 + s (W1 - W0)                                                                                (1)

is the interpolation of WiSE-FT (Wortsman et al., CVPR 2022). For a LoRA, W1 - W0 = (alpha / r) B A, so that s is folded
into B; the base stays as it is. By halves means two settings for each s: the lower half of the blocks scaled and the
upper left as trained, and the other way round (of an odd number the block in the middle is of the upper half).

Intruder dimensions are singular vectors u_i of W1 that resemble none of W0 (Shuttleworth et al., arXiv 2410.21228):

    W = W1 + (k - 1) sum_i sigma_i u_i v_i^T,     i among the first 10 with max_j |u_i . u0_j| < 0.5       (2)

by ``peft.tuners.lora.intruders``, whose ``mitigation_lambda`` is k: 1 leaves the adapter as it is and 0 takes intruders
out whole, as in the paper and in PEFT's code; its docstring has it the other way round. What is left is cut to the
adapter's rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from keeptune.core.artefact import content_key
from keeptune.core.errors import ModelError, RecipeError
from keeptune.model.blocks import block_number

__all__ = [
    "Intruders",
    "Knob",
    "Layers",
    "Scale",
    "halves",
    "interpolate",
    "knob_of",
    "put_adapter",
    "refusal",
    "standard_knobs",
    "turned_adapter",
]

_DEFAULT, _REDUCED = "default", "intruders_reduced"
_LONGEST = 60


class Knob(Protocol):
    """What is turned after training."""

    @property
    def slug(self) -> str:
        """Its name as a folder."""

    @property
    def family(self) -> str:
        """What is added to the label of the cells that it was turned on."""

    def plain(self) -> dict[str, Any]:
        """It as JSON, read back by :func:`knob_of`."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The whole change times a factor, eq. 1.

    Args:
        factor: From 0 (the base) to 1 (as trained).

    Raises:
        RecipeError: It is outside.
    """

    factor: float

    def __post_init__(self) -> None:
        """Check the factor."""
        _need_share("compare.scales", self.factor)

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        return f"scale-{_short(self.factor)}"

    @property
    def family(self) -> str:
        """What is added to the label."""
        return "scaled"

    def plain(self) -> dict[str, Any]:
        """It as JSON.

        Returns:
            ``{"scale": factor}``.
        """
        return {"scale": self.factor}

    def factor_of(self, name: str) -> float:
        """Say what a weight's change is multiplied by.

        Args:
            name: The weight's path.

        Returns:
            The factor.
        """
        del name
        return self.factor


@dataclass(frozen=True, slots=True)
class Layers:
    """The change of each block times a factor of its own, eq. 1; what is outside blocks stays as trained.

    Args:
        factors: One per block, from the first.

    Raises:
        RecipeError: There is none, or one is outside 0 to 1.
    """

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the factors."""
        if not self.factors:
            raise RecipeError(
                "scale per layer", got="no factors", wanted="one for each block", next_step="Example: [0, 0.5, 1]."
            )
        for factor in self.factors:
            _need_share("scale per layer", factor)

    @property
    def slug(self) -> str:
        """Its name as a folder: runs of equal factors, ``4x0.5-4x1``."""
        runs = "-".join(f"{len(list(run))}x{_short(factor)}" for factor, run in groupby(self.factors))
        return f"layers-{runs if len(runs) <= _LONGEST else content_key(self.factors)[:12]}"

    @property
    def family(self) -> str:
        """What is added to the label."""
        return "scaled by layer"

    def plain(self) -> dict[str, Any]:
        """It as JSON.

        Returns:
            ``{"layers": [factor, ...]}``.
        """
        return {"layers": list(self.factors)}

    def factor_of(self, name: str) -> float:
        """Say what a weight's change is multiplied by.

        Args:
            name: The weight's path.

        Returns:
            The factor of its block; 1 outside blocks.

        Raises:
            RecipeError: The block has none.
        """
        block = block_number(name)
        if block >= len(self.factors):
            raise RecipeError(
                "scale per layer",
                got=f"{len(self.factors)} factors",
                wanted=f"one for each block, and there is a block {block}",
                next_step="Give one more for each block.",
            )
        return 1.0 if block < 0 else self.factors[block]


@dataclass(frozen=True, slots=True)
class Intruders:
    """Intruder dimensions reduced by PEFT, eq. 2.

    Args:
        keep: The share k of an intruder that stays: 1 leaves the adapter as it is.

    Raises:
        RecipeError: It is outside 0 to 1.
    """

    keep: float

    def __post_init__(self) -> None:
        """Check the share."""
        _need_share("compare.intruders", self.keep)

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        return f"intruders-{_short(self.keep)}"

    @property
    def family(self) -> str:
        """What is added to the label."""
        return "intruders reduced"

    def plain(self) -> dict[str, Any]:
        """It as JSON.

        Returns:
            ``{"intruders": keep}``.
        """
        return {"intruders": self.keep}


def _short(value: float) -> str:
    """Write a number in as few digits as tell it from every other: knobs that differ have folders of their own."""
    return repr(float(value)).removesuffix(".0")


def _need_share(where: str, value: float) -> None:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise RecipeError(where, got=f"{value}", wanted="a number from 0 to 1", next_step="Correct it.")


def halves(depth: int, factors: Sequence[float]) -> list[Layers]:
    """Scale the lower half of the blocks, then the upper one.

    Args:
        depth: Number of blocks.
        factors: The factors.

    Returns:
        Two settings per factor.

    >>> [knob.slug for knob in halves(5, [0.5])]
    ['layers-2x0.5-3x1', 'layers-2x1-3x0.5']
    """
    low = depth // 2
    found = []
    for factor in factors:
        found += [Layers((factor,) * low + (1.0,) * (depth - low)), Layers((1.0,) * low + (factor,) * (depth - low))]
    return found


def standard_knobs(
    scales: Sequence[float], depth: int | None = None, intruders: Sequence[float] = (0.5,)
) -> list[Knob]:
    """List the knobs of a comparison.

    Args:
        scales: Factors of the whole change; 1 is the cell itself and is left out.
        depth: Number of blocks, to have the same factors by halves as well; None has none.
        intruders: Shares of intruders that stay.

    Returns:
        The knobs.
    """
    factors = [factor for factor in scales if factor != 1]
    by_layer = [] if depth is None else halves(depth, factors)
    return [*(Scale(factor) for factor in factors), *by_layer, *(Intruders(keep) for keep in intruders)]


def knob_of(plain: Mapping[str, Any]) -> Knob:
    """Read a knob from a row of ``cells.json``.

    Args:
        plain: What :meth:`Knob.plain` gave.

    Returns:
        The knob.

    Raises:
        RecipeError: It is none.
    """
    match dict(plain):
        case {"scale": factor, **rest} if not rest:
            return Scale(factor)
        case {"layers": [*factors], **rest} if not rest:
            return Layers(tuple(factors))
        case {"intruders": keep, **rest} if not rest:
            return Intruders(keep)
    raise RecipeError("knob", got=repr(dict(plain)), wanted="scale, layers or intruders", next_step="Pick one.")


def refusal(knob: Knob, tensors: Mapping[str, Tensor] | None, config: Any = None) -> str:
    """Say why a knob cannot be turned on a result.

    Args:
        knob: The knob.
        tensors: The adapter's; None for a whole model.
        config: The adapter's.

    Returns:
        The reason; empty where it can.
    """
    if tensors is None:
        return "PEFT reduces intruder dimensions of LoRA adapters, not of whole models" if _reduces(knob) else ""
    if any("lora_magnitude_vector" in name for name in tensors):
        return "a DoRA adapter sets the lengths of rows, which no factor on its change takes back; export it merged"
    if _reduces(knob) and not all("lora_" in name for name in tensors):
        return "PEFT's reduction of intruder dimensions draws a trained head anew"
    if _reduces(knob) and any(name.endswith("lora_B.bias") for name in tensors):
        return "PEFT's reduction of intruder dimensions drops an adapter's biases"
    # W and B A are then (in, out), and PEFT would write their left factor, (in, r), into B, (out, r).
    if _reduces(knob) and config.fan_in_fan_out:
        return "PEFT's reduction of intruder dimensions cannot read transposed weights (Conv1D)"
    return ""


def _is_left(name: str) -> bool:
    """Tell B and its bias, which hold the factor of a change, from A and from what is no change."""
    return "lora_B" in name or "lora_embedding_B" in name


def _reduces(knob: Knob) -> bool:
    return isinstance(knob, Intruders)


def turned_adapter(wrapped: PeftModel, tensors: Mapping[str, Tensor], knob: Knob) -> dict[str, Tensor]:
    """Compute an adapter's tensors with a knob turned.

    Law: with a scale s the adapter's change is s times what it was; with 1, or where nothing intrudes, it is the same.

    Args:
        wrapped: The base with the adapter; it is left as it is found.
        tensors: The adapter's, as its file has them.
        knob: The knob.

    Returns:
        New tensors under the same names.

    Raises:
        ModelError: The knob cannot be turned on this adapter.
    """
    why = refusal(knob, tensors, wrapped.peft_config[_DEFAULT])
    if why:
        raise ModelError(
            f"knob {knob.slug}", got=why, wanted="a result that it can be turned on", next_step="Leave the knob out."
        )
    if isinstance(knob, Intruders):
        return _reduced(wrapped, tensors, knob.keep)
    assert isinstance(knob, Scale | Layers)
    return {name: value * knob.factor_of(name) if _is_left(name) else value.clone() for name, value in tensors.items()}


def _reduced(wrapped: PeftModel, tensors: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    put_adapter(wrapped, tensors)
    with torch.random.fork_rng(devices=[]):  # PEFT draws the new adapter before it fills it
        reduce_intruder_dimension(wrapped, _DEFAULT, _REDUCED, mitigation_lambda=keep, logging_sink=None)
    try:
        found = get_peft_model_state_dict(wrapped, adapter_name=_REDUCED)
        return {name: found[name].detach().cpu().clone() for name in tensors}
    finally:
        wrapped.set_adapter(_DEFAULT)
        wrapped.delete_adapter(_REDUCED)


def put_adapter(wrapped: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the adapter of a model.

    Args:
        wrapped: The model.
        tensors: As the adapter's file has them.

    Raises:
        ModelError: They do not fit.
    """
    loaded = set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=_DEFAULT)
    if loaded.unexpected_keys:
        raise ModelError(
            "adapter",
            got=f"weights that the model does not have: {', '.join(loaded.unexpected_keys[:3])}",
            wanted="the adapter's own",
            next_step="Load the adapter on its own base.",
        )


def interpolate(
    model: nn.Module, base: nn.Module, tuned: Mapping[str, Tensor], knob: Scale | Layers, whole: Collection[str] = ()
) -> None:
    """Set a model's weights between the base's and the tuned ones, eq. 1, computed in float32 at least.

    Laws: 0 gives the base's weights, and 1 the tuned ones, bit for bit.

    Args:
        model: The model to change; of the architecture of both.
        base: The base.
        tuned: The tuned weights by name.
        knob: The factors.
        whole: Modules that the base does not have, such as a drawn head: they stay as tuned.
    """
    heads = tuple(f"{name}." for name in whole)
    with torch.no_grad():
        for (name, weight), (_, start) in zip(model.named_parameters(), base.named_parameters(), strict=True):
            end = tuned[name].to(weight.device)
            factor = 1.0 if name.startswith(heads) else knob.factor_of(name)
            exact = torch.promote_types(weight.dtype, torch.float32)
            # lerp is exact at both ends.
            weight.copy_(torch.lerp(start.to(exact), end.to(exact), factor))
