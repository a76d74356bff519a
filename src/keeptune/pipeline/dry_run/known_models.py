"""Shapes of models that are known without the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["MODELS"]


def _llama(vocabulary: int, hidden: int, inner: int, blocks: int, heads: int, positions: int, **more: Any) -> Any:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "dtype": "bfloat16" if "num_key_value_heads" in more else "float16",
        **more,
    }


_8B = {"num_key_value_heads": 8}
_TIED = {"tie_word_embeddings": True}

# From the config.json of each on the hub. Where a paper counts parameters, its count and the one of this shape agree
# (tests/pipeline/dry_run/test_shapes.py).
MODELS: Mapping[str, Mapping[str, Any]] = {
    "huggyllama/llama-7b": _llama(32000, 4096, 11008, 32, 32, 2048),
    "meta-llama/Llama-2-7b-hf": _llama(32000, 4096, 11008, 32, 32, 4096),
    "meta-llama/Llama-2-13b-hf": _llama(32000, 5120, 13824, 40, 40, 4096),
    "meta-llama/Meta-Llama-3-8B": _llama(128256, 4096, 14336, 32, 32, 8192, **_8B),
    "meta-llama/Llama-3.1-8B": _llama(128256, 4096, 14336, 32, 32, 131072, **_8B),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(128256, 4096, 14336, 32, 32, 131072, **_8B),
    "meta-llama/Llama-3.2-3B": _llama(128256, 3072, 8192, 28, 24, 131072, **_8B, **_TIED, head_dim=128),
    "mistralai/Mistral-7B-v0.3": _llama(
        32768, 4096, 14336, 32, 32, 32768, **_8B, model_type="mistral", sliding_window=None
    ),
    "google/gemma-2-9b": _llama(
        256000, 3584, 14336, 42, 16, 8192, **_8B, model_type="gemma2", head_dim=256, dtype="float32"
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": _llama(
        151936, 896, 4864, 24, 14, 32768, num_key_value_heads=2, **_TIED, model_type="qwen2"
    ),
    "FacebookAI/roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "dtype": "float32",
    },
}
