"""The exceptions that users see: where, what was got, what was wanted, what to do next."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_LONGEST = 1000
_UNPRINTED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what no terminal shows as it is


class KeeptuneError(Exception):
    """An error a user can act on; the command line prints it and exits with code 2.

    Args:
        where: The file, key or module concerned.
        got: What is there.
        wanted: What would have been right.
        next_step: One sentence that says what to do.
    """

    def __init__(self, where: str, *, got: str, wanted: str, next_step: str) -> None:
        self.where = where
        self.got = got
        self.wanted = wanted
        self.next_step = next_step
        super().__init__(f"{_short(where)}: got {_short(got)}, wanted {_short(wanted)}. {next_step}")

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), got=self.got, wanted=self.wanted, next_step=self.next_step), (self.where,)


def _short(text: str) -> str:
    text = _UNPRINTED.sub(lambda match: repr(match[0])[1:-1], text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


class RecipeError(KeeptuneError):
    """A recipe or command-line option is wrong."""


class DataError(KeeptuneError):
    """A data file is missing, malformed, empty or overlaps another."""


class ModelError(KeeptuneError):
    """A model folder cannot be used, or an adapter belongs to another base."""


class StatisticsError(KeeptuneError):
    """A statistic cannot be computed or was not requested."""


class PlanError(KeeptuneError):
    """A method's options do not fit the model."""


class TrainError(KeeptuneError):
    """Training cannot start or go on."""


class DeviceMemoryError(KeeptuneError):
    """A device, or the host, has no memory left."""


class ExportError(KeeptuneError):
    """An export does not reproduce the trained model."""


class ProcessError(KeeptuneError):
    """Processes that work together cannot start or go on."""


class ArtefactError(KeeptuneError):
    """A file of keeptune's own is damaged or cannot be written."""


def named(names: Sequence[str], most: int = 8) -> str:
    """Returns names in a row; of more than ``most``, the first ones and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns a sentence with the known name nearest to a misspelt one, in any case, and all known names.

    >>> nearest("metod", ["method", "model"])
    'Did you mean "method"? Known: method, model.'
    """
    known = sorted(choices)
    cased = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), cased, n=1, cutoff=0.5)
    listing = f"Known: {', '.join(known)}."
    return f'Did you mean "{cased[close[0]]}"? {listing}' if close else listing


def need_known(
    name: Any, known: Collection[str], where: str, wanted: str, error: type[KeeptuneError] = RecipeError
) -> None:
    """Raises an error where a name is not among those known; the message shows the nearest."""
    if name not in known:
        got = "nothing" if name is None else f'"{name}"'
        raise error(where, got=got, wanted=wanted, next_step=nearest(str(name or ""), known))


def not_there(where: str, kind: str, wanted: str, error: type[KeeptuneError]) -> KeeptuneError:
    """Returns the error to raise for a file or a folder that is not there."""
    advice = "Check the path; relative paths start at the current directory, then at the recipe's folder."
    return error(where, got=f"no such {kind}", wanted=wanted, next_step=advice)


def need_finite(finite: Any, where: str, what: str, error: type[KeeptuneError] = ModelError) -> None:
    """Raises an error unless all of a tensor of truth values is true; ``what`` is plural."""
    if not bool(finite.all()):
        advice = "Load the model in float32 or bfloat16, and check its weights and the losses of its training."
        raise error(where, got=f"NaN or infinite {what}", wanted="finite ones", next_step=advice)


def placed(where: str, do: Callable[[], T]) -> T:
    """Returns what a function returns; its errors name where it stands in a larger whole, such as a sweep."""
    try:
        return do()
    except KeeptuneError as error:
        if where in error.where:
            raise
        raise type(error)(
            f"{where}, {error.where}", got=error.got, wanted=error.wanted, next_step=error.next_step
        ) from error
