"""Random Llamas of a few wide layers, which benchmarks run on."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["random_llama"]


def random_llama(width: int, layers: int, vocabulary: int = 4096, *, heads: int = 8, **more: Any) -> LlamaForCausalLM:
    """Draw a model with two query heads for each key head; seed torch first."""
    sizes = {"intermediate_size": width * 11 // 4, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    fields = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary, **sizes, **more}
    return LlamaForCausalLM(LlamaConfig(**fields))
