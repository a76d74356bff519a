from __future__ import annotations

import pytest
import torch
from tests.methods.support import SHAPES, built, target_of, weight
from tests.models import relative
from tests.reference.oplora_reference import top

from keeptune.core.errors import PlanError
from keeptune.methods.lora import Lora
from keeptune.methods.oplora import Oplora


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0, 3])
def test_it_starts_as_lora_off_the_largest_triplets(shape: str, k: int) -> None:
    W = weight("random", shape)
    plan, lora = built(Oplora(rank=4, k=k, seed=5), W), built(Lora(rank=4, seed=5), W)
    U, _, V = top(W, k)
    assert relative(plan.init.A, lora.init.A.double() @ (torch.eye(W.shape[1]) - V @ V.T)) < (1e-6 if k else 1e-30)
    assert (plan.scale, bool(plan.init.B.any()), bool(plan.kept)) == (lora.scale, False, k > 0)
    for side, Q in (("U", U), ("V", V)) if k else ():
        assert relative(plan.kept[side] @ plan.kept[side].T, Q @ Q.T) < 1e-5


def test_directions_that_leave_no_room_for_the_rank_are_refused() -> None:
    target = target_of(weight("random"))  # 16 x 40
    assert Oplora(rank=4, k=12).allocate({target: None})[target].rank == 4
    with pytest.raises(PlanError, match=r"method\.k: got 13, wanted at most 12 beside rank 4 at h\.0\.up\. .*role up"):
        Oplora(rank=4, k=13).allocate({target: None})
