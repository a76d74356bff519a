"""What options of penalties are checked for."""

from __future__ import annotations

import math

from keeptune.core.errors import PlanError

__all__ = ["check_counts", "check_strength"]


def check_strength(strength: float, where: str) -> None:
    """Check a penalty's strength.

    Args:
        strength: The strength.
        where: The penalty's name.

    Raises:
        PlanError: It is below 0 or not finite.
    """
    if not 0 <= strength < math.inf:
        raise PlanError(
            f"penalty {where}, strength", got=str(strength), wanted="0 or more", next_step="Correct the value."
        )


def check_counts(where: str, **counts: int | None) -> None:
    """Check options that count something.

    Args:
        where: The penalty's name.
        **counts: Option to its value; None stands for all.

    Raises:
        PlanError: One is below 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise PlanError(
                f"penalty {where}, {name}", got=str(count), wanted="1 or more", next_step="Correct the value."
            )
