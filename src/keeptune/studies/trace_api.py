"""A trace from Python: which layers of a loaded model bring known answers back.

found = keeptune.trace(model, tokenizer, [("The sky is", " blue"), ...])
found.average                                    # AIE of each layer
found.normalised()                               # NAIE: what L2-LoRA weights its penalty by
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

from keeptune.core.errors import RecipeError, StatisticsError, nearest
from keeptune.data.knowledge import knowledge_calibration, knowledge_of
from keeptune.model.blocks import positions
from keeptune.model.probes.causal_tracing import Kind, Noise, Reading, Traced
from keeptune.statistics.layer_effect import (
    LayerEffect,
    Norm,
    average_effect,
    is_distinct,
    normalised_effect,
    normalised_error,
    trace_texts,
)

__all__ = ["Trace", "trace", "wanted_effect"]


@dataclass(frozen=True, slots=True)
class Trace:
    """What tracing found in one model.

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
        """Sum the probability of the answer tokens in a text's ``clean`` or ``corrupted``.

        Args:
            values: ``(K,)``.

        Returns:
            Σ_t p(y_t).
        """
        # In reading B every position has the sum already.
        return float(values.sum() if self.request.reading == "diagonal" else values[0])

    def normalised(self, norm: Norm = "max") -> Tensor:
        """Normalise AIE over layers.

        Args:
            norm: ``"max"`` or ``"sum"``; a layer below 0 counts as 0.

        Returns:
            ``(L,)``, NAIE.

        Raises:
            StatisticsError: No layer brings anything of the answers back.
        """
        return normalised_effect(self.average, norm)

    def summary(self) -> dict[str, Any]:
        """Write everything down.

        Returns:
            A JSON-ready mapping; ``clean`` and ``corrupted`` are Σ_t p(y_t), averaged over texts. Errors are standard
            errors over texts. Where no effect is ``distinct``, NAIE is noise.
        """
        texts: list[dict[str, Any]] = [
            {
                "clean": self.answer(text.clean),
                "corrupted": self.answer(text.corrupted),
                "effect": text.effect.tolist(),
            }
            for text in self.texts
        ]
        return {
            "clean": math.fsum(text["clean"] for text in texts) / len(texts),
            "corrupted": math.fsum(text["corrupted"] for text in texts) / len(texts),
            "AIE": self.average.tolist(),
            "AIE_error": _numbers(self.error),
            "distinct": is_distinct(self.effects),
            **{f"NAIE_{norm}": _or_none(self, norm) for norm in get_args(Norm)},
            **{f"NAIE_{norm}_error": _numbers(normalised_error(self.effects, norm)) for norm in get_args(Norm)},
            "texts": texts,
        }


def trace(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    *,
    reading: Reading = "positions",
    fraction: float = 0.5,
    scale: float = 3.0,
    seed: int = 0,
    output: Kind = "block",
    window: int = 10,
    max_length: int = 512,
    chunk: int = 2048,
) -> Trace:
    """Trace a model that is loaded.

    Args:
        model: A causal language model, or one with an adapter, which is traced as it is switched.
        tokenizer: Its tokenizer.
        examples: Prompts and completions that it knows, such as ``("The sky is", " blue")``.
        reading: ``"positions"`` restores each position of the prompt, ``"diagonal"`` the one before each answer token.
        fraction: Share of the prompt's tokens that get noise.
        scale: The noise's standard deviation, in units of that of the token embeddings.
        seed: Seed of the noise; each text has its own stream.
        output: What is restored: ``"block"``, ``"attention"`` or ``"mlp"`` outputs.
        window: Layers restored together, for attention and MLPs.
        max_length: Longer examples are cut to this many tokens, or to the model's positions.
        chunk: Tokens in a pass with restored states; it changes speed and memory only.

    Returns:
        The trace.

    Raises:
        DataError: An example is empty.
        ModelError: It has no blocks, or no attention or MLP of its own.
        RecipeError: A wrong option.
        StatisticsError: A probability is not finite.
    """
    request = wanted_effect(reading, fraction, scale, seed, output, window)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    length = min(max_length, positions(base) or max_length)
    data = knowledge_calibration(knowledge_of(examples), tokenizer, max_length=length)
    return Trace(request, tuple(trace_texts(base, data, request, chunk=chunk)))


def wanted_effect(reading: str, fraction: float, scale: float, seed: int, output: str, window: int) -> LayerEffect:
    """Check options and make the request of them.

    Args:
        reading: Which reading of eq. 2.
        fraction: Share of the prompt's tokens that get noise.
        scale: The noise's standard deviation.
        seed: Its seed.
        output: What is restored.
        window: Layers restored together.

    Returns:
        The request.

    Raises:
        RecipeError: A wrong option.
    """
    for option, value, known in (("reading", reading, get_args(Reading)), ("kind", output, get_args(Kind))):
        if value not in known:
            raise RecipeError(option, got=value, wanted=" or ".join(known), next_step=nearest(value, known))
    if window < 1:
        raise RecipeError("window", got=str(window), wanted="1 or more", next_step="ROME takes 10.")
    Noise(fraction, scale, seed)  # checks their ranges
    checked: Any = {"reading": reading, "output": output}
    return LayerEffect("knowledge", fraction=fraction, scale=scale, seed=seed, window=window, **checked)


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _or_none(found: Trace, norm: Norm) -> list[float] | None:
    try:
        return found.normalised(norm).tolist()
    except StatisticsError:  # a model that does not know the answers has no profile; AIE says so
        return None
