"""What a budgeted search draws from: an entry, a rate and a strength within the spans of its lists.

    rate      log-uniform between the least and the largest of the entry's rates                            (1)
    strength  log-uniform between the least and the largest of its factors, or of the values of the key that it
              names where all are positive numbers (whole numbers stay whole); else one of the listed ones  (2)

Numbers are rounded to three significant digits within their span, so that names are short and equal draws share a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.experiments.comparison.entries import Entry, Variation, by_factor, by_value, slug

__all__ = ["ENTRY", "Among", "Span", "dimensions", "draw", "rounded", "setting_of", "spans_of", "strengths_of"]

ENTRY = "entry"
_DIGITS = 3


@dataclass(frozen=True)
class Span:
    """Log-uniform between two positive numbers, both included.

    Args:
        low: The least.
        high: The largest, above ``low``.
        whole: Whether whole numbers alone are drawn.
    """

    low: float
    high: float
    whole: bool = False

    def __str__(self) -> str:
        """Write it for a table."""
        return f"{self.low:g} to {self.high:g}"

    def suggest(self, trial: Any, name: str) -> float:
        """Draw.

        Args:
            trial: Of Optuna.
            name: Of the parameter.

        Returns:
            The number.
        """
        if self.whole:
            return int(trial.suggest_int(name, int(self.low), int(self.high), log=True))
        return rounded(trial.suggest_float(name, self.low, self.high, log=True), self)

    def distribution(self) -> Any:
        """Describe it to Optuna.

        Returns:
            The distribution.
        """
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=True)
        return FloatDistribution(self.low, self.high, log=True)


@dataclass(frozen=True)
class Among:
    """One of several, each as likely.

    Args:
        choices: What is drawn from: labels, or places in a list.
    """

    choices: tuple[str | int, ...]

    def __str__(self) -> str:
        """Write it for a table."""
        return f"one of {len(self.choices)}"

    def suggest(self, trial: Any, name: str) -> str | int:
        """Draw.

        Args:
            trial: Of Optuna.
            name: Of the parameter.

        Returns:
            The choice.
        """
        found: str | int = trial.suggest_categorical(name, self.choices)
        return found

    def distribution(self) -> Any:
        """Describe it to Optuna.

        Returns:
            The distribution.
        """
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)


Dimension = Span | Among


def rounded(number: float, span: Span) -> float:
    """Round to three significant digits, within a span.

    Args:
        number: The number.
        span: The span.

    Returns:
        The rounded number.

    >>> rounded(0.00123456, Span(1e-4, 1e-2)), rounded(0.0012346, Span(1e-4, 0.00123461))
    (0.00123, 0.00123)
    >>> rounded(0.0056789, Span(0.0056788, 1e-2))
    0.00568
    """
    return min(max(float(f"{number:.{_DIGITS}g}"), span.low), span.high)


def strengths_of(variations: Sequence[Variation]) -> Dimension | None:
    """Say what strengths are drawn from (eq. 2).

    Args:
        variations: Those of an entry.

    Returns:
        The dimension; None where there is one strength alone.
    """
    if len(variations) == 1:
        return None
    values = _values(variations)
    if values is None or not all(_positive(value) for value in values):
        return Among(tuple(range(len(variations))))
    return Span(min(values), max(values), all(isinstance(value, int) for value in values))


def _values(variations: Sequence[Variation]) -> list[Any] | None:
    """List the factors, or the values of the one key that is varied; None where it is neither."""
    factors = [variation.factor for variation in variations]
    if all(factor is not None for factor in factors):
        return factors
    keys = {key for variation in variations for key in variation.settings}
    if len(keys) != 1:
        return None
    return [next(iter(variation.settings.values())) for variation in variations]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def spans_of(entry: Entry) -> dict[str, Dimension]:
    """Name what is drawn for an entry once it is chosen.

    Args:
        entry: The entry.

    Returns:
        Parameter to dimension; what has one value is not among them.
    """
    found: dict[str, Dimension] = {}
    if len(entry.rates) > 1:
        found[f"{slug(entry.label)}.rate"] = Span(min(entry.rates), max(entry.rates))
    strengths = strengths_of(entry.variations)
    if strengths is not None:
        found[f"{slug(entry.label)}.strength"] = strengths
    return found


def dimensions(entries: Sequence[Entry], label: str) -> dict[str, Dimension]:
    """Name what is drawn for a trial of an entry, the entry itself among it.

    Args:
        entries: The entries.
        label: Of the one.

    Returns:
        Parameter to dimension.
    """
    entry = next(entry for entry in entries if entry.label == label)
    return {ENTRY: Among(tuple(entry.label for entry in entries)), **spans_of(entry)}


def draw(trial: Any, entries: Sequence[Entry]) -> dict[str, Any]:
    """Draw an entry, and then its rate and strength.

    Args:
        trial: Of Optuna.
        entries: The entries.

    Returns:
        ``rate`` and ``strength`` (None where the entry has one), as :func:`setting_of` reads them beside the entry.
    """
    label = Among(tuple(entry.label for entry in entries)).suggest(trial, ENTRY)
    entry = next(entry for entry in entries if entry.label == label)
    drawn = {name.rpartition(".")[2]: span.suggest(trial, name) for name, span in spans_of(entry).items()}
    return {"rate": drawn.get("rate", entry.rates[0]), "strength": drawn.get("strength")}


def setting_of(entries: Sequence[Entry], drawn: Mapping[str, Any]) -> tuple[Entry, Variation, float]:
    """Read what was drawn.

    Args:
        entries: The entries.
        drawn: ``entry``, ``rate`` and ``strength``.

    Returns:
        The entry, its strength and the rate.

    Raises:
        RecipeError: The strength does not fit the method.
    """
    entry = next(entry for entry in entries if entry.label == drawn[ENTRY])
    strengths, value = strengths_of(entry.variations), drawn["strength"]
    if strengths is None:
        variation = entry.variations[0]
    elif isinstance(strengths, Among):
        variation = entry.variations[value]
    elif entry.variations[0].factor is not None:
        variation = by_factor(entry.settings["method"], value)
    else:
        variation = by_value(next(iter(entry.variations[0].settings)), value)
    return entry, variation, float(drawn["rate"])
