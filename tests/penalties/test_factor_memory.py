"""What Ω and Γ take of a model of 8 billion parameters in training, from shapes: docs/penalties/laplace.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.model.blocks import find_targets
from keeptune.penalties.laplace import Laplace


@pytest.mark.parametrize(("curvature", "wanted"), [("delta-kfac", 91.7), ("delta-act", 32.7), ("diag", 0.084)])
def test_what_curvature_takes_of_an_8b_is_what_the_docs_say(curvature: Any, wanted: float) -> None:
    shapes = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, **shapes)  # one block of Llama-3.1-8B
    with torch.device("meta"):
        targets = find_targets(LlamaForCausalLM(config))
    sizes: dict[str, int] = {}
    for target in targets:
        init = LowRank(B=torch.zeros(target.out_features, 8), A=torch.zeros(8, target.in_features))
        planned = TargetPlan(target, Decision(8), init, 1.0, frozenset({"A", "B"}))
        sizes |= Laplace(curvature=curvature).size(planned)
    assert 32 * sum(sizes.values()) / 1e9 == pytest.approx(wanted, rel=0.01)
