from __future__ import annotations

import logging

import pytest
import torch
from tests.methods.support import SHAPES, UNIQUE, WEIGHTS, built, residual, weight
from tests.models import relative

from keeptune.core.errors import PlanError
from keeptune.methods.milora import Milora
from keeptune.methods.pissa import Pissa

R = 4
shapes = pytest.mark.parametrize("shape", SHAPES)
weights = pytest.mark.parametrize("name", WEIGHTS)
scales = pytest.mark.parametrize("alpha", [None, 2.0, 8.0])


@shapes
@weights
@scales
def test_the_start_has_the_smallest_singular_values_and_the_residual_the_others(
    shape: str, name: str, alpha: float | None
) -> None:
    W = weight(name, shape)
    plan, S = built(Milora(rank=R, alpha=alpha), W), torch.linalg.svdvals(W.double())
    taken = torch.linalg.svdvals((plan.scale * plan.init.dense()).double())
    assert float((taken[:R] - S[-R:]).abs().max()) < 1e-7 * float(S[0])
    left = torch.linalg.svdvals(residual(W, plan))
    assert relative(left[:-R], S[:-R]) < 1e-6
    assert float((plan.evidence["singular_values"] - S[-R:]).abs().max()) < 1e-6 * float(S[0])


@shapes
@pytest.mark.parametrize("name", UNIQUE)
@scales
def test_the_factors_are_those_of_a_whole_svd_up_to_signs(shape: str, name: str, alpha: float | None) -> None:
    """The definition, in float64: B = U_m sqrt(S_m / s), A = sqrt(S_m / s) V_mᵀ."""
    W = weight(name, shape)
    plan = built(Milora(rank=R, alpha=alpha), W)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    root = (S[-R:] * R / (alpha or R)).sqrt()
    B, A = U[:, -R:] * root, root[:, None] * Vh[-R:]
    signs = (plan.init.A.double() * A).sum(1).sign()
    assert relative(plan.init.A, signs[:, None] * A) < 1e-6
    assert relative(plan.init.B, B * signs) < 1e-6


@shapes
def test_pissa_and_milora_split_the_weight_between_them(shape: str) -> None:
    W = weight("random", shape)
    k = min(W.shape)
    top, bottom = built(Pissa(rank=R), W), built(Milora(rank=k - R), W)
    assert relative(top.init.dense() + bottom.init.dense(), W) < 1e-5


def test_a_weight_of_small_rank_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = built(Milora(rank=10), weight("deficient"))
    assert "h.0.up: 8 of the 10 singular values it starts from are zero" in caplog.text
    assert float(plan.evidence["singular_values"][0]) > 0.9


@pytest.mark.parametrize("name", UNIQUE)
def test_a_weight_of_full_rank_is_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(Milora(rank=R), weight(name))
    assert not caplog.records


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(PlanError, match=r"method\.alpha"):
        Milora(alpha=0.0)
    with pytest.raises(PlanError, match=r"method\.dropout"):
        Milora(dropout=-0.1)


def test_dropout_is_handed_to_peft() -> None:
    assert Milora(dropout=0.05).peft() == {"lora_dropout": 0.05}
