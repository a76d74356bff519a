"""Log-likelihoods of answers with logits at the places that need them, against all, and against states left a slice.

In bfloat16 and with a head that is not trained, as adapters have it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from random_llama import random_llama
from timing import compare

from keeptune.core.eval_mode import in_evaluation
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens, log_likelihoods

SHAPES = {"SmolLM2-135M": (576, 30, 49152), "Gemma 3 270M": (640, 18, 262144)}  # width, layers, vocabulary
PROMPT, ANSWER, ITEMS = 55, 5, 16


class Whole(torch.nn.Module):
    """A model that gives all logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        """Run the model, without its argument for fewer."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def rows() -> list[dict[str, str]]:
    """Time both, for two vocabularies."""
    torch.set_num_threads(1)
    return [row(name, *shape) for name, shape in SHAPES.items()]


@torch.no_grad()
def row(name: str, width: int, layers: int, vocabulary: int) -> dict[str, str]:
    torch.manual_seed(0)
    model = random_llama(width, layers, vocabulary, tie_word_embeddings=True).eval().bfloat16().requires_grad_(False)
    ids = torch.randint(vocabulary, (ITEMS, PROMPT + ANSWER)).tolist()
    sequences = [ScoredTokens(tuple(one), PROMPT, False) for one in ids]
    found: dict[str, list[float]] = {}

    def score(label: str, scored: Any) -> None:
        with in_evaluation(scored) if label == "needed" else nullcontext():
            found[label] = log_likelihoods(scored, sequences, Passes(64, 0, name))

    rivals = {"whole": Whole(model), "sliced": model, "needed": model}
    times = compare({label: lambda label=label: score(label, rivals[label]) for label in rivals}, rounds=3)
    apart = max(abs(one - other) for one, other in zip(found["whole"], found["needed"], strict=True))
    return {
        "benchmark": f"{ITEMS} answers of {ANSWER} tokens after {PROMPT}, {name}'s shapes",
        "plain": f"all logits {times['whole']:.2f} s, of a slice {times['sliced']:.2f} s",
        "keeptune": f"{times['needed']:.2f} s",
        "ratio": f"{times['whole'] / times['needed']:.2f} x, {times['sliced'] / times['needed']:.2f} x faster",
        "check": f"apart by {apart:.0e} nats",
    }
