"""The mixture that ships as ``knowledge: general``: pieces of web text, code, instructions and questions.

    python -m studies.general DATA [--out src/keeptune/data/general]

writes ``texts.jsonl`` and ``chats.jsonl`` from folders of DATA (their sources and licences: SOURCE.md beside the
result). Nothing is drawn: rows come in the order of their files. A row that shares a run of eight words with an item
that keeptune's benchmarks score is left out, and so is web text with an address or a telephone number.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from keeptune import atlas

Row = dict[str, Any]
WEB, CODE, TOLD, ASKED = 96, 32, 64, 64
FIRST_WEB_ROW = 150  # the rows before it are left for scoring
FIRST_MBPP_TASK = 601  # of its training split
SCORED = (
    ("commonsense", "ARC-Easy.test.jsonl"),
    ("commonsense", "boolq.test.jsonl"),
    ("commonsense", "openbookqa.test.jsonl"),
    ("gsm8k", "test.jsonl"),
    ("humaneval", "HumanEval.jsonl"),
    ("ifeval", "prompts.jsonl"),
    ("mmlu", "dev.jsonl"),
    ("mmlu", "test_20_per_subject.jsonl"),
    ("nq_open", "dev.jsonl"),
    ("nq_open", "efficientqa_dev.jsonl"),
    ("tinystories", "stories.jsonl"),
    ("webquestions", "test.jsonl"),
)
_PRIVATE = re.compile(r"@|\d{3}\W{1,2}\d{3,4}|https?:|www\.")
_RUN = 8


def read(path: Path) -> list[Row]:
    """Returns the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def runs(text: str) -> set[str]:
    """Returns the runs of eight words of a text; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + _RUN]) for at in range(max(1, len(words) - _RUN + 1))}


def scored_runs(data: Path) -> set[str]:
    """Returns the runs of all that benchmarks score: the first field of text of each item, by which it is known."""
    fields = ("question", "prompt", "instruction", "text", "story")
    held = [row for folder, name in SCORED for row in read(data / folder / name)]
    held += [row for row in read(data / "mbpp" / "mbpp.jsonl") if row["task_id"] < FIRST_MBPP_TASK]
    held += read(atlas.data_path("facts.jsonl")) + read(atlas.data_path("statements.jsonl"))
    held += read(data / "c4_text" / "c4.jsonl")[:FIRST_WEB_ROW]
    texts = (next((row[field] for field in fields if isinstance(row.get(field), str)), "") for row in held)
    common = "please choose the correct answer to the question"
    return {run for text in texts for run in runs(text.lower().replace(common, ""))} - {""}


def web(data: Path) -> Iterator[str]:
    """Yields the beginnings of web texts, up to the end of a sentence."""
    for row in read(data / "c4_text" / "c4.jsonl")[FIRST_WEB_ROW:]:
        piece = re.match(r"(?s).{200,900}[.!?](?=\s)", row["text"])
        if piece and not _PRIVATE.search(piece.group()):
            yield piece.group()


def code(data: Path) -> Iterator[str]:
    """Yields programs with what they do as a comment."""
    for row in read(data / "mbpp" / "mbpp.jsonl"):
        if row["task_id"] >= FIRST_MBPP_TASK:
            yield f"# {row['text']}\n" + row["code"].replace("\r\n", "\n").replace("\t", "    ")


def told(data: Path) -> Iterator[tuple[str, str]]:
    """Yields instructions with what follows them."""
    for row in read(data / "self_instruct_seed" / "seed_tasks.jsonl"):
        one = row["instances"][0]
        prompt = f"{row['instruction']}\n{one['input']}".strip()
        if not row["is_classification"] and len(prompt) < 600 and 20 < len(one["output"]) < 1000:
            yield prompt, one["output"].strip()


def asked(data: Path) -> Iterator[tuple[str, str]]:
    """Yields questions with their answers."""
    for row in read(data / "webquestions" / "train.jsonl"):
        question = row["question"].strip()
        yield question[0].upper() + question[1:], ", ".join(row["answers"][:3])


def mixture(data: Path) -> tuple[list[Row], list[Row]]:
    """Returns the rows of texts and of chats, kinds in turn so that the first rows are a mixture too."""
    scored = scored_runs(data)

    def free(text: str) -> bool:
        return not runs(text) & scored

    texts = [list(islice(filter(free, kind), count)) for kind, count in ((web(data), WEB), (code(data), CODE))]
    chats = [
        list(islice((pair for pair in kind if free(pair[0])), count))
        for kind, count in ((told(data), TOLD), (asked(data), ASKED))
    ]
    each = WEB // CODE
    ordered = chain.from_iterable((*texts[0][each * n : each * n + each], texts[1][n]) for n in range(CODE))
    pairs = chain.from_iterable(zip(*chats, strict=True))
    return [{"text": text} for text in ordered], [{"prompt": p, "completion": c} for p, c in pairs]


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("src/keeptune/data/general"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("texts", "chats"), mixture(given.data), strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(rows)} rows, {len(lines.encode()):,} bytes")


if __name__ == "__main__":
    main()
