"""Read typed values out of parsed JSON, naming the place when one is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

from keeptune.core.errors import ArtefactError

__all__ = [
    "fail",
    "integer",
    "mapping",
    "need",
    "numbers",
    "optional_integer",
    "optional_text",
    "score",
    "sequence",
    "value",
]


def numbers(item: object, where: str) -> dict[str, float]:
    """Read a mapping of numbers, leaving out what is null.

    Args:
        item: The raw mapping.
        where: Its place in the file.

    Returns:
        The numbers by name.
    """
    found = {str(key): value(entry, f"{where}.{key}") for key, entry in mapping(item, where).items()}
    return {key: number for key, number in found.items() if math.isfinite(number)}


def value(item: object, where: str) -> float:
    """Read a number; null becomes NaN.

    Args:
        item: The raw value.
        where: Its place in the file.

    Returns:
        The number.
    """
    if item is None:
        return math.nan
    if isinstance(item, bool) or not isinstance(item, int | float):
        fail(where, f"{item!r}", "a number")
    return float(item)


def score(item: object, where: str) -> float | None:
    """Read a number that may be null.

    Args:
        item: The raw value.
        where: Its place in the file.

    Returns:
        The number, or None when it is null or not finite.
    """
    found = value(item, where)
    return found if math.isfinite(found) else None


def integer(item: object, where: str) -> int:
    """Read a whole number.

    Args:
        item: The raw value.
        where: Its place in the file.

    Returns:
        The number.
    """
    found = value(item, where)
    if not math.isfinite(found) or found != int(found):
        fail(where, f"{item!r}", "a whole number")
    return int(found)


def optional_integer(item: object, where: str) -> int | None:
    """Read a whole number that may be null.

    Args:
        item: The raw value.
        where: Its place in the file.

    Returns:
        The number or None.
    """
    return None if item is None else integer(item, where)


def optional_text(item: object) -> str | None:
    """Turn a value into text unless it is null.

    Args:
        item: The raw value.

    Returns:
        The text or None.
    """
    return None if item is None else str(item)


def need(entry: Mapping[str, object], key: str, where: str) -> object:
    """Take a required key.

    Args:
        entry: The mapping to look in.
        key: The required key.
        where: The mapping's place in the file.

    Returns:
        The value, which may be null.
    """
    if key not in entry:
        fail(where, f'no key "{key}"', f'the key "{key}"')
    return entry[key]


def mapping(item: object, where: str) -> Mapping[str, object]:
    """Insist on a mapping.

    Args:
        item: The raw value.
        where: Its place in the file.

    Returns:
        The mapping.
    """
    if not isinstance(item, Mapping):
        fail(where, type(item).__name__, "a mapping")
    return item


def sequence(item: object, where: str) -> Sequence[object]:
    """Insist on a list.

    Args:
        item: The raw value.
        where: Its place in the file.

    Returns:
        The list.
    """
    if not isinstance(item, list | tuple):
        fail(where, type(item).__name__, "a list")
    return item


def fail(where: str, got: str, wanted: str) -> NoReturn:
    """Raise the error for a malformed report.

    Args:
        where: The place in the file.
        got: What was found.
        wanted: What would have been right.

    Raises:
        ArtefactError: Always.
    """
    step = "Run the comparison again, or mend the file by hand."
    raise ArtefactError(where, got=got, wanted=wanted, next_step=step)
