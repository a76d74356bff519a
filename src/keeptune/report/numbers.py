"""How numbers, intervals and names are printed, on pages, in figures and on the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.core.intervals import Estimate


def number(value: float | None, digits: int = 3) -> str:
    """Returns a score or a loss as text: fewer decimals from ten on, none from a thousand on, "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    decimals = digits if abs(value) < 10 else max(digits - 1, 0)
    return _minus(f"{value:.{decimals}f}" if abs(value) < 1000 else f"{value:.0f}")


def points(value: float) -> str:
    """Returns percentage points as text: whole ones from ten on, one decimal below."""
    return _minus(f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.1f}")


def signed(value: float, decimals: int) -> str:
    """Returns a change with its sign; zero has none."""
    text = _minus(f"{value:.{decimals}f}")
    return text if text.startswith("−") or not float(text) else f"+{text}"


def count(value: float | None) -> str:
    """Returns a count of parameters to three digits, such as "1.20 M"."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{decimals}f} {letter}"
    return f"{value:.0f}"


def gap(value: float | None) -> str:
    """Returns a number of any size, such as an export gap or an importance, to two digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Returns a time span, such as "21.0 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def unit_words(unit: str) -> str:
    """Returns a unit as it is written."""
    return "nats/token" if unit == "nats" else unit


def loss_text(value: float, nats: bool) -> str:
    """Returns a loss with its unit: nats per token, or points."""
    return f"{number(value)} nats/token" if nats else f"{points(value)} points"


def change_text(value: float, nats: bool) -> str:
    """Returns the change of a score with its sign and unit: nats per token, or points."""
    return f"{signed(value, 3)} nats/token" if nats else f"{signed(100 * value, 1)} points"


def estimate_text(estimate: Estimate) -> str:
    """Returns a mean, and in brackets its interval where there is one."""
    if not estimate.has_interval:
        return number(estimate.mean)
    return f"{number(estimate.mean)} [{number(estimate.low)}, {number(estimate.high)}]"


def interval_text(low: float | None, high: float | None, nats: bool) -> str:
    """Returns the interval of a change of a score in brackets: nats per token or points; empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    factor, decimals = (1, 3) if nats else (100, 1)
    return f"[{signed(factor * low, decimals)}, {signed(factor * high, decimals)}]"


def axis_value(value: Any) -> str:
    """Returns the value of a grid's axis as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if is_number else short(str(value), 16)


def option_text(value: object) -> str:
    """Returns the value of an option as text: a list spaced, "–" for none."""
    if isinstance(value, list | tuple):
        return " ".join(map(option_text, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def set_options(options: Mapping[str, Any]) -> str:
    """Returns the options that are set as text, "–" where there are none."""
    return "; ".join(f"{key} {value}" for key, value in options.items() if value is not None) or "–"


def listing(items: Sequence[str]) -> str:
    """Returns words joined with commas and a final "and"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def short(text: str, most: int = 30) -> str:
    """Returns a name of at most so many characters, its end cut off."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown(text: str) -> str:
    """Returns a text that stays inside its Markdown cell, without markup."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")
    return " ".join(safe.split())


def ends(numbers: Mapping[str, Any] | None) -> tuple[float, float]:
    """Returns the interval of a record with ``low`` and ``high``; NaN where there is none."""
    low, high = ((numbers or {}).get(key) for key in ("low", "high"))
    return (math.nan, math.nan) if low is None or high is None else (float(low), float(high))


def _minus(text: str) -> str:
    """Returns a number with a real minus sign, and no negative zero."""
    bare = text.lstrip("-")
    return bare if not float(bare) else text.replace("-", "−")
