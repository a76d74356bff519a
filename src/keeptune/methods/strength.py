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
        options: Its name; of several that exclude each other the one that is set counts, else the last.
        keeps_more: What a factor does to it.
        default: Its value where the option is None.
    """

    options: tuple[str, ...]
    keeps_more: Literal["multiplied", "divided"]
    default: float | None = None


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
    option = next((name for name in known.options if getattr(method, name) is not None), known.options[-1])
    value = getattr(method, option)
    value = known.default if value is None else value
    assert value is not None, "a strength that may be None has a default"
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
