"""stories260K with a random adapter, and benchmarks on the slices of assets/."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.assets import DATA

from keeptune.evaluation import AdapterPair, NamedBenchmark

FOLDERS = {
    "gsm8k": "gsm8k",
    "nq_open": "nq_open",
    "efficientqa": "nq_open",
    "webqs": "webquestions",
    "mmlu": "mmlu",
    "arc_easy": "commonsense",
    "boolq": "commonsense",
    "openbookqa": "commonsense",
    "humaneval": "humaneval",
    "mbpp": "mbpp",
    "ifeval": "ifeval",
    "tinystories": "tinystories",
    "c4_text": "c4_text",
}


def local(name: str, **more: Any) -> NamedBenchmark:
    """A benchmark on a slice of its data, cut short."""
    code = name in ("humaneval", "mbpp")
    return NamedBenchmark(**{"name": name, "data": str(DATA / FOLDERS[name]), "examples": 2, "run_code": code} | more)


@pytest.fixture(autouse=True, scope="session")
def _engine() -> None:
    pytest.importorskip("lm_eval")


@pytest.fixture
def pair(stories: Any) -> AdapterPair:
    """stories260K with a random adapter, in training mode."""
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3, init_lora_weights=False)
    return AdapterPair(get_peft_model(stories, config).train())
