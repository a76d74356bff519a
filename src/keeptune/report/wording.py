"""Print numbers as a careful engineer would."""

from __future__ import annotations

import math

from keeptune.core.intervals import Estimate
from keeptune.report.summary import Series

__all__ = [
    "amount",
    "change_interval",
    "count",
    "duration",
    "gap",
    "importance",
    "interval",
    "listing",
    "loss_text",
    "number",
    "points",
    "signed",
]


def number(value: float | None, digits: int = 3) -> str:
    """Print a score or a loss.

    Args:
        value: The number.
        digits: Decimals for numbers below ten.

    Returns:
        The text, an en dash when there is no number.

    >>> number(0.70412345), number(12.3456), number(None)
    ('0.704', '12.35', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    kept = digits if abs(value) < 10 else max(digits - 1, 0)
    text = f"{value:.{kept}f}" if abs(value) < 1000 else f"{value:.0f}"
    return _minus(text)


def points(value: float) -> str:
    """Print percentage points: whole ones from ten on, one decimal below.

    Args:
        value: The points.

    Returns:
        The text.

    >>> points(27.31), points(4.12), points(-0.04)
    ('27', '4.1', '0.0')
    """
    return _minus(f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.1f}")


def signed(value: float, decimals: int) -> str:
    """Print a change with its sign.

    Args:
        value: The change.
        decimals: How many decimals.

    Returns:
        The text.

    >>> signed(2.04, 1), signed(-3.0, 1), signed(0.001, 1)
    ('+2.0', '−3.0', '0.0')
    """
    text = _minus(f"{value:.{decimals}f}")
    return text if text.startswith("−") or not float(text) else f"+{text}"


def interval(estimate: Estimate, kind: Series) -> str:
    """Print the interval of a loss in the unit of its benchmark.

    Args:
        estimate: The loss with its interval.
        kind: The benchmark.

    Returns:
        For example "24 to 30".
    """
    write = number if kind.lower_is_better else points
    return f"{write(estimate.low)} to {write(estimate.high)}"


def change_interval(estimate: Estimate, kind: Series) -> str:
    """Print the interval of after minus before for a table cell.

    Args:
        estimate: The change with its interval.
        kind: The benchmark.

    Returns:
        For example "[−30.1, −24.0]" in points; empty when there is no interval.
    """
    if not estimate.has_interval:
        return ""
    if kind.lower_is_better:
        return f"[{signed(estimate.low, 3)}, {signed(estimate.high, 3)}]"
    return f"[{signed(100 * estimate.low, 1)}, {signed(100 * estimate.high, 1)}]"


def loss_text(value: float, kind: Series) -> str:
    """Print a loss with its unit.

    Args:
        value: The loss.
        kind: The benchmark.

    Returns:
        For example "27 points" or "0.120 nats/token".
    """
    return amount(value, "nats/token", 3) if kind.lower_is_better else f"{points(value)} points"


def amount(value: float, unit: str, digits: int) -> str:
    """Print a number with its unit.

    Args:
        value: The number.
        unit: The unit.
        digits: Decimals for numbers below ten.

    Returns:
        The text.
    """
    return f"{number(value, digits)} {unit}"


def count(value: float | None) -> str:
    """Print a count of parameters.

    Args:
        value: The count.

    Returns:
        For example "123 k" or "1.23 M".

    >>> count(512), count(123456), count(1234567), count(7.2e9), count(999_999)
    ('512', '123 k', '1.23 M', '7.20 G', '1.00 M')
    """
    if value is None or not math.isfinite(value):
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{decimals}f} {letter}"
    return f"{value:.0f}"


def gap(value: float | None) -> str:
    """Print an export gap.

    Args:
        value: The gap.

    Returns:
        For example "1.0e-06".
    """
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:.1e}"


def importance(value: float | None) -> str:
    """Print an importance, which may be of any size.

    Args:
        value: The importance.

    Returns:
        Two digits, for example "3.1e-07".

    >>> importance(0.031249), importance(3.12e-7), importance(0.0), importance(None)
    ('3.1e-02', '3.1e-07', '0', '–')
    """
    return gap(value)


def duration(seconds: float) -> str:
    """Print a time span.

    Args:
        seconds: The span.

    Returns:
        For example "1 h 12 min", "3 min 05 s" or "4.2 s".

    >>> duration(4.21), duration(185), duration(4320)
    ('4.2 s', '3 min 05 s', '1 h 12 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def listing(items: list[str]) -> str:
    """Join words with commas and a final "and".

    Args:
        items: The words.

    Returns:
        The phrase.

    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _minus(text: str) -> str:
    """Use a real minus sign and no negative zero.

    Args:
        text: A printed number.

    Returns:
        The text.
    """
    bare = text.lstrip("-")
    return bare if not float(bare) else text.replace("-", "−")
