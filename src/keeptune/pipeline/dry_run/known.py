"""What is known without the network: shapes of models, sizes of data files and of benchmarks, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BENCHMARKS", "FILES", "MODELS", "KnownFile"]

_LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA_3 = {**_LLAMA, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "dtype": "bfloat16"}

# From the config.json of each on the hub. Where a paper counts parameters, its count and the one of this shape agree
# (tests/pipeline/dry_run/test_shapes.py).
MODELS: Mapping[str, Mapping[str, Any]] = {
    "huggyllama/llama-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "dtype": "float16",
    },
    "meta-llama/Llama-2-7b-hf": {
        **_LLAMA,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "dtype": "float16",
    },
    "meta-llama/Llama-2-13b-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 4096,
        "dtype": "float16",
    },
    "meta-llama/Meta-Llama-3-8B": {**_LLAMA_3, "max_position_embeddings": 8192},
    "meta-llama/Llama-3.1-8B": {**_LLAMA_3, "max_position_embeddings": 131072},
    "meta-llama/Llama-3.1-8B-Instruct": {**_LLAMA_3, "max_position_embeddings": 131072},
    "meta-llama/Llama-3.2-3B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "mistralai/Mistral-7B-v0.3": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "dtype": "bfloat16",
    },
    "google/gemma-2-9b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "dtype": "float32",
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "dtype": "bfloat16",
    },
    "FacebookAI/roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "dtype": "float32",
    },
}


@dataclass(frozen=True)
class KnownFile:
    """A data file on the hub.

    Args:
        rows: How many it has; None where no source says.
        bytes: Its size; None where no source says.
    """

    rows: int | None = None
    bytes: int | None = None


# Rows of GLUE's training and development sets.
_GLUE: Mapping[str, Mapping[str, int]] = {
    "sst2": {"train": 67_349, "validation": 872},
    "mnli": {"train": 392_702, "validation_matched": 9_815},
    "mrpc": {"train": 3_668, "validation": 408},
    "cola": {"train": 8_551, "validation": 1_043},
    "qnli": {"train": 104_743, "validation": 5_463},
    "qqp": {"train": 363_846, "validation": 40_430},
    "rte": {"train": 2_490, "validation": 277},
    "stsb": {"train": 5_749, "validation": 1_500},
}

# Sizes as the hub's pages show them (1 MB = 10^6 bytes), rows as the data's own papers and cards count them.
FILES: Mapping[str, KnownFile] = {
    "hf://datasets/meta-math/MetaMathQA/MetaMathQA-395K.json": KnownFile(395_000, 396_000_000),
    "hf://datasets/m-a-p/CodeFeedback-Filtered-Instruction/CodeFeedback-Filtered-Instruction.jsonl": KnownFile(
        156_526, 371_228_314
    ),
    "hf://datasets/ise-uiuc/Magicoder-Evol-Instruct-110K/data-evol_instruct-decontaminated.jsonl": KnownFile(
        111_183, 255_000_000
    ),
    "hf://datasets/WizardLMTeam/WizardLM_evol_instruct_V2_196k/WizardLM_evol_instruct_V2_143k.json": KnownFile(
        143_000, 374_925_619
    ),
    "hf://datasets/Lohse/commonsense/commonsense_170k.json": KnownFile(170_420, 97_600_000),
    "hf://datasets/tatsu-lab/alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": KnownFile(52_002, 24_200_000),
    "hf://datasets/google-research-datasets/nq_open/nq_open/train-00000-of-00001.parquet": KnownFile(87_925),
    "hf://datasets/cais/mmlu/all/test-00000-of-00001.parquet": KnownFile(14_042),
    "hf://datasets/Team-ACE/ToolACE/data.json": KnownFile(11_300),
    "hf://datasets/lightblue/reranker_continuous_filt_max7_train/data/train-00000-of-00018.parquet": KnownFile(
        None, 310_000_000
    ),
    **{
        f"hf://datasets/nyu-mll/glue/{task}/{split}-00000-of-00001.parquet": KnownFile(rows)
        for task, splits in _GLUE.items()
        for split, rows in splits.items()
    },
}


# Items of the split that lm-eval scores: the test split, or the validation split where test answers are not public.
BENCHMARKS: Mapping[str, int] = {
    "triviaqa": 17_944,
    "nq_open": 3_610,
    "webqs": 2_032,
    "mmlu": 14_042,
    "hellaswag": 10_042,
    "winogrande": 1_267,
    "arc_challenge": 1_172,
    "arc_easy": 2_376,
    "piqa": 1_838,
    "boolq": 3_270,
    "openbookqa": 500,
    "social_iqa": 1_954,
    "gsm8k": 1_319,
    "math": 5_000,
    "humaneval": 164,
    "mbpp": 500,
    "ifeval": 541,
}
