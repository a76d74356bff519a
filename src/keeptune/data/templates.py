r"""Templates such as ``"{question}\nAnswer:"``, filled from rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.core.errors import DataError
from keeptune.data.sources import Row

_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)\}")


def render(template: str, row: Row, *, where: str) -> str:
    r"""Returns a template filled with the fields of one row; ``where`` is its file and line, for error messages.

    Places are ``{field}``, or ``{turns.0.text}`` inside lists and objects; any other brace is literal, so code and JSON
    need no escapes.

    Raises:
        DataError: The row lacks a field that the template names.

    >>> render("{q}\nAnswer:", {"q": "Where?"}, where="x")
    'Where?\nAnswer:'
    >>> render("{turns.0.text}", {"turns": [{"text": "Where?"}]}, where="x")
    'Where?'
    """
    return _FIELD.sub(lambda match: str(_field(match.group(1), row, where)), template)


def render_all(template: str, rows: Sequence[Row], *, where: str) -> tuple[str, ...]:
    """Returns a template filled with each of some rows, as :func:`render` does."""
    return tuple(render(template, row, where=f"{where} row {number}") for number, row in enumerate(rows, start=1))


def pick(template: str, row: Row, *, where: str) -> Any:
    """Returns as :func:`render` does, but of a template that is one bare field the field's own value.

    >>> pick("{choices}", {"choices": ["a", "b"]}, where="x")
    ['a', 'b']
    """
    match = _FIELD.fullmatch(template)
    return _field(match.group(1), row, where) if match else render(template, row, where=where)


def _field(name: str, row: Row, where: str) -> Any:
    if name in row or "." not in name:
        return _part(row, name, where, name)
    value: Any = row
    for part in name.split("."):
        value = _part(value, part, where, name)
    return value


def _part(value: Any, part: str, where: str, name: str) -> Any:
    if isinstance(value, Mapping) and part in value:
        return value[part]
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    held = f"fields {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    if isinstance(value, list):
        held = f"a list of {len(value)}"
    raise DataError(
        where,
        got=held if part == name else f'{held} where "{part}" is looked for',
        wanted=f'the field "{name}" that the template names',
        next_step="Rename the field in the template or in the data.",
    )
