"""Slow, obvious versions of keeptune.evaluation: one item at a time, no batches, no padding, plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def logits_after(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """(L, V) float64 logits of one unpadded sequence."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0].double()


def greedy_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    new_tokens: int,
    ends: set[int],
    stops: Sequence[str] = ("\n",),
) -> str:
    """Generate token by token, each from a whole forward pass without a cache."""
    ids = list(tokenizer(prompt)["input_ids"])
    new: list[int] = []
    for _ in range(new_tokens):
        token = int(logits_after(model, ids + new)[-1].argmax())
        if token in ends:
            break
        new.append(token)
    text: str = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for stop in stops:
        text = text.split(stop)[0]
    return text


def log_likelihood(model: Any, ids: Sequence[int], start: int) -> float:
    """Sum log p(ids[t] | ids[:t]) over t >= start, each from its own forward pass."""
    total = 0.0
    for place in range(start, len(ids)):
        logits = logits_after(model, ids[:place])[-1]
        total += float(logits[ids[place]] - logits.logsumexp(0))
    return total


def choice_log_likelihood(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """log p(" choice" | prompt)."""
    context = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + " " + choice)["input_ids"]
    return log_likelihood(model, whole, len(context))


def divergence(base: Any, tuned: Any, ids: Sequence[int]) -> float:
    """KL(base || tuned) in nats, summed over the predictions of ids[1:]."""
    total = 0.0
    for place in range(1, len(ids)):
        first = logits_after(base, ids[:place])[-1].log_softmax(0)
        second = logits_after(tuned, ids[:place])[-1].log_softmax(0)
        for p, q in zip(first.tolist(), second.tolist(), strict=True):
            total += math.exp(p) * (p - q)
    return total
