"""Benchmarks of a recipe's ``evaluate`` list, and the items they read from JSONL files."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from keeptune.core.errors import DataError, RecipeError, nearest
from keeptune.data.labelled import label_of, score_of, texts_of
from keeptune.data.sources import Row, read_jsonl
from keeptune.data.templates import pick, render

__all__ = ["LABELS", "SCORES", "Benchmark", "Item", "Measure", "Metric", "Normalisation", "Role", "load_items"]

Metric = Literal["exact_match", "multiple_choice", "cross_entropy", "accuracy", "f1", "matthews", "pearson", "spearman"]
# What results may be in: the metrics above, and those of standard benchmarks.
Measure = Metric | Literal["accuracy_norm", "pass_at_1", "prompts_followed", "instructions_followed"]
LABELS = ("accuracy", "f1", "matthews")  # of a classifier's labels
SCORES = ("pearson", "spearman")  # of a regression's scores
Role = Literal["knowledge", "task"]
Normalisation = Literal["qa", "exact"]

_TEMPLATES = ("prompt", "answer", "choices", "text", "text_pair")
_NEEDED: dict[str, tuple[str, ...]] = {
    "exact_match": ("prompt", "answer"),
    "multiple_choice": ("prompt", "choices", "answer"),
    "cross_entropy": ("text",),
    **dict.fromkeys((*LABELS, *SCORES), ("text", "answer")),
}
_EXAMPLES = {
    "exact_match": 'prompt: "{question}\\nAnswer:", answer: "{answer}"',
    "multiple_choice": 'prompt: "{question}\\nAnswer:", choices: "{choices}", answer: "{label}"',
    "cross_entropy": 'text: "{text}"',
    **dict.fromkeys((*LABELS, *SCORES), 'text: "{sentence}", answer: "{label}"'),
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    r"""One benchmark: a JSONL file, templates that turn a row into an item, and a metric.

    Args:
        name: Names the benchmark in reports.
        role: ``"knowledge"`` is what should be kept, ``"task"`` is what should be learnt.
        file: JSONL file; a relative path is taken from the recipe's folder.
        metric: ``exact_match`` generates an answer; ``multiple_choice`` compares the log-likelihoods of
            given answers; ``cross_entropy`` is in nats per token. Of a classifier ``accuracy``, ``f1`` (of the second
            of two labels, as GLUE has it; of more labels the mean over labels) and ``matthews``; of a regression
            ``pearson`` and ``spearman``.
        prompt: Template of the text before the answer (exact_match, multiple_choice).
        answer: Template of the right answer. For exact_match a string or a list of accepted strings; for
            multiple_choice the choice's index from 0, its letter, its own text, or its label where the
            choices have labels. A whole file is read in one of these ways. Of a classifier the label or the score.
        choices: Template of the choices: a list, or ``{"text": [...], "label": [...]}``.
        text: Template of a document (cross_entropy), or of what a classifier reads.
        text_pair: Template of the other text, where a classifier reads pairs.
        examples: Number of rows from the top of the file; None takes them all.
        max_length: Tokens. Documents are cut to their first ``max_length`` tokens, prompts to their last;
            a model with fewer positions lowers the limit.
        max_new_tokens: Tokens generated at most (exact_match).
        batch_size: Sequences per forward pass at most. It changes scores by rounding only.
        group: Field that splits the result, where rows have it.
        stop: A generated text ends before the first of these (exact_match).
        normalise: ``"qa"`` compares answers without case, punctuation and articles; ``"exact"`` as they are,
            but for white space at the ends.

    Raises:
        RecipeError: The fields do not fit the metric, or a value is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    role: Role
    file: str
    metric: Metric
    prompt: str | None = None
    answer: str | None = None
    choices: str | None = None
    text: str | None = None
    text_pair: str | None = None
    examples: int | None = None
    max_length: int = 1024
    max_new_tokens: int = 32
    batch_size: int = 64
    group: str | None = "relation"
    stop: tuple[str, ...] = ("\n",)
    normalise: Normalisation = "qa"

    def __post_init__(self) -> None:
        self._check_words()
        self._check_role()
        self._check_templates()
        self._check_numbers()

    @property
    def where(self) -> str:
        """The recipe key, for error messages."""
        return f"evaluate.{self.name}"

    def _check_words(self) -> None:
        known: dict[str, tuple[str, ...]] = {
            "metric": get_args(Metric),
            "role": get_args(Role),
            "normalise": get_args(Normalisation),
        }
        for field, words in known.items():
            value = getattr(self, field)
            if value not in words:
                raise RecipeError(
                    f"{self.where}.{field}",
                    got=repr(value),
                    wanted=" or ".join(words),
                    next_step=nearest(str(value), words),
                )

    def _check_role(self) -> None:
        if self.role == "knowledge" and self.metric in (*LABELS, *SCORES):
            raise RecipeError(
                f"{self.where}.role",
                got=f"knowledge, measured by {self.metric}",
                wanted="role: task",
                next_step="A classifier's head answers for its own task only; what the encoder keeps is not measured.",
            )

    def _check_templates(self) -> None:
        needed = _NEEDED[self.metric]
        for field in _TEMPLATES:
            given = getattr(self, field) is not None
            optional = field == "text_pair" and self.metric in (*LABELS, *SCORES)
            if given == (field in needed) or optional:
                continue
            wrong = f'"{field}", which it does not use' if given else f'no "{field}"'
            raise RecipeError(
                self.where,
                got=f"metric {self.metric} with {wrong}",
                wanted=f"the fields {', '.join(needed)}",
                next_step=f"Write for example {_EXAMPLES[self.metric]}.",
            )

    def _check_numbers(self) -> None:
        for field, least in (
            ("examples", 1),
            ("max_length", 2),
            ("max_new_tokens", 1),
            ("batch_size", 1),
        ):
            value = getattr(self, field)
            if value is not None and value < least:
                raise RecipeError(
                    f"{self.where}.{field}",
                    got=str(value),
                    wanted=f"at least {least}",
                    next_step=f"Raise {field}, or leave it out.",
                )
        if "" in self.stop:
            raise RecipeError(
                f"{self.where}.stop",
                got='the empty string ""',
                wanted="texts of one character or more",
                next_step="Leave the empty string out; it would end every answer before it begins.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question or document.

    Args:
        index: Position of the row in the file, from 0.
        prompt: Text before the answer; empty for documents.
        answers: Accepted answers (exact_match).
        choices: Texts to choose from (multiple_choice).
        label: Index of the right choice; None where there are no choices.
        text: The document (cross_entropy), or what a classifier reads.
        text_pair: The other text of a pair.
        score: The right score (pearson, spearman).
        group: Value of the benchmark's group field, if the row has it.
    """

    index: int
    prompt: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    label: int | None = None
    text: str = ""
    text_pair: str | None = None
    score: float | None = None
    group: str | None = None


def load_items(benchmark: Benchmark, folder: Path) -> list[Item]:
    """Read a benchmark's file.

    Args:
        benchmark: The benchmark.
        folder: The folder that relative paths start from.

    Returns:
        One item per row, in file order.

    Raises:
        DataError: The file cannot be read, a row lacks a field, or an answer does not fit.
    """
    path = folder / benchmark.file
    rows = read_jsonl(path, where=f"{benchmark.where}.file")[: benchmark.examples]
    places = [f"{benchmark.where} {path} row {number}" for number in range(1, len(rows) + 1)]
    readers: dict[str, Callable[[Benchmark, Sequence[Row], Sequence[str]], list[Item]]] = {
        "exact_match": _questions,
        "multiple_choice": _choices,
        "cross_entropy": _documents,
        **dict.fromkeys((*LABELS, *SCORES), _labelled),
    }
    return readers[benchmark.metric](benchmark, rows, places)


def _questions(benchmark: Benchmark, rows: Sequence[Row], places: Sequence[str]) -> list[Item]:
    return [
        Item(
            index=index,
            prompt=render(benchmark.prompt or "", row, where=place),
            answers=_texts(pick(benchmark.answer or "", row, where=place), f"{place} answer"),
            group=_group(benchmark, row),
        )
        for index, (row, place) in enumerate(zip(rows, places, strict=True))
    ]


def _documents(benchmark: Benchmark, rows: Sequence[Row], places: Sequence[str]) -> list[Item]:
    items = []
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        text = render(benchmark.text or "", row, where=place)
        if not text.strip():
            raise DataError(
                place,
                got="an empty document",
                wanted="text",
                next_step="Fill the row or remove it.",
            )
        items.append(Item(index=index, text=text, group=_group(benchmark, row)))
    return items


def _labelled(benchmark: Benchmark, rows: Sequence[Row], places: Sequence[str]) -> list[Item]:
    texts = texts_of(rows, text=benchmark.text or "", text_pair=benchmark.text_pair, where=benchmark.where)
    seconds = texts.second or [None] * len(rows)
    answer, scored = benchmark.answer or "", benchmark.metric in SCORES
    return [
        Item(
            index=index,
            text=texts.first[index],
            text_pair=seconds[index],
            answers=() if scored else (label_of(row, answer, where=f"{place} answer"),),
            score=score_of(row, answer, where=f"{place} answer") if scored else None,
            group=_group(benchmark, row),
        )
        for index, (row, place) in enumerate(zip(rows, places, strict=True))
    ]


def _choices(benchmark: Benchmark, rows: Sequence[Row], places: Sequence[str]) -> list[Item]:
    listed = [
        _listed(pick(benchmark.choices or "", row, where=place), f"{place} choices")
        for row, place in zip(rows, places, strict=True)
    ]
    answers = [pick(benchmark.answer or "", row, where=place) for row, place in zip(rows, places, strict=True)]
    right = _right_choices(answers, listed, places)
    return [
        Item(
            index=index,
            prompt=render(benchmark.prompt or "", row, where=places[index]),
            choices=listed[index][0],
            label=right[index],
            group=_group(benchmark, row),
        )
        for index, row in enumerate(rows)
    ]


def _group(benchmark: Benchmark, row: Row) -> str | None:
    value = row.get(benchmark.group) if benchmark.group else None
    return None if value is None else str(value)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """Read a string, a number or a list of them as texts without white space at the ends."""
    values = value if isinstance(value, list) else [value]
    texts = tuple(str(entry).strip() for entry in values if _is_word(entry))
    if not texts or len(texts) < len(values) or not all(texts):
        raise DataError(
            where,
            got=repr(value),
            wanted="a text, or a list of texts, none of them empty",
            next_step="Mend the row, or name another field in the template.",
        )
    return texts


def _listed(value: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read the choices of one row: their texts, and their labels or an empty tuple."""
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


def _by_label(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    word = str(answer).strip()
    return labels.index(word) if _is_word(answer) and word in labels else None


def _by_index(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    word = str(answer).strip()
    digits = word.isascii() and word.isdecimal()
    return int(word) if _is_word(answer) and digits and int(word) < len(texts) else None


def _by_letter(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    letters = string.ascii_uppercase[: len(texts)]
    word = answer.strip().upper() if isinstance(answer, str) else ""
    return letters.index(word) if len(word) == 1 and word in letters else None


def _by_text(answer: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    # A JSON number is an index, so [4, 2, 1, 0] with the answer 1 means the choice 2.
    word = answer.strip() if isinstance(answer, str) else ""
    return texts.index(word) if word in texts else None


def _right_choices(
    answers: Sequence[Any],
    listed: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
    places: Sequence[str],
) -> list[int]:
    """Find the one reading of the answers that fits every row of the file.

    A row alone can be unclear (the letter "B" among the choices A, B, AB, O); the file as a whole rarely is.
    """
    readings = {
        "label": _by_label,
        "index from 0": _by_index,
        "letter": _by_letter,
        "text": _by_text,
    }
    found = {
        name: [read(answer, *entry) for answer, entry in zip(answers, listed, strict=True)]
        for name, read in readings.items()
    }
    fitting: dict[str, list[int]] = {}
    for name, labels in found.items():
        known = [label for label in labels if label is not None]
        if len(known) == len(answers):
            fitting[name] = known
    if not fitting:
        best = max(
            found.values(),
            key=lambda labels: sum(label is not None for label in labels),
        )
        row = best.index(None)
        raise DataError(
            f"{places[row]} answer",
            got=f"{answers[row]!r} for the choices {list(listed[row][0])}",
            wanted="the index (from 0), letter, label or text of one choice, in the same way in every row",
            next_step="Mend the row, or name another field in the template.",
        )
    name, chosen = next(iter(fitting.items()))
    for other, rival in fitting.items():
        # Labels that came with the choices were written to be matched, so they settle the matter.
        differing = [] if name == "label" else [i for i, label in enumerate(rival) if label != chosen[i]]
        if differing:
            raise DataError(
                f"{places[differing[0]]} answer",
                got=f"{answers[differing[0]]!r}, which as {name} and as {other} means different choices",
                wanted="answers that can be read in one way only",
                next_step="Write the answer as a JSON number, the choice's index from 0.",
            )
    return chosen
