"""Frozen dataclasses whose fields are options, with the range of each in a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from keeptune.core.errors import KeeptuneError, PlanError


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers that an option may have; ``advice`` is the next step of the error message.

    >>> str(Range(above=0, most=100)), 0 in Range(above=0)
    ('above 0 and at most 100', False)
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    advice: str = "Correct the value."

    def __contains__(self, value: float) -> bool:
        return (
            -math.inf < value < (math.inf if self.below is None else self.below)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        if self.most is None and self.below is None:
            return f"{self.least:g} or more" if self.above is None else f"a number above {self.above:g}"
        low = f"at least {self.least:g}" if self.above is None else f"above {self.above:g}"
        return f"{low} and " + (f"at most {self.most:g}" if self.below is None else f"below {self.below:g}")


@dataclass(frozen=True)
class Options:
    """Base class of methods and penalties; ``ranges`` of a class are checked besides those of its bases.

    Numbers out of their ranges raise PlanError, or ``refusal``; None and words are not checked.
    """

    ranges: ClassVar[Mapping[str, Range]] = {}
    section: ClassVar[str] = ""
    refusal: ClassVar[type[KeeptuneError]] = PlanError

    def __post_init__(self) -> None:
        known: dict[str, Range] = {}
        for cls in reversed(type(self).__mro__):
            known |= vars(cls).get("ranges", {})
        for option, allowed in known.items():
            value = getattr(self, option)
            if isinstance(value, int | float):
                self.need(value in allowed, option, str(allowed), allowed.advice)

    def need(self, right: bool, option: str, wanted: str, advice: str = "Correct the value.") -> None:
        """Raises ``refusal`` unless the value of an option is right."""
        if not right:
            raise self.refusal(self.place(option), got=str(getattr(self, option)), wanted=wanted, next_step=advice)

    def place(self, option: str) -> str:
        """Returns how error messages name an option: as a recipe does, or nearly so."""
        return f"{self.section}{option}"

    @classmethod
    def of(cls, other: Options, **changes: Any) -> Self:
        """Takes over the options that have the same name in another object; the others have their defaults."""
        shared = {field.name for field in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(other)}
        return cls(**{name: getattr(other, name) for name in shared} | changes)
