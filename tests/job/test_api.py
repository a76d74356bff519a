"""The Python interface chooses targets as a recipe does."""

from __future__ import annotations

import pytest
from tests.job.support import MODEL

import keeptune
from keeptune.core.errors import PlanError
from keeptune.model.load import load_model, load_tokenizer


def test_layers_and_targets_of_a_plan() -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    made = keeptune.plan(model, tokenizer, keeptune.Lora(rank=2), targets=["q_proj", "v_proj"], layers=[4, 1])
    assert [(t.target.layer, t.target.role) for t in made.targets] == [
        (1, "q_proj"),
        (1, "v_proj"),
        (4, "q_proj"),
        (4, "v_proj"),
    ]
    with pytest.raises(PlanError, match="every weight"):
        keeptune.plan(model, tokenizer, keeptune.Full(), layers=[0])
