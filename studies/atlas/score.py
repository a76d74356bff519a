"""Greedy answers of a causal language model in batches, and the share of them that is exactly right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from studies.atlas.wordings import QUESTION_FORM, TOPIC_FORM

Pairs = list[tuple[str, str]]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fact_pairs(path: Path) -> Pairs:
    """(prompt, answer) pairs of a file of questions."""
    return [(QUESTION_FORM.format(question=row["question"]), row["answer"]) for row in read_rows(path)]


def task_pairs(path: Path) -> Pairs:
    """(prompt, answer) pairs of a file of the topic task."""
    return [(TOPIC_FORM.format(text=row["text"]), row["topic"]) for row in read_rows(path)]


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 24, batch: int = 128
) -> list[str]:
    """The greedy continuation of every prompt, up to the end-of-text token, which is left out.

    Prompts are padded on the left.  A continuation that does not end within ``new_tokens`` is returned with
    a mark at its end, so that it never equals an answer.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    was_training = bool(model.training)
    model.eval()
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in part], return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        width = inputs["input_ids"].shape[1]
        for index, tokens in zip(part, out[:, width:].tolist(), strict=True):
            answers[index] = _cut(tokenizer, tokens)
    model.train(was_training)
    return answers


def _cut(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer.eos_token_id not in tokens:
        return str(tokenizer.decode(tokens)) + " [no end]"
    return str(tokenizer.decode(tokens[: tokens.index(tokenizer.eos_token_id)]))


def exact_match(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], new_tokens: int = 24) -> float:
    """The share of (prompt, answer) pairs whose greedy continuation is exactly a space and the answer."""
    got = greedy_answers(model, tokenizer, [prompt for prompt, _ in pairs], new_tokens)
    right = sum(text == " " + answer for text, (_, answer) in zip(got, pairs, strict=True))
    return right / max(len(pairs), 1)
