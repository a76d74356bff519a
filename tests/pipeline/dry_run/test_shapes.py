"""The known shapes have as many parameters as papers and model cards count."""

from __future__ import annotations

import pytest

from keeptune import atlas
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import load_model
from keeptune.pipeline.dry_run.model_shapes import MODELS, model_shape

# FARSS Tables 2, 3, 10 and 11, LoKI Table 4, in millions; Llama-3 from its checkpoint's index (16,060,522,496 bytes);
# Llama-3.2-3B is 3,407M with an adapter of 195M in LoRA-Null's Table 3 (3,213M + 195M).
COUNTED = {
    "huggyllama/llama-7b": 6738,
    "meta-llama/Llama-2-7b-hf": 6738,
    "meta-llama/Llama-2-13b-hf": 13016,
    "meta-llama/Meta-Llama-3-8B": 8030,
    "meta-llama/Llama-3.1-8B": 8030,
    "meta-llama/Llama-3.1-8B-Instruct": 8030,
    "meta-llama/Llama-3.2-3B": 3213,
    "mistralai/Mistral-7B-v0.3": 7248,
    "google/gemma-2-9b": 9242,
    "Qwen/Qwen2.5-0.5B-Instruct": 494,
    "FacebookAI/roberta-base": 125,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_that_are_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shape = model_shape(name, labels=2 if "roberta" in name else None)
    assert shape.source == "known shapes"
    assert round(shape.parameters / 1e6) == COUNTED[name]
    assert shape.blocks == max(target.layer for target in shape.linear) + 1


def test_a_local_models_shape_is_its_own() -> None:
    folder = str(atlas.model_path())
    shape, model = model_shape(folder), load_model(folder)
    assert shape.source == "config.json"
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert list(shape.linear) == find_targets(model)
    assert shape.dtype == str(model.dtype).removeprefix("torch.")
    assert shape.wide == 3 * model.config.intermediate_size
