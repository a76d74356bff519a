from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.methods.support import SHAPES, UNIQUE, WEIGHTS, built, weight
from tests.models import MODELS, Bench, calibration, relative, train_steps
from tests.reference.peft_reference import start

from keeptune.adapter.install import install
from keeptune.adapter.trained_change import change_of
from keeptune.core.errors import PlanError
from keeptune.methods.mica import Mica
from keeptune.methods.milora import Milora

R = 4
shapes = pytest.mark.parametrize("shape", SHAPES)


@shapes
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_start_is_zero_and_B_orthonormal_and_frozen(shape: str, name: str) -> None:
    plan = built(Mica(rank=R), weight(name, shape))
    assert not plan.init.A.any()
    assert not plan.anchored
    assert plan.trainable == {"A"}
    assert relative(plan.init.B.T @ plan.init.B, torch.eye(R)) < 1e-6


@shapes
@pytest.mark.parametrize("name", UNIQUE)
@pytest.mark.parametrize("alpha", [None, 2.0, 8.0])
def test_B_is_pefts_up_to_signs(shape: str, name: str, alpha: float | None) -> None:
    W = weight(name, shape)
    plan = built(Mica(rank=R, alpha=alpha), W)
    peft, left, scale = start(W, "mica", R, alpha or R)
    assert plan.scale == scale
    assert torch.equal(left, W)
    assert not peft.A.any()
    signs = (plan.init.B * peft.B).sum(0).sign()
    assert relative(plan.init.B * signs, peft.B) < 1e-3  # PEFT's SVD is in float32


@shapes
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weight_writes_no_more_into_B_than_into_any_other_directions(shape: str, name: str) -> None:
    """‖Bᵀ W‖ is the norm of the r smallest singular values; B stays in W's range where W has full rank."""
    W = weight(name, shape).double()
    B = built(Mica(rank=R), weight(name, shape)).init.B.double()
    S = torch.linalg.svdvals(W)
    assert float((B.T @ W).norm()) == pytest.approx(float(S[-R:].norm()), abs=1e-6 * float(S[0]))
    if name in UNIQUE:
        U = torch.linalg.svd(W, full_matrices=False)[0]
        assert relative(U @ U.T @ B, B) < 1e-6


def test_B_spans_what_milora_writes_into() -> None:
    W = weight("random")
    B, minor = built(Mica(rank=R), W).init.B, built(Milora(rank=R), W).init.B
    assert relative(B @ B.T @ minor, minor) < 1e-5


@pytest.mark.parametrize("architecture", MODELS)
def test_what_is_learned_stays_in_the_span_of_B(architecture: str, tmp_path: Path) -> None:
    bench = Bench(MODELS[architecture](), tmp_path / "store", calibration())
    plan = bench.plan(Mica(rank=R))
    tuned = install(bench.model, plan)
    train_steps(tuned, rate=3e-2, everything=True)
    for name, change in change_of(tuned, plan).weights.items():
        B, D = plan[name].init.B, change.dense()
        assert float(D.norm()) > 1e-3
        assert relative(B @ B.T @ D, D) < 1e-5


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(PlanError, match=r"method\.alpha"):
        Mica(alpha=0.0)
    with pytest.raises(PlanError, match=r"method\.dropout"):
        Mica(dropout=2.0)


def test_dropout_is_handed_to_peft() -> None:
    assert Mica(dropout=0.05).peft() == {"lora_dropout": 0.05}
