from __future__ import annotations

import pytest
import torch
from tests.methods.support import SHAPES, WEIGHTS, built, normal, residual, weight
from tests.models import relative
from tests.reference.peft_reference import signed_like, start

from keeptune.adapter.anchor import subtract
from keeptune.core.errors import PlanError
from keeptune.methods.olora import Olora, leading_qr

R = 4
shapes = pytest.mark.parametrize("shape", SHAPES)
weights = pytest.mark.parametrize("name", WEIGHTS)
scales = pytest.mark.parametrize("alpha", [None, 2.0, 8.0])


@shapes
@weights
@scales
def test_residual_and_start_make_the_weight(shape: str, name: str, alpha: float | None) -> None:
    W = weight(name, shape)
    plan = built(Olora(rank=R, alpha=alpha), W)
    assert relative(subtract(W, plan) + plan.init.scaled(plan.scale).dense(), W) < 1e-6


@shapes
@weights
@scales
def test_the_factors_are_pefts_up_to_signs(shape: str, name: str, alpha: float | None) -> None:
    """Also where W is of small rank: none of its first columns depends on the others."""
    W = weight(name, shape)
    plan = built(Olora(rank=R, alpha=alpha), W)
    peft, left, scale = start(W, "olora", R, alpha or R)
    assert plan.scale == scale
    found = signed_like(plan.init, peft)
    assert relative(found.A, peft.A) < 1e-4
    assert relative(found.B, peft.B) < 1e-4
    assert relative(residual(W, plan), left) < 1e-4


@shapes
@weights
@pytest.mark.parametrize("r", [1, 4, 16])
def test_laws_of_the_leading_qr(shape: str, name: str, r: int) -> None:
    W = weight(name, shape)
    found = leading_qr(W, r)
    assert relative(found.B.T @ found.B, torch.eye(r)) < 1e-5
    assert relative(found.dense(), found.B @ found.B.T @ W) < 1e-5
    assert relative(found.dense()[:, :r], W[:, :r]) < 1e-5
    assert float(found.A.tril(-1).abs().max()) < 1e-5 * float(W.norm())


@shapes
@weights
def test_the_full_rank_takes_all_of_the_weight(shape: str, name: str) -> None:
    W = weight(name, shape)
    assert relative(leading_qr(W, min(W.shape)).dense(), W) < 1e-5


def test_a_scale_other_than_one_leaves_the_factors_as_they_are() -> None:
    W = weight("random")
    one, four = built(Olora(rank=R), W), built(Olora(rank=R, alpha=4.0 * R), W)
    assert torch.equal(one.init.A, four.init.A)
    assert torch.equal(one.init.B, four.init.B)
    assert (one.scale, four.scale) == (1.0, 4.0)


def test_dependent_first_columns_give_an_orthonormal_B() -> None:
    W = normal(8, 12).float()
    W[:, 1] = W[:, 0]
    W[:, 2] = 0
    plan = built(Olora(rank=R), W)
    assert relative(plan.init.B.T @ plan.init.B, torch.eye(R)) < 1e-5
    assert torch.isfinite(plan.init.A).all()
    assert relative(plan.init.dense()[:, :R], W[:, :R]) < 1e-6


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(PlanError, match=r"method\.alpha"):
        Olora(alpha=-1.0)
    with pytest.raises(PlanError, match=r"method\.dropout"):
        Olora(dropout=1.0)


def test_dropout_is_handed_to_peft() -> None:
    assert Olora(dropout=0.05).peft() == {"lora_dropout": 0.05}
