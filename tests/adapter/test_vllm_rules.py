"""vLLM's loader rules: what it takes, what it refuses, and the smallest --max-lora-rank that it has.

Each case names what vLLM 0.33.0 checks in ``vllm/lora/peft_helper.py``, ``vllm/lora/utils.py`` or
``vllm/config/lora.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models import MODELS

from keeptune.adapter.export import verdict_on
from keeptune.adapter.vllm_rules import VLLM, vllm_verdict

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
FACTORS = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]


@pytest.mark.parametrize(
    ("rank", "served"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16), (20, 32), (33, 64), (64, 64), (100, 128), (129, 256), (257, 320)]
    + [(320, 320), (321, 512), (512, 512)],
)
def test_the_smallest_max_lora_rank_in_vllms_set_is_named(rank: int, served: int) -> None:
    verdict = vllm_verdict({**PLAIN, "r": rank}, FACTORS)
    assert verdict.max_lora_rank == served
    assert verdict.line("") == f"{VLLM} serves this with --max-lora-rank {served}"


def test_the_largest_rank_of_a_pattern_counts_and_old_versions_are_named() -> None:
    verdict = vllm_verdict({**PLAIN, "rank_pattern": {"q_proj": 40}, "alpha_pattern": {"q_proj": 40}}, FACTORS)
    assert (verdict.max_lora_rank, verdict.refused) == (64, ())
    assert "from 0.32.0 on" in verdict.line("")


def test_rslora_is_taken() -> None:
    assert vllm_verdict({**PLAIN, "use_rslora": True}, FACTORS) == vllm_verdict(PLAIN, FACTORS)


@pytest.mark.parametrize(
    ("fields", "names", "reason"),
    [
        ({"r": 513}, [], "rank 513, above 512"),
        ({"rank_pattern": {"q_proj": 600}}, [], "rank 600"),
        ({"r": 0}, [], "not positive"),
        ({"modules_to_save": ["lm_head"]}, [], "modules_to_save: lm_head"),
        ({"bias": "lora_only"}, [], "bias: lora_only"),
        ({"lora_bias": True}, ["base_model.model.q_proj.lora_B.bias"], "lora_bias: True"),
        ({"use_dora": True}, ["base_model.model.q_proj.lora_magnitude_vector"], "use_dora: True"),
        ({"init_lora_weights": "pissa_niter_4"}, [], "rewrites the base"),
        ({"layer_replication": [[0, 2]]}, [], "layer_replication"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, [], "52194"),
        ({}, ["base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"], "none of a LoRA's"),
        ({}, ["base_model.model.embed_in.lora_embedding_A"], "LoRA on the embedding embed_in"),
        ({"peft_type": "IA3"}, [], "of type IA3"),
        ({"target_modules": ...}, [], "no target_modules"),
    ],
)
def test_what_vllm_refuses_is_named_and_the_merged_form_offered(
    fields: dict[str, Any], names: list[str], reason: str
) -> None:
    config = {key: value for key, value in {**PLAIN, **fields}.items() if value is not ...}
    verdict = vllm_verdict(config, [*FACTORS, *names])
    assert verdict.max_lora_rank == 0
    assert any(reason in said for said in verdict.refused)
    assert verdict.line("keeptune merge a b").endswith("use the merged form: keeptune merge a b")


@pytest.mark.parametrize(
    ("fields", "names", "condition"),
    [
        ({"modules_to_save": ["score"]}, ["base_model.model.score.weight"], "classifier with a head"),
        ({}, ["base_model.model.model.embed_tokens.lora_embedding_A"], "embedding_modules"),
        ({}, ["base_model.model.lm_head.lora_A.weight"], "embedding_modules"),
        ({}, ["base_model.model.lm_head.base_layer.weight"], None),
    ],
)
def test_what_depends_on_the_served_model_is_said(fields: Any, names: list[str], condition: str | None) -> None:
    verdict = vllm_verdict({**PLAIN, **fields}, [*FACTORS, *names])
    assert (verdict.max_lora_rank, verdict.refused) == (8, ())
    assert bool(verdict.conditions) == (condition is not None)
    assert (condition or "") in verdict.line("")


@pytest.mark.parametrize(
    ("options", "refused"),
    [({"use_rslora": True}, ""), ({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "lm_head")],
)
def test_files_that_peft_writes_are_judged_by_their_config_and_tensors(
    options: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    model = get_peft_model(MODELS["llama"](dtype=torch.float32), LoraConfig(r=4, target_modules=["q_proj"], **options))
    model.save_pretrained(str(tmp_path))
    assert refused in ", ".join(verdict_on(tmp_path).refused)
    assert bool(refused) == bool(verdict_on(tmp_path).refused)
