"""The known shapes have as many parameters as papers and model cards count."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from keeptune import atlas
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import load_model
from keeptune.pipeline.dry_run import estimate
from keeptune.pipeline.dry_run.estimate import known_models, model_shape

# In millions, as papers, model cards and the hub count them; held to three digits. FARSS Tables 2, 3, 10 and 11,
# LoKI Table 4; Llama-3 from its checkpoint's index (16,060,522,496 bytes); Llama-3.2-3B is 3,407M with an adapter of
# 195M in LoRA-Null's Table 3 (3,213M + 195M); Gemma 3 from Table 1 of its report, embedding and other parameters,
# without vision; gpt-oss from its model card.
COUNTED = {
    "huggyllama/llama-7b": 6738,
    "meta-llama/Llama-2-7b-hf": 6738,
    "meta-llama/Llama-2-7b-chat-hf": 6738,
    "meta-llama/Llama-2-13b-hf": 13016,
    "meta-llama/Llama-2-70b-hf": 68977,
    "meta-llama/Meta-Llama-3-8B": 8030,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8030,
    "meta-llama/Llama-3.1-8B": 8030,
    "meta-llama/Llama-3.1-8B-Instruct": 8030,
    "meta-llama/Llama-3.1-70B-Instruct": 70554,
    "meta-llama/Llama-3.2-1B": 1236,
    "meta-llama/Llama-3.2-1B-Instruct": 1236,
    "meta-llama/Llama-3.2-3B": 3213,
    "meta-llama/Llama-3.2-3B-Instruct": 3213,
    "meta-llama/Llama-3.3-70B-Instruct": 70554,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1100,
    "mistralai/Mistral-7B-v0.1": 7242,
    "mistralai/Mistral-7B-v0.3": 7248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7248,
    "mistralai/Mistral-Nemo-Instruct-2407": 12248,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23572,
    "mistralai/Mixtral-8x7B-v0.1": 46703,
    "Qwen/Qwen2.5-0.5B-Instruct": 494,
    "Qwen/Qwen2.5-1.5B-Instruct": 1544,
    "Qwen/Qwen2.5-3B-Instruct": 3086,
    "Qwen/Qwen2.5-7B": 7616,
    "Qwen/Qwen2.5-7B-Instruct": 7616,
    "Qwen/Qwen2.5-14B-Instruct": 14770,
    "Qwen/Qwen2.5-32B-Instruct": 32764,
    "Qwen/Qwen2.5-72B-Instruct": 72706,
    "Qwen/Qwen3-0.6B": 596,
    "Qwen/Qwen3-1.7B": 1721,
    "Qwen/Qwen3-4B": 4022,
    "Qwen/Qwen3-8B": 8191,
    "Qwen/Qwen3-14B": 14768,
    "Qwen/Qwen3-32B": 32762,
    "Qwen/Qwen3-30B-A3B": 30532,
    "google/gemma-2-2b": 2614,
    "google/gemma-2-9b": 9242,
    "google/gemma-2-27b": 27227,
    "google/gemma-3-1b-it": 1000,
    "google/gemma-3-4b-it": 675 + 3209,
    "google/gemma-3-12b-it": 1012 + 10759,
    "google/gemma-3-27b-it": 1416 + 25600,
    "microsoft/Phi-3-mini-4k-instruct": 3821,
    "microsoft/phi-4": 14660,
    "microsoft/Phi-4-mini-instruct": 3836,
    "openai/gpt-oss-20b": 20910,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 135,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 362,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1711,
    "HuggingFaceTB/SmolLM3-3B": 3075,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1777,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7616,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14770,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 32764,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8030,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": 70554,
    "FacebookAI/roberta-base": 125,
}


@pytest.mark.parametrize("name", known_models())
def test_parameters_are_those_that_are_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shape = model_shape(name, labels=2 if "roberta" in name else None)
    assert shape.source == "known shapes"
    assert shape.parameters / 1e6 == pytest.approx(COUNTED[name], rel=3e-3, abs=0.5)
    assert shape.blocks == max(target.layer for target in shape.linear) + 1


def test_a_folder_with_a_config_is_enough(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ).to_json_file(tmp_path / "config.json")
    shape = model_shape(str(tmp_path))
    assert (shape.source, shape.blocks, shape.wide, shape.vocabulary) == ("config.json", 2, 3 * 48, 100)


def test_a_token_passes_through_the_experts_that_it_reaches() -> None:
    shape = model_shape("Qwen/Qwen3-30B-A3B")
    head = 2 * shape.vocabulary * shape.hidden
    assert (shape.active + head) / 1e9 == pytest.approx(3.34, rel=0.02)  # its name and card: 3.3B activated
    assert shape.wide == 3 * 8 * 768
    assert model_shape("mistralai/Mixtral-8x7B-v0.1").active / 1e9 == pytest.approx(12.9 - 0.26, rel=0.02)


def test_a_packed_base_takes_a_quarter_and_its_scales() -> None:
    shape = model_shape("meta-llama/Llama-2-7b-hf")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    maps = sum(t.out_features * t.in_features for t in shape.linear)
    rest = 2 * (shape.parameters - maps)
    assert estimate.weight_bytes(shape, nf4) == rest + maps // 2 + 4 * maps // 64
    double = estimate.weight_bytes(shape, {**nf4, "bnb_4bit_use_double_quant": True})
    assert double - rest == pytest.approx(maps / 2 + maps / 64 + 4 * maps / 64 / 256, abs=1)
    assert estimate.weight_bytes(shape, {"quant_method": "mxfp4", "dequantize": True}) == 2 * shape.parameters


def test_packed_weights_are_those_of_the_checkpoint() -> None:
    shape = model_shape("openai/gpt-oss-20b")
    said = estimate.weight_bytes(shape, shape.quantization)
    assert said / 2**30 == pytest.approx(12.8, rel=0.02)  # the model card: a checkpoint of 12.8 GiB


def test_a_local_models_shape_is_its_own() -> None:
    folder = str(atlas.model_path())
    shape, model = model_shape(folder), load_model(folder)
    assert shape.source == "config.json"
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert list(shape.linear) == find_targets(model)
    assert shape.dtype == str(model.dtype).removeprefix("torch.")
    assert shape.wide == 3 * model.config.intermediate_size
