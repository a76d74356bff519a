"""SDFT as it is defined, one text after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def written(model: Any, prompt: Sequence[int], count: int, end: int) -> list[int]:
    """The likeliest tokens after a prompt, up to the end token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and end not in ids[len(prompt) :]:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def divergence(p: Tensor, q: Tensor, a: float) -> Tensor:
    """(2) of training/losses/sdft.py."""
    m = (1 - a) * p + a * q
    if a in (0, 1):
        p, q = (p, q) if a else (q, p)
        return (p * (p / q).log()).sum()
    return (1 - a) * (p * (p / m).log()).sum() + a * (q * (q / m).log()).sum()


def loss(student: Any, teacher: Any, rows: Sequence[tuple[list[int], list[int]]], sdft: Any, end: int) -> float:
    """(3) over prompts, each as the student and as the teacher reads it."""
    means = []
    for own, shown in rows:
        text = written(student, own, sdft.max_completion_length, end)
        p, q = (
            model(input_ids=torch.tensor([read + text])).logits[0, len(read) - 1 : -1].double().softmax(-1)
            for model, read in ((student, own), (teacher, shown))
        )
        terms = [divergence(*pair, sdft.distillation_alpha) for pair in zip(p, q, strict=True)]
        means.append(torch.stack(terms[sdft.num_loss_tokens_to_skip :]).mean())
    return float(torch.stack(means).mean())
