"""The items of a benchmark in a JSONL file: questions, choices, documents, or texts for a classifier."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keeptune.core.errors import DataError
from keeptune.data.examples import Conversation
from keeptune.data.formats import FormatOptions, messages_of
from keeptune.data.labelled import Texts, label_of, score_of, texts_of
from keeptune.data.preferences import Preferences, plain, preferences
from keeptune.data.sources import Row, pick, read_jsonl, refuse_empty, render
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.metrics import PAIRS, SCORES

_Choices = tuple[tuple[str, ...], tuple[str, ...]]  # texts, and labels or an empty tuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question or document; ``index`` is the position of its row in the file, from 0."""

    index: int
    prompt: str = ""  # text before the answer
    answers: tuple[str, ...] = ()  # accepted answers (exact_match), or the right label of a classifier
    choices: tuple[str, ...] = ()  # to choose from (multiple_choice)
    label: int | None = None  # index of the right choice
    text: str = ""  # the document (cross_entropy), or what a classifier reads
    text_pair: str | None = None
    score: float | None = None  # the right one (pearson, spearman)
    pairs: Preferences | None = None  # of all items, prompts and answers as they are given, the better one first
    group: str | None = None  # value of the benchmark's group field
    chat: Conversation | None = None  # what is asked through the chat template; of a cross-entropy with its answer

    @property
    def whole(self) -> str:
        """All that the model reads before its answer, as task data have it (:attr:`Texts.whole`)."""
        if self.score is not None or (self.text and self.answers):
            return Texts((self.text,), None if self.text_pair is None else (self.text_pair,)).whole[0]
        return self.prompt or self.text


def load_items(benchmark: FileBenchmark, folder: Path) -> list[Item]:
    """Reads a benchmark's file: one item per row, in file order.

    Raises:
        DataError: The file cannot be read, a row lacks a field, or an answer does not fit.
    """
    path = folder / benchmark.file
    rows = read_jsonl(path, where=f"{benchmark.where}.file")[: benchmark.examples]
    places = [f"{benchmark.where} {path} row {number}" for number in range(1, len(rows) + 1)]
    read = {
        "exact_match": _questions,
        "multiple_choice": _multiple_choices,
        "cross_entropy": _documents,
        **dict.fromkeys(PAIRS, _pairs),
    }.get(benchmark.metric, _labelled)
    group = benchmark.group or ""
    return [
        Item(index=index, group=None if row.get(group) is None else str(row[group]), **fields)
        for index, (row, fields) in enumerate(zip(rows, read(benchmark, rows, places), strict=True))
    ]


def _questions(benchmark: FileBenchmark, rows: Sequence[Row], places: Sequence[str]) -> list[dict[str, Any]]:
    items = []
    for row, place in zip(rows, places, strict=True):
        item = _asked(benchmark, row, place)
        own = item.pop("own")
        right = own.get("content") if benchmark.answer is None else pick(benchmark.answer, row, where=place)
        items.append(item | {"answers": _texts(right, f"{place} answer")})
    return items


def _asked(benchmark: FileBenchmark, row: Row, place: str) -> dict[str, Any]:
    if benchmark.messages is None:
        prompt = render(benchmark.prompt or "", row, where=place)
        chat = Conversation(({"role": "user", "content": prompt},)) if benchmark.chat else None
        return {"prompt": prompt, "chat": chat, "own": {}}
    messages = messages_of(pick(benchmark.messages, row, where=place), FormatOptions(), where=place)
    own: Mapping[str, Any] = {}
    if messages[-1]["role"] == "assistant":
        own, messages = messages[-1], messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError(
            place,
            got="messages in which nothing is asked before the last answer",
            wanted="a turn of the user",
            next_step="Correct the row.",
        )
    return {
        "prompt": "\n".join(str(message["content"] or "") for message in messages),
        "chat": Conversation(messages, tuple(row.get("tools") or ()) or None),
        "own": own,
    }


def _documents(benchmark: FileBenchmark, rows: Sequence[Row], places: Sequence[str]) -> list[dict[str, Any]]:
    if benchmark.messages is not None:
        items = [_asked(benchmark, row, place) for row, place in zip(rows, places, strict=True)]
        for item, place in zip(items, places, strict=True):
            answer = item.pop("own")
            if not answer.get("tool_calls"):
                _texts(answer.get("content"), f"{place} last answer")
            item["chat"] = replace(item["chat"], messages=(*item["chat"].messages, answer))
        return items
    texts = [render(benchmark.text or "", row, where=place) for row, place in zip(rows, places, strict=True)]
    refuse_empty(texts, places[0].removesuffix(" row 1"), "document")
    return [{"text": text} for text in texts]


