"""Causal tracing from Python: which layers of a loaded model restore known answers.

result = keeptune.trace(model, tokenizer, [("The sky is", " blue"), ...])
result.average                                   # AIE of each layer
result.normalised()                              # NAIE: what L2-LoRA weights its penalty by
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError, StatisticsError
from keeptune.data.knowledge import knowledge_of
from keeptune.model.blocks import positions
from keeptune.model.probes.causal_tracing import Noise, OutputKind, Reading, Traced
from keeptune.statistics.layer_effect import (
    LayerEffect,
    Norm,
    average_effect,
    is_distinct,
    normalised_effect,
    normalised_error,
    trace_texts,
)
from keeptune.studies.figure_files import check_word

__all__ = ["Trace", "check_effect", "trace"]


@dataclass(frozen=True, slots=True)
class Trace:
    """The effects of one model's layers.

    Args:
        request: What was measured.
        texts: Each text's probabilities, in the order of the data.
    """

    request: LayerEffect
    texts: tuple[Traced, ...]

    @property
    def effects(self) -> Tensor:
        """``(N, L)``, ``IE_l`` of each text (eq. 2)."""
        return torch.stack([text.effect for text in self.texts])

    @property
    def average(self) -> Tensor:
        """``(L,)``, AIE (eq. 3)."""
        return average_effect(self.effects)[0]

    @property
    def error(self) -> Tensor:
        """``(L,)``, the standard error of AIE over texts."""
        return average_effect(self.effects)[1]

    def answer(self, values: Tensor) -> float:
        """Returns Σ_t p(y_t) of a text's ``clean`` or ``corrupted``, ``(K,)``."""
        # In reading B every position has the sum already.
        return float(values.sum() if self.request.reading == "diagonal" else values[0])

    def normalised(self, norm: Norm = "max") -> Tensor:
        """Returns NAIE, ``(L,)``: AIE over its ``"max"`` or ``"sum"``; a layer below 0 counts as 0.

        Raises:
            StatisticsError: No layer restores anything of the answers.
        """
        return normalised_effect(self.average, norm)

    def summary(self) -> dict[str, Any]:
        """Returns the effects and their errors, ready for JSON.

        ``clean`` and ``corrupted`` are Σ_t p(y_t), averaged over texts; errors are standard errors over texts. Where no
        effect is ``distinct``, NAIE is noise.
        """
        answers = {side: [self.answer(getattr(text, side)) for text in self.texts] for side in ("clean", "corrupted")}
        shares: dict[str, Any] = {}
        for norm in get_args(Norm):
            shares[f"NAIE_{norm}"] = _or_none(self, norm)
            shares[f"NAIE_{norm}_error"] = _numbers(normalised_error(self.effects, norm))
        return {
            **{side: math.fsum(values) / len(values) for side, values in answers.items()},
            "AIE": self.average.tolist(),
            "AIE_error": _numbers(self.error),
            "distinct": is_distinct(self.effects),
            **shares,
            "texts": [
                {"clean": clean, "corrupted": corrupted, "effect": text.effect.tolist()}
                for text, clean, corrupted in zip(self.texts, *answers.values(), strict=True)
            ],
        }


def trace(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    request: LayerEffect | None = None,
    *,
    max_length: int = 512,
    chunk: int = 2048,
) -> Trace:
    """Traces a loaded model.

    Args:
        model: A causal language model, or one with an adapter, which is traced as it is switched.
        tokenizer: Its tokenizer.
        examples: Prompts and completions that it knows, such as ``("The sky is", " blue")``.
        request: What is measured: the reading of eq. 2, the noise, the outputs restored; None takes the defaults.
        max_length: Longer examples are cut to this many tokens, or to the model's positions.
        chunk: Tokens in a pass with restored states; it changes speed and memory only.

    Raises:
        DataError: An example is empty.
        ModelError: It has no blocks, or no attention or MLP of its own.
        RecipeError: A wrong option.
        StatisticsError: A probability is not finite.
    """
    request = LayerEffect("knowledge") if request is None else request
    check_effect(request)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    length = min(max_length, positions(base) or max_length)
    data = knowledge_of(examples).calibration(tokenizer, max_length=length)
    return Trace(request, tuple(trace_texts(base, data, request, chunk=chunk)))


def check_effect(request: LayerEffect) -> None:
    """Checks the options of a request that comes from a user.

    Raises:
        RecipeError: One is wrong.
    """
    check_word("reading", request.reading, get_args(Reading))
    check_word("kind", request.output, get_args(OutputKind))
    if request.window < 1:
        raise RecipeError("window", got=str(request.window), wanted="1 or more", next_step="ROME takes 10.")
    Noise(request.fraction, request.scale, request.seed)  # checks their ranges


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _or_none(result: Trace, norm: Norm) -> list[float] | None:
    try:
        return result.normalised(norm).tolist()
    except StatisticsError:  # a model that does not know the answers has no profile
        return None
