"""Every adapter method on fused projections: one weight that holds q, k and v, and one that holds gate and up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.contract.conftest import ADAPTERS, CAUSAL, LOW_RANK
from tests.models import MODELS, VOCAB, Bench, logits, off_by, tokens, train_steps
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from keeptune.adapter.export import Base, ExportOptions, export
from keeptune.adapter.install import install
from keeptune.core.weights import read_weight
from keeptune.model.pretrained import load_model


def phi3() -> PreTrainedModel:
    """qkv_proj (64 x 32: 32 for q, 16 each for k and v) and gate_up_proj (96 x 32)."""
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = Phi3ForCausalLM(config).eval()
    return model


FUSED = {
    "phi3": (phi3, {"qkv_proj": (64, 32), "gate_up_proj": (96, 32)}),
    "gpt2": (MODELS["gpt2"], {"c_attn": (96, 32)}),
}


# LoKI trains none of these. That every method trains and exports gpt2's c_attn is a law of tests/contract.
@pytest.mark.parametrize(
    ("architecture", "case"),
    [("phi3", case) for case in ADAPTERS if case not in CAUSAL]
    + [("gpt2", "lora rank=4"), ("gpt2", "pissa rank=4 alpha=6.0")],
)
def test_a_fused_weight_is_one_target_that_trains_and_exports(case: str, architecture: str, tmp_path: Path) -> None:
    make, shapes = FUSED[architecture]
    make().save_pretrained(tmp_path / "base")
    bench = Bench(make(), tmp_path / "store", roles=list(shapes))
    plan = bench.plan(ADAPTERS[case])
    assert {t.target.role: (t.target.out_features, t.target.in_features) for t in plan.targets} == shapes
    assert len(plan.targets) == make().config.num_hidden_layers * len(shapes)
    model: Any = install(make(), plan, anchor="twin")
    assert off_by(logits(model, tokens()), logits(make(), tokens())) < 1e-5
    train_steps(model)
    base = str(tmp_path / "base")
    for format in ("portable", "merged"):
        done = export(model, plan, tmp_path / format, ExportOptions(format), base=Base(base, lambda: load_model(base)))
        assert (done.format == format) == (case in LOW_RANK or format == "merged")
        if done.format == "portable":
            again: Any = PeftModel.from_pretrained(load_model(base), str(tmp_path / format)).eval()
        else:
            again = load_model(str(tmp_path / format))
        assert off_by(logits(again, tokens(9)), logits(model.eval(), tokens(9))) < 1e-5
    merged, before = load_model(str(tmp_path / "merged")), make()
    for t in plan.targets:
        parts = (read_weight(merged, t.target) - read_weight(before, t.target)).split(16)
        assert all(float(part.abs().max()) > 1e-4 for part in parts), "q, k and v all change"
