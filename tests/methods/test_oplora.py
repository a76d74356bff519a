from __future__ import annotations

import pytest
import torch
from tests.methods.support import SHAPES, UNIQUE, built, target_of, weight
from tests.models import relative
from tests.reference.oplora_reference import top

from keeptune.core.errors import PlanError
from keeptune.methods.lora import Lora
from keeptune.methods.oplora import Oplora


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", UNIQUE)
def test_it_starts_as_lora_off_the_largest_triplets(shape: str, name: str) -> None:
    W = weight(name, shape)
    plan, lora = built(Oplora(rank=4, k=3, seed=5), W), built(Lora(rank=4, seed=5), W)
    U, S, V = top(W, 3)
    assert relative(plan.kept["U"] @ plan.kept["U"].T, U @ U.T) < 1e-5
    assert relative(plan.init.A, lora.init.A.double() @ (torch.eye(W.shape[1]) - V @ V.T)) < 1e-6
    assert float((plan.init.A @ plan.kept["V"]).abs().max()) < 1e-7
    assert plan.scale == lora.scale
    assert not plan.init.B.any()
    assert relative(plan.evidence["kept_singular_values"], S) < 1e-6


def test_without_directions_the_plan_is_that_of_lora() -> None:
    W = weight("random")
    plan, lora = built(Oplora(rank=4, k=0), W), built(Lora(rank=4), W)
    assert torch.equal(plan.init.A, lora.init.A)
    assert (dict(plan.kept), dict(plan.evidence), Oplora(k=0).training()) == ({}, {}, {})


def test_directions_that_leave_no_room_for_the_rank_are_refused() -> None:
    target = target_of(weight("random"))  # 16 x 40
    assert Oplora(rank=4, k=12).allocate({target: None})[target].rank == 4
    with pytest.raises(PlanError, match=r"target h\.0\.up: got k 13 and rank 4, wanted at most 16 .*Lower `method\.k`"):
        Oplora(rank=4, k=13).allocate({target: None})
