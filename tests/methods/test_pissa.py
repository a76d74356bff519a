from __future__ import annotations

import logging

import pytest
import torch
from tests.methods.support import SHAPES, UNIQUE, WEIGHTS, built, residual, target_of, weight
from tests.models import relative
from tests.reference.peft_reference import signed_like, start

from keeptune.core.errors import PlanError
from keeptune.methods.base import allot_rank
from keeptune.methods.pissa import Pissa

R = 4
shapes = pytest.mark.parametrize("shape", SHAPES)
weights = pytest.mark.parametrize("name", WEIGHTS)
scales = pytest.mark.parametrize("alpha", [None, 2.0, 8.0])


@shapes
@weights
@scales
def test_the_start_has_the_largest_singular_values_and_the_residual_the_others(
    shape: str, name: str, alpha: float | None
) -> None:
    W = weight(name, shape)
    plan, S = built(Pissa(rank=R, alpha=alpha), W), torch.linalg.svdvals(W.double())
    taken = torch.linalg.svdvals((plan.scale * plan.init.dense()).double())
    assert relative(taken[:R], S[:R]) < 1e-6
    left = torch.linalg.svdvals(residual(W, plan))
    assert float((left[:-R] - S[R:]).abs().max()) < 1e-6 * float(S[0])
    assert relative(plan.evidence["singular_values"], S[:R]) < 1e-6


@shapes
@pytest.mark.parametrize("name", UNIQUE)
@scales
def test_the_factors_are_pefts_up_to_signs(shape: str, name: str, alpha: float | None) -> None:
    W = weight(name, shape)
    plan = built(Pissa(rank=R, alpha=alpha), W)
    peft, left, scale = start(W, "pissa", R, alpha or R)
    assert plan.scale == scale
    found = signed_like(plan.init, peft)
    assert relative(found.A, peft.A) < 1e-4
    assert relative(found.B, peft.B) < 1e-4
    assert relative(residual(W, plan), left) < 1e-4


@shapes
def test_the_factors_are_balanced(shape: str) -> None:
    plan = built(Pissa(rank=R, alpha=8.0), weight("random", shape))
    S = torch.diag(plan.evidence["singular_values"]) / plan.scale
    assert relative(plan.init.B.T @ plan.init.B, S) < 1e-5
    assert relative(plan.init.A @ plan.init.A.T, S) < 1e-5


@shapes
@weights
def test_the_full_rank_takes_all_of_the_weight(shape: str, name: str) -> None:
    W = weight(name, shape)
    plan = built(Pissa(rank=min(W.shape)), W)
    assert relative(plan.init.dense(), W) < 1e-5


# What does not fit


def test_a_weight_of_small_rank_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(Pissa(rank=12), weight("deficient"))
    assert "h.0.up: 4 of the 12 singular values it starts from are zero" in caplog.text


def test_a_weight_of_full_rank_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(Pissa(rank=12), weight("falling"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "where"),
    [({"alpha": 0.0}, "alpha"), ({"alpha": -1.0}, "alpha"), ({"dropout": 1.0}, "dropout")],
)
def test_options_out_of_range_are_refused(options: dict[str, float], where: str) -> None:
    with pytest.raises(PlanError, match=rf"method\.{where}"):
        Pissa(**options)  # type: ignore[arg-type]


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    target = target_of(weight("random"))
    assert Pissa(rank=16).allocate({target: None}) == {target: allot_rank(target, 16, "pissa")}
    with pytest.raises(PlanError, match="rank 17"):
        Pissa(rank=17).allocate({target: None})


def test_dropout_is_handed_to_peft() -> None:
    assert Pissa(dropout=0.05).peft() == {"lora_dropout": 0.05}
    assert Pissa().peft() == {}
