"""A trained tiny model, a random one with the same tokenizer, and the slow reference."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.assets import STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TESTS = Path(__file__).parents[1]


def build_llama(seed: int) -> LlamaForCausalLM:
    """A random Llama whose predictions are far from uniform, so that greedy choices are not near ties."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attention_dropout=0.1,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on a busy machine: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    path = TESTS / "reference/evaluate_reference.py"
    spec = importlib.util.spec_from_file_location("evaluate_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    return build_llama(0)


@pytest.fixture
def other() -> LlamaForCausalLM:
    return build_llama(1)


@pytest.fixture
def stories(tokenizer: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)


@pytest.fixture(params=["tiny", "stories"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Sequence[Mapping[str, Any]]], Path]:
    """Write rows to rows.jsonl; gives the folder."""

    def write_rows(rows: Sequence[Mapping[str, Any]]) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return tmp_path

    return write_rows
