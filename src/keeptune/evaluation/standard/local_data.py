"""Items of standard benchmarks from local JSONL files, in the form that lm-eval's task expects of the hub's data.

A row may have the hub's own fields, or the form in which a benchmark is published elsewhere: HumanEval, MBPP, GSM8K,
IFEval, NQ-open by their authors, WebQuestions with ``answers``, MMLU with its subject and the answer's letter, and
ARC, BoolQ and OpenBookQA in the instruction form of LLM-Adapters (Hu et al., EMNLP 2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.core.errors import DataError
from keeptune.data.sources import Row, read_jsonl

__all__ = ["SPLITS", "files_of", "local_rows", "subjects_of"]

_LETTERS = "ABCDEFGH"
_ASKED = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: (\S+)\Z", re.DOTALL
)
_ASKED_TRUE = re.compile(
    r"Please answer the following question with true or false, question: (.*)\n\nAnswer format: true/false\Z",
    re.DOTALL,
)
# Of each benchmark, the split of lm-eval's task and the names of files that hold it, the first that is there counts.
SPLITS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "nq_open": {"validation": ("validation.jsonl", "dev.jsonl"), "train": ("train.jsonl",)},
    "efficientqa": {"validation": ("efficientqa_dev.jsonl",), "train": ("train.jsonl",)},
    "mmlu": {"test": ("test.jsonl", "test_*.jsonl"), "dev": ("dev.jsonl",)},
    "arc_easy": {
        "test": ("ARC-Easy.test.jsonl", "test.jsonl"),
        "train": ("ARC-Easy.train.jsonl", "train.jsonl"),
    },
    "arc_challenge": {
        "test": ("ARC-Challenge.test.jsonl", "test.jsonl"),
        "train": ("ARC-Challenge.train.jsonl", "train.jsonl"),
    },
    "boolq": {
        "validation": ("boolq.test.jsonl", "validation.jsonl", "dev.jsonl"),
        "train": ("boolq.train.jsonl", "train.jsonl"),
    },
    "openbookqa": {
        "test": ("openbookqa.test.jsonl", "test.jsonl"),
        "train": ("openbookqa.train.jsonl", "train.jsonl"),
    },
    "humaneval": {"test": ("HumanEval.jsonl", "test.jsonl")},
    "mbpp": {"test": ("mbpp.jsonl", "test.jsonl"), "prompt": ("mbpp.jsonl", "prompt.jsonl")},
    "ifeval": {"train": ("prompts.jsonl", "train.jsonl")},
    "tinystories": {"test": ("stories.jsonl", "test.jsonl")},
    "c4_text": {"test": ("c4.jsonl", "test.jsonl")},
}


def files_of(name: str, data: Path, splits: Sequence[str], *, where: str) -> dict[str, Path]:
    """Find the file of each split.

    Args:
        name: The benchmark's name in the table.
        data: A folder, or the file of the split that is scored; the others are looked for beside it.
        splits: The split that is scored, then that of the prompt's examples, if there is another.
        where: The recipe key, for error messages.

    Returns:
        Split to file; a split of examples that is not there is left out.

    Raises:
        DataError: The split that is scored is not there.
    """
    folder = data if data.is_dir() else data.parent
    found = {split: path for split in splits if (path := _first(folder, name, split)) is not None}
    if not data.is_dir():
        if name == "mbpp":
            found = dict.fromkeys(splits, data)
        found[splits[0]] = data
    if splits[0] not in found:
        raise DataError(
            f"{where}.data {data}",
            got="none of its files",
            wanted=" or ".join(_names(name, splits[0])),
            next_step="Name the folder that holds one of these, or the file itself.",
        )
    return found


def _names(name: str, split: str) -> tuple[str, ...]:
    return SPLITS.get(name, {}).get(split, (f"{split}.jsonl",))


def _first(folder: Path, name: str, split: str) -> Path | None:
    matching = (path for pattern in _names(name, split) for path in sorted(folder.glob(pattern)))
    return next(matching, None)


def local_rows(name: str, split: str, path: Path, *, where: str) -> list[Row]:
    """Read one split.

    Args:
        name: The benchmark's name in the table.
        split: The split of lm-eval's task.
        path: Its file.
        where: The recipe key, for error messages.

    Returns:
        The rows, with the fields of the hub's data.

    Raises:
        DataError: The file cannot be read, or a row is in no form that is known.
    """
    read = _READERS.get(name, _as_they_are)
    chosen = _MBPP.get(split) if name == "mbpp" else None
    rows = []
    for number, row in enumerate(read_jsonl(path, where=f"{where}.data"), start=1):
        if chosen is not None and row.get("task_id") not in chosen:
            continue
        try:
            rows.append(read(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}.data {path} row {number}",
                got=f"a row that cannot be read ({type(error).__name__}: {error})",
                wanted=f"the fields that lm-eval's {name} has on the hub, or a form of docs/guides/benchmarks.md",
                next_step="Mend the row.",
            ) from error
    if not rows:
        raise DataError(
            f"{where}.data {path}",
            got=f"no row of the split {split}",
            wanted="at least one",
            next_step="Name another file.",
        )
    return rows


# The official split by task_id; lm-eval's three examples are 2, 3 and 4.
_MBPP: Mapping[str, Sequence[int]] = {"prompt": (2, 3, 4), "test": range(11, 511)}


def subjects_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Sort MMLU's rows by subject.

    Args:
        rows: Rows with the field ``subject``.

    Returns:
        Subject to its rows, in the order of the file.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["subject"]), []).append(row)
    return found


def _as_they_are(row: Row) -> Row:
    return row


def _only(*fields: str) -> Callable[[Row], Row]:
    """Make a reader that keeps some fields, all of which must be there."""
    return lambda row: {field: row[field] for field in fields}


def _mmlu(row: Row) -> Row:
    answer = row["answer"]
    index = answer if isinstance(answer, int) else _LETTERS.index(answer.strip().upper())
    if not 0 <= index < len(row["choices"]):
        raise ValueError(f"answer {answer!r} of {len(row['choices'])} choices")
    return {"subject": row["subject"], "question": row["question"], "choices": list(row["choices"]), "answer": index}


def _asked(row: Row) -> tuple[str, list[str], int]:
    """Read a question with its choices from the instruction form of LLM-Adapters."""
    match = _ASKED.match(row["instruction"])
    if match is None:
        raise ValueError("the instruction is not in the form of LLM-Adapters")
    choices = re.split(r" Answer\d: ", match[2])
    labels = match[3].split("/")
    if len(choices) != len(labels):
        raise ValueError(f"{len(choices)} choices and {len(labels)} labels")
    return match[1], choices, labels.index(row["answer"])


def _arc(row: Row) -> Row:
    if "instruction" not in row:
        return {field: row[field] for field in ("question", "choices", "answerKey")}
    question, choices, right = _asked(row)
    labels = list(_LETTERS[: len(choices)])
    return {"question": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[right]}


def _openbookqa(row: Row) -> Row:
    if "instruction" not in row:
        return {field: row[field] for field in ("question_stem", "choices", "answerKey")}
    question, choices, right = _asked(row)
    labels = list(_LETTERS[: len(choices)])
    return {"question_stem": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[right]}


def _boolq(row: Row) -> Row:
    if "instruction" not in row:
        kept = {field: row[field] for field in ("passage", "question") if field in row}
        return kept | {"question": row["question"], "label": int(row["label"] if "label" in row else row["answer"])}
    match = _ASKED_TRUE.match(row["instruction"])
    if match is None:
        raise ValueError("the instruction is not in the form of LLM-Adapters")
    return {"question": match[1].removesuffix("?"), "label": ["false", "true"].index(row["answer"])}


def _triviaqa(row: Row) -> Row:
    aliases = row["answer"]["aliases"] if "answer" in row else row["answers"]
    return {"question": row["question"], "answer": {"aliases": list(aliases)}}


def _mbpp(row: Row) -> Row:
    kept: dict[str, Any] = {field: row[field] for field in ("task_id", "text", "code", "test_list")}
    return kept


_READERS: Mapping[str, Callable[[Row], Row]] = {
    "triviaqa": _triviaqa,
    "nq_open": _only("question", "answer"),
    "efficientqa": _only("question", "answer"),
    "webqs": _only("question", "answers"),
    "mmlu": _mmlu,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": _boolq,
    "openbookqa": _openbookqa,
    "gsm8k": _only("question", "answer"),
    "math": _only("problem", "solution"),
    "humaneval": _only("task_id", "prompt", "test", "entry_point", "canonical_solution"),
    "mbpp": _mbpp,
    "ifeval": _only("key", "prompt", "instruction_id_list", "kwargs"),
    "tinystories": _only("text"),
    "c4_text": _only("text"),
}
