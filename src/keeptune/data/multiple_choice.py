"""Questions with choices, such as MMLU's, as prompts, and draws of rows by subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keeptune.core.errors import DataError
from keeptune.data.examples import draw_rows
from keeptune.data.sources import Row
from keeptune.data.templates import pick, text_of

# LoKI's, on MMLU (its releases end it with a space and a line break).
LOKI_PROMPT = (
    "There is a single choice question about {subject_title}. Answer the question by replying {letters}.\n"
    "Question: {question}\nChoices:\n{options}\nAnswer: \n"
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choose_rows(rows: Sequence[Row], count: int, *, by: str | None, seed: int | None, where: str) -> list[Row]:
    """Returns ``count`` rows of the file, or of each value of a field such as ``subject``, in file order.

    All, where there are fewer; else the first, or those that a seed draws: a smaller draw is part of a larger one.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        place = f"{where} row {index + 1}"
        value = "" if by is None else text_of(pick(f"{{{by}}}", row, where=place), where=place)
        groups.setdefault(value, []).append(index)
    kept: list[int] = []
    for members in groups.values():
        kept += members[:count] if seed is None else [members[i] for i in draw_rows(len(members), count, seed)]
    return [rows[index] for index in sorted(kept)]


def lettered_rows(rows: Sequence[Row], choices: str, *, where: str) -> list[Row]:
    r"""Returns rows with the fields that prompts of questions with choices name, before their own of these names.

    ``options`` are the choices, each after its letter, a line each; ``letters`` names the letters; ``letter`` is that
    of the right choice, from the field ``answer`` (a letter, an index from 0, or the choice itself); ``subject_title``
    is ``subject`` as a title. ``choices`` names the field that holds the list of choices.

    Raises:
        DataError: A row has no list of choices, or an answer that is none of them.

    >>> row = {"choices": ["one", "two"], "answer": 1, "subject": "abstract_algebra"}
    >>> made = lettered_rows([row], "{choices}", where="x")[0]
    >>> made["options"], made["letters"], made["letter"], made["subject_title"]
    ('A. one\nB. two', 'A or B', 'B', 'Abstract Algebra')
    """
    return [_lettered(row, choices, f"{where} row {number}") for number, row in enumerate(rows, start=1)]


def _lettered(row: Row, choices: str, where: str) -> Row:
    listed = pick(choices, row, where=where)
    if not isinstance(listed, list) or not 2 <= len(listed) <= len(_LETTERS):
        raise DataError(
            f"{where} choices",
            got=f"{listed!r}",
            wanted="a list of 2 to 26 choices",
            next_step='Name the field that holds them, alone: choices: "{choices}".',
        )
    texts, letters = [text_of(choice, where=f"{where} choices") for choice in listed], _LETTERS[: len(listed)]
    more: dict[str, Any] = {
        "options": "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)),
        "letters": f"{', '.join(letters[:-1])} or {letters[-1]}",
    }
    if "answer" in row:
        more["letter"] = _right(row["answer"], texts, letters, where)
    if "subject" in row:
        more["subject_title"] = text_of(row["subject"], where=f"{where} subject").replace("_", " ").title()
    return {**row, **more}


def _right(answer: Any, texts: Sequence[str], letters: str, where: str) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    if isinstance(answer, str) and texts.count(answer) == 1:
        return letters[texts.index(answer)]
    raise DataError(
        f"{where} answer",
        got=f"{answer!r}",
        wanted=f"one of {letters}, an index from 0 to {len(letters) - 1}, or one of the choices",
        next_step="Correct the row, or give `prompt` and `completion` of your own.",
    )
