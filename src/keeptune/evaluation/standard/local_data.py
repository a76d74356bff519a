"""Items of standard benchmarks from local JSONL files, in the form that lm-eval's task expects of the hub's data.

A row may have the hub's own fields, or the form in which a benchmark is published elsewhere: HumanEval, MBPP, GSM8K,
IFEval, NQ-open by their authors, WebQuestions with ``answers``, MMLU with its subject and the answer's letter, and
ARC, BoolQ and OpenBookQA in the instruction form of LLM-Adapters (Hu et al., EMNLP 2023).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from keeptune.core.errors import DataError
from keeptune.data.sources import Row, read_jsonl
from keeptune.evaluation.standard.entry import NAMES
from keeptune.evaluation.standard.sandbox import MBPP_EXAMPLES

_LETTERS = "ABCDEFGH"
_QUESTION = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: (\S+)\Z", re.DOTALL
)
_TRUE_OR_FALSE = re.compile(
    r"Please answer the following question with true or false, question: (.*)\n\nAnswer format: true/false\Z", re.DOTALL
)
# The official split by task_id.
_MBPP: Mapping[str, Sequence[int]] = {"prompt": MBPP_EXAMPLES, "test": range(11, 511)}


def files_of(name: str, data: Path, splits: Sequence[str], *, where: str) -> dict[str, Path]:
    """Returns the file of each split: that which is scored, then that of the prompt's examples, left out if missing.

    ``data`` is a folder, or the file of the split that is scored, with the others beside it.

    Raises:
        DataError: The split that is scored does not exist.
    """
    folder = data if data.is_dir() else data.parent
    files = {}
    for split in splits:
        existing = [path for pattern in _names(name, split) for path in sorted(folder.glob(pattern))]
        if existing:
            files[split] = existing[0]
    if not data.is_dir():
        files |= dict.fromkeys(splits if name == "mbpp" else splits[:1], data)
    if splits[0] not in files:
        raise DataError(
            f"{where}.data {data}",
            got="none of its files",
            wanted=" or ".join(_names(name, splits[0])),
            next_step="Name the folder that holds one of these, or the file itself.",
        )
    return files


def _names(name: str, split: str) -> tuple[str, ...]:
    row = NAMES.get(name)
    return (row.files if row else {}).get(split, (f"{split}.jsonl",))


def local_rows(name: str, split: str, path: Path, *, where: str) -> list[Row]:
    """Reads the file of one split of lm-eval's task into rows with the fields of the hub's data.

    Raises:
        DataError: The file cannot be read, or a row is in none of the forms.
    """
    table = NAMES.get(name)
    kept, read = table.fields if table else (), _READERS.get(name, dict)
    chosen = _MBPP.get(split) if name == "mbpp" else None
    rows: list[Row] = []
    for number, row in enumerate(read_jsonl(path, where=f"{where}.data"), start=1):
        if chosen is not None and row.get("task_id") not in chosen:
            continue
        try:
            rows.append({field: row[field] for field in kept} if kept else read(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}.data {path} row {number}",
                got=f"a row that cannot be read ({type(error).__name__}: {error})",
                wanted=f"the fields of lm-eval's {name} on the hub, or a form that docs/guides/benchmarks.md names",
                next_step="Correct the row.",
            ) from error
    if not rows:
        raise DataError(
            f"{where}.data {path}",
            got=f"no row of the split {split}",
            wanted="at least one",
            next_step="Name another file.",
        )
    return rows


def _mmlu(row: Row) -> Row:
    answer = row["answer"]
    index = answer if isinstance(answer, int) else _LETTERS.index(answer.strip().upper())
    if not 0 <= index < len(row["choices"]):
        raise ValueError(f"answer {answer!r} of {len(row['choices'])} choices")
    return {"subject": row["subject"], "question": row["question"], "choices": list(row["choices"]), "answer": index}


def _multiple_choice(question: str) -> Callable[[Row], Row]:
    def read(row: Row) -> Row:
        if "instruction" not in row:
            return {field: row[field] for field in (question, "choices", "answerKey")}
        text, listed, form = _matched(_QUESTION, row).groups()
        choices, words = re.split(r" Answer\d: ", listed), form.split("/")
        if len(choices) != len(words):
            raise ValueError(f"{len(choices)} choices and {len(words)} labels")
        labels = list(_LETTERS[: len(choices)])
        right = labels[words.index(row["answer"])]
        return {question: text, "choices": {"text": choices, "label": labels}, "answerKey": right}

    return read


def _matched(form: re.Pattern[str], row: Row) -> re.Match[str]:
    match = form.match(row["instruction"])
    if match is None:
        raise ValueError("the instruction is not in the form of LLM-Adapters")
    return match


def _boolq(row: Row) -> Row:
    if "instruction" not in row:
        kept = {field: row[field] for field in ("passage", "question") if field in row}
        return kept | {"question": row["question"], "label": int(row["label"] if "label" in row else row["answer"])}
    question = _matched(_TRUE_OR_FALSE, row)[1].removesuffix("?")
    return {"question": question, "label": ["false", "true"].index(row["answer"])}


# Of several forms.
_READERS: Mapping[str, Callable[[Row], Row]] = {
    "triviaqa": lambda row: {
        "question": row["question"],
        "answer": {"aliases": list(row["answer"]["aliases"] if "answer" in row else row["answers"])},
    },
    "mmlu": _mmlu,
    "arc_easy": _multiple_choice("question"),
    "arc_challenge": _multiple_choice("question"),
    "boolq": _boolq,
    "openbookqa": _multiple_choice("question_stem"),
}