def _labelled(benchmark: FileBenchmark, rows: Sequence[Row], places: Sequence[str]) -> list[dict[str, Any]]:
    texts = texts_of(rows, text=benchmark.text or "", text_pair=benchmark.text_pair, where=benchmark.where)
    placed = zip(texts.first, texts.second or [None] * len(rows), rows, places, strict=True)
    answer, scored = benchmark.answer or "", benchmark.metric in SCORES
    return [
        {"text": first, "text_pair": second}
        | ({"score": score_of(row, answer, where=f"{place} answer")} if scored else {})
        | ({} if scored else {"answers": (label_of(row, answer, where=f"{place} answer"),)})
        for first, second, row, place in placed
    ]


def _multiple_choices(benchmark: FileBenchmark, rows: Sequence[Row], places: Sequence[str]) -> list[dict[str, Any]]:
    placed = list(zip(rows, places, strict=True))
    listed = [_listed(pick(benchmark.choices or "", row, where=place), f"{place} choices") for row, place in placed]
    answers = [pick(benchmark.answer or "", row, where=place) for row, place in placed]
    right = _right_choices(answers, listed, places)
    return [
        {k: v for k, v in _asked(benchmark, row, place).items() if k != "own"} | {"choices": choices[0], "label": label}
        for (row, place), choices, label in zip(placed, listed, right, strict=True)
    ]


def _pairs(benchmark: FileBenchmark, rows: Sequence[Row], places: Sequence[str]) -> list[dict[str, Any]]:
    answers = [benchmark.chosen or "{chosen}", benchmark.rejected or "{rejected}"]
    where = places[0].removesuffix(" row 1")
    pairs = preferences(rows, prompt=benchmark.prompt, answers=answers, where=where)
    if len(pairs) < len(rows):
        number = f"{len(rows) - len(pairs)} pairs with equal answers"
        raise DataError(where, got=number, wanted="pairs of which one answer is better", next_step="Remove these rows.")
    texts = [(plain(prompt), tuple(map(plain, own))) for prompt, own in zip(pairs.prompts, pairs.answers, strict=True)]
    return [{"prompt": prompt, "choices": choices, "label": 0, "pairs": pairs} for prompt, choices in texts]


def _texts(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    texts = tuple(str(entry).strip() for entry in values if _is_word(entry))
    if not texts or len(texts) < len(values) or not all(texts):
        raise DataError(
            where,
            got=repr(value),
            wanted="a text, or a list of texts, none of them empty",
            next_step="Correct the row, or name another field in the template.",
        )
    return texts


def _listed(value: Any, where: str) -> _Choices:
    labelled = isinstance(value, dict) and set(value) == {"text", "label"}
    entries = value["text"] if labelled else value
    texts = _texts(entries, where) if isinstance(entries, list) else ()
    labels = _texts(value["label"], where) if labelled else ()
    if len(texts) < 2 or (labelled and len(labels) != len(texts)):
        raise DataError(
            where,
            got=repr(value),
            wanted='two texts or more: a list, or {"text": [...], "label": [...]} of one length',
            next_step='Name the field that holds them, alone: choices: "{choices}".',
        )
    return texts, labels


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _readings(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> dict[str, int | None]:
    word = str(answer).strip() if _is_word(answer) else ""
    # A JSON number is an index, so [4, 2, 1, 0] with the answer 1 means the choice 2.
    text = answer.strip() if isinstance(answer, str) else ""
    letter, letters = text.upper(), string.ascii_uppercase[: len(texts)]
    is_index = word.isascii() and word.isdecimal() and int(word) < len(texts)
    return {
        "label": labels.index(word) if word in labels else None,
        "index from 0": int(word) if is_index else None,
        "letter": letters.index(letter) if len(letter) == 1 and letter in letters else None,
        "text": texts.index(text) if text in texts else None,
    }


def _right_choices(answers: Sequence[Any], listed: Sequence[_Choices], places: Sequence[str]) -> list[int]:
    """Reads all rows in one way: a row alone can be unclear (the letter "B" among A, B, AB, O), a file rarely is."""
    rows = [_readings(answer, *choices) for answer, choices in zip(answers, listed, strict=True)]
    readings: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    fitting = {name: labels for name, labels in readings.items() if None not in labels}
    if not fitting:
        best = max(readings.values(), key=lambda labels: sum(label is not None for label in labels))
        row = best.index(None)
        raise DataError(
            f"{places[row]} answer",
            got=f"{answers[row]!r} for the choices {list(listed[row][0])}",
            wanted="the index (from 0), letter, label or text of one choice, in the same way in every row",
            next_step="Correct the row, or name another field in the template.",
        )
    name, chosen = next(iter(fitting.items()))
    for other, rival in fitting.items():
        # Labels that came with the choices were written to be matched, so they decide.
        differing = [] if name == "label" else [i for i, label in enumerate(rival) if label != chosen[i]]
        if differing:
            raise DataError(
                f"{places[differing[0]]} answer",
                got=f"{answers[differing[0]]!r}, which as {name} and as {other} means different choices",
                wanted="answers that can be read in one way only",
                next_step="Write the answer as a JSON number, the choice's index from 0.",
            )
    return chosen
