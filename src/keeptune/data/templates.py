r"""Templates such as ``"{question}\nAnswer:"``, filled from rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keeptune.core.errors import DataError
from keeptune.data.sources import Row

# What stands between braces without line breaks may be a column of any name, "Question Text" too.
_BRACES = re.compile(r"\{([^{}\n]+)\}")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
_PATH = re.compile(r"([^.]+)(?:\.\w+)+")


def render(template: str, row: Row, *, where: str) -> str:
    r"""Returns a template filled with the fields of one row; ``where`` is its file and line, for error messages.

    Places are ``{field}``, or ``{turns.0.text}`` inside lists and objects; any other brace is literal, so code and JSON
    need no escapes.

    Raises:
        DataError: The row lacks a field that the template names or nearly names, or holds no text there.

    >>> render("{q}\nAnswer:", {"q": "Where?"}, where="x")
    'Where?\nAnswer:'
    >>> render("{turns.0.text}", {"turns": [{"text": "Where?"}]}, where="x")
    'Where?'
    >>> render("{Question Text} {b: 1}", {"Question Text": True}, where="x")
    'true {b: 1}'
    """

    def fill(match: re.Match[str]) -> str:
        name, (start, end) = match.group(1), match.span()
        if not _is_place(name, row, where):
            return match.group()
        if template[start - 1 : start] == "{" and template[end : end + 1] == "}":
            raise _misspelt(f"{{{{{name}}}}}", name, where)
        return text_of(_field(name, row, where), where=f'{where}, field "{name}"')

    return _BRACES.sub(fill, template)


def render_all(template: str, rows: Sequence[Row], *, where: str) -> tuple[str, ...]:
    """Returns a template filled with each of some rows, as :func:`render` does; one with braces must name a field."""
    texts = tuple(render(template, row, where=f"{where} row {number}") for number, row in enumerate(rows, start=1))
    if "{" in template and all(text == template for text in texts):
        raise DataError(
            where,
            got=f'the template "{template}", which names no field',
            wanted=f"one or more of {', '.join(f'{{{name}}}' for name in rows[0])}",
            next_step="Correct the template.",
        )
    return texts


def pick(template: str, row: Row, *, where: str) -> Any:
    """Returns as :func:`render` does, but of a template that is one bare field the field's own value.

    >>> pick("{choices}", {"choices": ["a", "b"]}, where="x")
    ['a', 'b']
    """
    match = _BRACES.fullmatch(template)
    if match and _is_place(match.group(1), row, where):
        return _field(match.group(1), row, where)
    return render(template, row, where=where)


def text_of(value: Any, *, where: str) -> str:
    """Returns a value as text, numbers and truth values as JSON writes them.

    Raises:
        DataError: It is null, a list, an object, or a number that JSON has not.

    >>> text_of("a", where="x"), text_of(True, where="x"), text_of(1.0, where="x")
    ('a', 'true', '1.0')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    inside = isinstance(value, Mapping | list)
    raise DataError(
        where,
        got="null" if value is None else f"a {type(value).__name__}" if inside else f"{value}",
        wanted="text, a number, true or false",
        next_step="Name a part of it in the template, such as {turns.0.text}, or write it as text in the data."
        if inside
        else 'Fill the field, write "" for an empty text, or remove the row.',
    )


def refuse_empty(texts: Iterable[str], where: str, what: str = "text", unit: str = "row") -> None:
    """Raises DataError where a text is empty; ``what`` it is and its ``unit`` are for the message."""
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(
                f"{where} {unit} {number}",
                got=f"an empty {what}",
                wanted=f"a {what} that is not empty",
                next_step="Fill the row, remove it, or change the template.",
            )


def _is_place(name: str, row: Row, where: str) -> bool:
    """Returns whether braces hold a field; refuses a name that a column nearly has."""
    path = _PATH.fullmatch(name)
    if name in row or (path and path.group(1) in row) or _NAME.fullmatch(name):
        return True
    alike = next((column for column in row if _plain(column) == _plain(name)), None)
    if alike is not None:
        raise _misspelt(f"{{{name}}}", str(alike), where)
    return False


def _plain(name: object) -> str:
    return re.sub(r"[\W_]+", "", str(name)).casefold() or str(name)


def _misspelt(written: str, column: str, where: str) -> DataError:
    return DataError(
        where,
        got=f"{written} in the template",
        wanted=f'{{{column}}}, for the field "{column}"',
        next_step="Correct the template; braces that stand for themselves must not hold a field's name.",
    )


def _field(name: str, row: Row, where: str) -> Any:
    value: Any = row
    for part in [name] if name in row or "." not in name else name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            held = f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
            held = f"fields {', '.join(map(str, value))}" if isinstance(value, Mapping) else held
            raise DataError(
                where,
                got=held if part == name else f'{held} where "{part}" is looked for',
                wanted=f'the field "{name}" that the template names',
                next_step="Rename the field in the template or in the data.",
            )
    return value
