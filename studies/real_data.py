"""What the study of real models learns and is scored on. Nothing is in two of: training, knowledge, scores."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keeptune
from keeptune import atlas
from keeptune.data import __file__ as data_module
from keeptune.evaluation.standard.lm_eval_tasks import BY_SENTENCE
from keeptune.model.pretrained import load_model, load_tokenizer
from studies.cells import read_rows, write_rows

Row = dict[str, Any]
GENERAL = Path(data_module).parent / "general" / "texts.jsonl"
LONGEST = 30  # characters of an answer


@dataclass(frozen=True)
class Sizes:
    """How many items are scored (texts cut to ``tokens``, answers to ``answer``) and texts written; steps."""

    items: int = 200
    facts: int = 250
    tokens: int = 64
    answer: int = 256
    knowledge: int = 256
    held_out: int = 48
    steps: int = 100


def write_data(data: Path, folder: Path, sizes: Sizes) -> None:
    """Writes the files that all models share."""

    def problems(name: str) -> list[Row]:
        rows = read_rows(data / "gsm8k" / f"{name}.jsonl")
        return [{"text": f"{row['question']}\n{row['answer']}"} for row in rows]

    makers: dict[str, Callable[[], list[Row]]] = {
        "facts": lambda: fact_rows(data)[: sizes.facts],
        "web": lambda: web_rows(data)[: sizes.items],
        "ifeval/prompts": lambda: prompt_rows(data)[: sizes.items],
        "calls-train": lambda: call_rows("train"),
        "calls-test": lambda: call_rows("test")[: sizes.items],
        "gsm8k-train": lambda: problems("train")[:2000],
        "gsm8k-test": lambda: problems("test")[: sizes.items],
    }
    (folder / "ifeval").mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        write_rows(folder / f"{name}.jsonl", make())


def fact_rows(data: Path) -> list[Row]:
    """Questions of NQ-open, to be told which of four is the answer: three answer others that begin with the same words.

    No task is about such facts: the statements and questions that the tasks learn from are those of the relations data.
    """
    draws, alike = random.Random(0), dict[str, list[Row]]()
    for row in read_rows(data / "nq_open" / "dev.jsonl"):
        if len(row["answer"][0]) < LONGEST:
            alike.setdefault(" ".join(row["question"].split()[:2]), []).append(row)
    found = []
    for rows in alike.values():
        answers = sorted({row["answer"][0] for row in rows})
        for row in rows:
            others = [answer for answer in answers if answer not in row["answer"]]
            if len(others) >= 3:
                choices = draws.sample(others, 3)
                place = draws.randrange(4)
                choices.insert(place, row["answer"][0])
                found.append({"question": row["question"], "choices": choices, "answer": place})
    return draws.sample(found, len(found))


def web_rows(data: Path) -> list[Row]:
    """Web texts of which no piece is in ``knowledge: general``."""
    known = {row["text"][:60] for row in read_rows(GENERAL)}
    rows = read_rows(data / "c4_text" / "c4.jsonl")
    return [{"text": row["text"]} for row in rows if row["text"][:60] not in known]


def prompt_rows(data: Path) -> list[Row]:
    """IFEval's prompts whose rules need no data of nltk, in an order drawn once."""
    rows = [
        row
        for row in read_rows(data / "ifeval" / "prompts.jsonl")
        if not any(rule in BY_SENTENCE for rule in row["instruction_id_list"])
    ]
    return random.Random(0).sample(rows, len(rows))


def call_rows(split: str) -> list[Row]:
    """Chats that ask for a function call in JSON: one of three functions, by the kind of the question."""
    calls = []
    for row in read_rows(atlas.data_path(f"problems.{split}.jsonl")):
        a, b = (int(word) for word in row["question"].replace(".", " ").split() if word.isdigit())
        calls.append((row["question"], "calculate", {"a": a, "b": b, "operator": row["kind"]}))
    for row in read_rows(atlas.data_path(f"formats.{split}.jsonl")):
        calls.append((row["question"], "search", {"subject": row["subject"], "style": row["format"]}))
    for row in read_rows(atlas.data_path(f"ships.{split}.jsonl")):
        calls.append((row["question"], "ship_register", {"ship": row["subject"], "field": row["relation"]}))
    random.Random(0).shuffle(calls)
    return [
        conversation(f"{question}\nReply with a function call in JSON.", json.dumps({"name": name, "arguments": said}))
        for question, name, said in calls
    ]


