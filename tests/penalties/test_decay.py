"""Weight decay on the factors: half of their squares, of the trained ones only, as SGD's own decay does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import relative, tokens
from tests.training.support import planned, tuned

from keeptune.adapter.install import trained_state
from keeptune.core.errors import PlanError
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.methods.pissa import Pissa
from keeptune.penalties.decay import Decay
from keeptune.training.penalty_engine import Penalties


@pytest.mark.parametrize("method", [Lora(rank=2), LoraFA(rank=2), Pissa(rank=2)], ids=lambda method: method.name)
def test_with_plain_gradient_descent_it_is_the_optimisers_own(method: Any) -> None:
    plan = planned(method, [Decay(strength=0.3)])
    found = []
    for own in (0.0, 0.3):
        model = tuned(plan)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser, penalties = torch.optim.SGD(trained, 0.05, weight_decay=own), Penalties(model, plan)
        for step in range(2):
            ids = tokens(step, (2, 8))
            model(input_ids=ids, labels=ids).loss.backward()
            squares = sum(float(p.detach().double().square().sum()) for p in trained)
            if not own:
                assert float(penalties.step()) == pytest.approx(0.15 * squares, rel=1e-5)
            optimiser.step()
            optimiser.zero_grad()
        found.append(trained_state(model, plan))
    assert all(relative(value, found[1][name]) < 1e-5 for name, value in found[0].items())
    start = trained_state(tuned(plan), plan)
    assert any(relative(value, start[name]) > 1e-3 for name, value in found[0].items())


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(PlanError, match="penalty decay, strength"):
        Decay(strength=-1.0)
