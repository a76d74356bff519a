"""Which option of a method says how much it keeps, and in which direction.

Law (``tests/contract``): a factor above 1 always keeps more. With v the option's value and f the factor,

    multiplied   v f                               a weight on forgetting                                 (1)
    divided      v / f                             a budget for it, or how much is trained                (2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from keeptune.core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Strength:
    """The strength of a method: a ``ClassVar`` named ``strength_option``, None where there is none.

    Args:
        option: Its name.
        keeps_more: What a factor does to it.
    """

    option: str
    keeps_more: Literal["multiplied", "divided"]


def stronger(method: Any, factor: float) -> tuple[str, float]:
    """Multiplies how much a method keeps by a factor.

    Args:
        method: The method.
        factor: Above 0; above 1 keeps more.

    Raises:
        RecipeError: The method has no strength, or its strength is 0, which no factor moves.

    >>> from keeptune.methods.lalora import Lalora
    >>> stronger(Lalora(strength=100.0), 3)
    ('strength', 300.0)
    """
    known: Strength | None = method.strength_option
    if known is None:
        raise RecipeError(
            f"method {method.name}, strength",
            got=f"the factor {factor:g}",
            wanted="no factor: this method has no option for how much it keeps",
            next_step="Vary an option by name, such as strength: {method.rank: [4, 8]}.",
        )
    option = known.option
    value = getattr(method, option)
    if value == 0:
        raise RecipeError(
            f"method.{option}",
            got=f"0, with the factor {factor:g}",
            wanted="a value that a factor can move",
            next_step="Set the value that factor 1 stands for, or leave the factors out.",
        )
    if known.keeps_more == "multiplied":
        return option, value * factor
    return option, value / factor
