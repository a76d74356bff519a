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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from keeptune.core.artefact import content_key
from keeptune.core.errors import RecipeError
from keeptune.model.blocks import block_number

__all__ = [
    "Intruders",
    "Knob",
    "Layers",
    "Scale",
    "halves",
    "knob_of",
    "standard_knobs",
]

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
    """Read a knob from a row of ``runs.json``.

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
    raise RecipeError("variant", got=repr(dict(plain)), wanted="scale, layers or intruders", next_step="Pick one.")
