"""Shapes of models that people tune, so that a dry run needs neither their config nor the network.

The values are those of each one's config.json on the hub. Where a paper or a model card counts parameters, its count
and that of the shape agree (``tests/pipeline/dry_run/test_shapes.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_HALF = {"dtype": "float16"}


def _config(
    kind: str,
    vocabulary: int,
    hidden: int,
    inner: int,
    blocks: int,
    heads: tuple[int, int],
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    """Returns the values of a config; ``heads`` are those of queries and of keys."""
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": positions,
        "dtype": "bfloat16",
        **more,
    }


_LLAMA_2_7B = _config("llama", 32000, 4096, 11008, 32, (32, 32), 4096, **_HALF)
_LLAMA_3_8B = _config("llama", 128256, 4096, 14336, 32, (32, 8), 8192)
_LLAMA_31_8B = {**_LLAMA_3_8B, "max_position_embeddings": 131072}
_LLAMA_31_70B = _config("llama", 128256, 8192, 28672, 80, (64, 8), 131072)
_LLAMA_32_1B = _config("llama", 128256, 2048, 8192, 16, (32, 8), 131072, head_dim=64, **_TIED)
_LLAMA_32_3B = _config("llama", 128256, 3072, 8192, 28, (24, 8), 131072, head_dim=128, **_TIED)
_MISTRAL = {"sliding_window": None}
_MISTRAL_7B_3 = _config("mistral", 32768, 4096, 14336, 32, (32, 8), 32768, **_MISTRAL)
_QWEN_05B = _config("qwen2", 151936, 896, 4864, 24, (14, 2), 32768, **_TIED)
_QWEN_15B = _config("qwen2", 151936, 1536, 8960, 28, (12, 2), 32768, **_TIED)
_QWEN_3B = _config("qwen2", 151936, 2048, 11008, 36, (16, 2), 32768, **_TIED)
_QWEN_7B = _config("qwen2", 152064, 3584, 18944, 28, (28, 4), 32768, **_UNTIED)
_QWEN_14B = _config("qwen2", 152064, 5120, 13824, 48, (40, 8), 32768, **_UNTIED)
_QWEN_32B = _config("qwen2", 152064, 5120, 27648, 64, (40, 8), 32768, **_UNTIED)
_QWEN_72B = _config("qwen2", 152064, 8192, 29568, 80, (64, 8), 32768, **_UNTIED)
_WIDE = {"head_dim": 128}
_QWEN3 = {**_WIDE, **_UNTIED}
_QWEN3_MOE = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_GEMMA = {"head_dim": 256, **_TIED}
_LONG = 131072

MODELS: Mapping[str, Mapping[str, Any]] = {
    "huggyllama/llama-7b": {**_LLAMA_2_7B, "max_position_embeddings": 2048},
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_2_7B,
    "meta-llama/Llama-2-13b-hf": _config("llama", 32000, 5120, 13824, 40, (40, 40), 4096, **_HALF),
    "meta-llama/Llama-2-70b-hf": _config("llama", 32000, 8192, 28672, 80, (64, 8), 4096, **_HALF),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_31_70B,
    "meta-llama/Llama-3.2-1B": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_32_3B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_31_70B,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _config("llama", 32000, 2048, 5632, 22, (32, 4), 2048),
    "mistralai/Mistral-7B-v0.1": _config("mistral", 32000, 4096, 14336, 32, (32, 8), 32768, sliding_window=4096),
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B_3,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B_3,
    "mistralai/Mistral-Nemo-Instruct-2407": _config(
        "mistral", 131072, 5120, 14336, 40, (32, 8), _LONG, **_MISTRAL, **_WIDE
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": _config(
        "mistral", 131072, 5120, 32768, 40, (32, 8), 32768, **_MISTRAL, **_WIDE
    ),
    "mistralai/Mixtral-8x7B-v0.1": _config(
        "mixtral", 32000, 4096, 14336, 32, (32, 8), 32768, num_local_experts=8, num_experts_per_tok=2, **_MISTRAL
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_05B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_15B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN_3B,
    "Qwen/Qwen2.5-7B": {**_QWEN_7B, "max_position_embeddings": _LONG},
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2.5-14B-Instruct": _QWEN_14B,
    "Qwen/Qwen2.5-32B-Instruct": _QWEN_32B,
    "Qwen/Qwen2.5-72B-Instruct": _QWEN_72B,
    "Qwen/Qwen3-0.6B": _config("qwen3", 151936, 1024, 3072, 28, (16, 8), 40960, **_WIDE, **_TIED),
    "Qwen/Qwen3-1.7B": _config("qwen3", 151936, 2048, 6144, 28, (16, 8), 40960, **_WIDE, **_TIED),
    "Qwen/Qwen3-4B": _config("qwen3", 151936, 2560, 9728, 36, (32, 8), 40960, **_WIDE, **_TIED),
    "Qwen/Qwen3-8B": _config("qwen3", 151936, 4096, 12288, 36, (32, 8), 40960, **_QWEN3),
    "Qwen/Qwen3-14B": _config("qwen3", 151936, 5120, 17408, 40, (40, 8), 40960, **_QWEN3),
    "Qwen/Qwen3-32B": _config("qwen3", 151936, 5120, 25600, 64, (64, 8), 40960, **_QWEN3),
    "Qwen/Qwen3-30B-A3B": _config("qwen3_moe", 151936, 2048, 6144, 48, (32, 4), 40960, **_QWEN3, **_QWEN3_MOE),
    "google/gemma-2-2b": _config("gemma2", 256000, 2304, 9216, 26, (8, 4), 8192, **_GEMMA, dtype="float32"),
    "google/gemma-2-9b": _config("gemma2", 256000, 3584, 14336, 42, (16, 8), 8192, **_GEMMA, dtype="float32"),
    "google/gemma-2-27b": _config("gemma2", 256000, 4608, 36864, 46, (32, 16), 8192, **_WIDE, **_TIED, dtype="float32"),
    # The language models of Gemma 3, without the part that reads images.
    "google/gemma-3-1b-it": _config("gemma3_text", 262144, 1152, 6912, 26, (4, 1), 32768, **_GEMMA),
    "google/gemma-3-4b-it": _config("gemma3_text", 262208, 2560, 10240, 34, (8, 4), _LONG, **_GEMMA),
    "google/gemma-3-12b-it": _config("gemma3_text", 262208, 3840, 15360, 48, (16, 8), _LONG, **_GEMMA),
    "google/gemma-3-27b-it": _config("gemma3_text", 262208, 5376, 21504, 62, (32, 16), _LONG, **_WIDE, **_TIED),
    "microsoft/Phi-3-mini-4k-instruct": _config("phi3", 32064, 3072, 8192, 32, (32, 32), 4096, pad_token_id=32000),
    "microsoft/phi-4": _config("phi3", 100352, 5120, 17920, 40, (40, 10), 16384, pad_token_id=100349),
    "microsoft/Phi-4-mini-instruct": _config(
        "phi3", 200064, 3072, 8192, 32, (24, 8), _LONG, pad_token_id=199999, **_TIED
    ),
    "openai/gpt-oss-20b": _config(
        "gpt_oss",
        201088,
        2880,
        2880,
        24,
        (64, 8),
        _LONG,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        attention_bias=True,
        quantization_config={"quant_method": "mxfp4"},
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _config("llama", 49152, 576, 1536, 30, (9, 3), 8192, **_TIED),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _config("llama", 49152, 960, 2560, 32, (15, 5), 8192, **_TIED),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _config("llama", 49152, 2048, 8192, 24, (32, 32), 8192, **_TIED),
    "HuggingFaceTB/SmolLM3-3B": _config("smollm3", 128256, 2048, 11008, 36, (16, 4), 65536, **_TIED),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {**_QWEN_15B, **_UNTIED, "max_position_embeddings": _LONG},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {**_QWEN_7B, "max_position_embeddings": _LONG},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": {**_QWEN_14B, "max_position_embeddings": _LONG},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": {**_QWEN_32B, "max_position_embeddings": _LONG},
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_31_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA_31_70B,
    "FacebookAI/roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "dtype": "float32",
    },
}
