"""Tables of the pages: their cells, and bars for changes."""

import math
from dataclasses import dataclass
from typing import Final

_HALF: Final = 100.0


@dataclass(frozen=True)
class Bar:
    """A bar from the middle of a strip of 200 units: where it begins, how long it is, and its whiskers."""

    kind: str
    start: float
    length: float
    low: float | None
    high: float | None
    said: str  # what it shows, for who cannot see it


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    A ``note`` stands below its text, the mark of the label with the ``index`` and a ``bar`` before it; ``kind`` is its
    class in the style sheet: ``path`` for long texts, or ``bar``.
    """

    main: str
    note: str = ""
    index: int | None = None
    bar: Bar | None = None
    kind: str = ""


@dataclass(frozen=True)
class Grid:
    """A table on the page: headings and rows of texts or cells."""

    heads: tuple[str | Cell, ...]
    rows: tuple[tuple[str | Cell, ...], ...]


def bar(value: float, low: float, high: float, scale: float, said: str = "") -> Bar:
    """Returns the bar of a change, to the right is better; ``scale`` is the largest change that has room."""

    def place(number: float) -> float:
        return round(_HALF + _HALF * 0.96 * max(-1.0, min(1.0, number / scale)), 2)

    end = place(value)
    kind = "gain" if value > 0 else "loss" if value < 0 else "none"
    left, right = (place(low), place(high)) if math.isfinite(low) and math.isfinite(high) else (None, None)
    return Bar(kind, min(_HALF, end), round(abs(end - _HALF), 2), left, right, said)