def conversation(asked: str, answered: str) -> Row:
    """A question and its answer as a chat."""
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def held_out_texts(model: Path, folder: Path, store: Path, sizes: Sizes) -> None:
    """Has the base write the texts that its KL is measured on, plain texts and chats, with a seed of their own."""
    if (folder / "own-texts.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = keeptune.SelfGeneration(generate=sizes.held_out, seed=1)
    texts = keeptune.generate_knowledge(load_model(str(model)), load_tokenizer(str(model)), options, store=store).texts
    if chats := [conversation(text.prompt, text.completion) for text in texts if text.prompt]:
        write_rows(folder / "own-chats.jsonl", chats)
    write_rows(folder / "own-texts.jsonl", [{"text": text.completion} for text in texts if not text.prompt])


def task_of(name: str, folder: Path, sizes: Sizes) -> tuple[Row, int, Row]:
    """A recipe's section ``task``, how many examples a step has, and the task's benchmark."""
    exact = {"metric": "exact_match", "group": None, "name": name, "role": "task", "examples": sizes.items}
    if name == "labels":
        prompt = {"prompt": "{text}\nTopic:"}
        scored = exact | prompt | {"file": "atlas:topics.test.jsonl", "answer": "{topic}", "max_new_tokens": 12}
        return {"train": "atlas:topics.train.jsonl", "completion": " {topic}"} | prompt, 8, scored
    files = [str(folder / f"{name}-{split}.jsonl") for split in ("train", "test")]
    if name == "calls":
        scored = {"file": files[1], "messages": "{messages}", "normalise": "exact", "max_new_tokens": 40}
        return {"train": files[0]}, 4, exact | scored
    scored = {"name": name, "role": "task", "file": files[1], "text": "Problem: {text}", "metric": "cross_entropy"}
    return (
        {"train": files[0], "prompt": "Problem:", "completion": " {text}"},
        2,
        scored | {"max_length": 2 * sizes.tokens},
    )


def kept_benchmarks(data: Path, folder: Path, own: Path, sizes: Sizes) -> list[Row]:
    """What is to be kept, as a recipe's section ``evaluate``; ``own`` is the folder of :func:`held_out_texts`."""
    nats = {"role": "knowledge", "metric": "cross_entropy", "max_length": sizes.tokens, "group": None}
    facts = {"prompt": "Question: {question}?\nAnswer:", "choices": "{choices}", "answer": "{answer}"}
    choices = {"data": str(data / "commonsense"), "examples": sizes.items, "batch_size": 32}
    found = [
        *({"name": name, **choices} for name in ("arc_easy", "openbookqa")),
        {
            "name": "facts",
            "role": "knowledge",
            "metric": "multiple_choice",
            "file": str(folder / "facts.jsonl"),
            **facts,
        },
        {"name": "web", "file": str(folder / "web.jsonl"), "text": "{text}", **nats},
        {"name": "own-texts", "file": str(own / "own-texts.jsonl"), "text": "{text}", **nats},
    ]
    if (own / "own-chats.jsonl").is_file():
        chats = {"messages": "{messages}", **nats, "max_length": 2 * sizes.tokens}
        found.append({"name": "own-chats", "file": str(own / "own-chats.jsonl"), **chats})
    return found


def instructions(folder: Path, sizes: Sizes) -> Row:
    """IFEval: the share of prompts all of whose rules an answer follows, strict."""
    asked = {"data": str(folder / "ifeval"), "batch_size": 32, "max_new_tokens": sizes.answer}
    return {"name": "ifeval", "role": "knowledge", **asked}
