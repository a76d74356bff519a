from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraGAConfig
from tests.methods.support import SHAPES, built, normal, residual, target_of, weight, with_singular_values
from tests.models import MODELS, Bench, GivenStats, relative
from tests.reference.peft_reference import OneLinear, signed_like, start_of
from torch import Tensor

from keeptune.adapter.anchor import subtract
from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.methods.lora_ga import LoraGA
from keeptune.statistics.gradient import WeightGradient

R = 4
GRADIENT = WeightGradient("task", labels="true")
DIRECTIONS = ["ArB2r", "A2rBr", "ArBr"]
SCALES = ["stable", "unit", "gd_scale", "weight_svd"]
shapes = pytest.mark.parametrize("shape", SHAPES)
directions = pytest.mark.parametrize("direction", DIRECTIONS)
scales = pytest.mark.parametrize("scale", SCALES)


def gradient(shape: str) -> Tensor:
    """Singular values that are well apart."""
    return with_singular_values(SHAPES[shape], torch.logspace(-1, -2.5, 16), seed=11).float()


def planned(W: Tensor, G: Tensor, **options: Any) -> Any:
    return built(LoraGA(**{"rank": R} | options), W, stats=GivenStats({GRADIENT: G}))


def by_peft(W: Tensor, G: Tensor, alpha: float, **options: Any) -> tuple[LowRank, Tensor, float]:
    model = OneLinear(W)
    model.up._peft_loraga_grad = G
    return start_of(model, "lora_ga", R, alpha, lora_ga_config=LoraGAConfig(**options))


@shapes
@directions
@scales
@pytest.mark.parametrize("alpha", [4.0, 12.0])
def test_with_pefts_factors_the_start_is_pefts(shape: str, direction: str, scale: str, alpha: float) -> None:
    """Signs of rows of A and of columns of B are each free, as they belong to different triplets."""
    W, G = weight("random", shape), gradient(shape)
    plan = planned(W, G, direction=direction, scale=scale, alpha=alpha, factors="peft")
    peft, left, s = by_peft(W, G, alpha, direction=direction, scale=scale)
    assert plan.scale == s
    assert relative(signed_like(plan.init, peft).A, peft.A) < 1e-3
    columns = (plan.init.B * peft.B).sum(0).sign()
    # PEFT takes the weight's largest singular value from a randomised SVD that carries no extra vectors along.
    assert relative(plan.init.B * columns, peft.B) < (0.05 if scale == "weight_svd" else 1e-3)
    assert relative(residual(W, plan) + plan.scale * plan.init.dense(), W) < 1e-6
    assert relative(left + s * peft.dense(), W) < 1e-5


@shapes
@directions
@scales
def test_the_directions_are_pefts_and_the_lengths_the_papers(shape: str, direction: str, scale: str) -> None:
    W, G = weight("random", shape), gradient(shape)
    plan = planned(W, G, direction=direction, scale=scale, alpha=8.0)
    peft, _, s = by_peft(W, G, 8.0, direction=direction, scale="unit")
    top = torch.linalg.svdvals(W.double())[:R]
    wanted = {
        "stable": W.shape[0] ** 0.25 / 4,
        "unit": 1.0,
        "gd_scale": 1 / s,
        "weight_svd": float((top / s).sqrt().mean()),
    }[scale]
    for found, theirs in ((plan.init.A, peft.A), (plan.init.B.T, peft.B.T)):
        unit = theirs / theirs.norm(dim=1, keepdim=True)
        signs = (found * unit).sum(1, keepdim=True).sign()
        assert relative(found, wanted * signs * unit) < 1e-3


@shapes
@directions
def test_residual_and_start_make_the_weight(shape: str, direction: str) -> None:
    W = weight("random", shape)
    plan = planned(W, gradient(shape), direction=direction)
    assert plan.scale == 2.0
    assert relative(subtract(W, plan) + plan.init.scaled(plan.scale).dense(), W) < 1e-6


@shapes
@directions
@scales
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**20])
def test_the_size_of_the_gradient_changes_nothing(shape: str, direction: str, scale: str, factor: float) -> None:
    """Nor the size of the loss, then; PEFT's factors grow with it unless the weight sets their size."""
    W, G = weight("random", shape), gradient(shape)
    one, other = (planned(W, g, direction=direction, scale=scale).init for g in (G, factor * G))
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)
    if scale != "weight_svd":
        one, other = (planned(W, g, direction=direction, scale=scale, factors="peft").init for g in (G, factor * G))
        assert relative(other.B, factor * one.B) < 1e-6


@shapes
@pytest.mark.parametrize("direction", [*DIRECTIONS, "random"])
def test_the_first_step_moves_the_weight_as_the_best_approximation_of_the_gradient(shape: str, direction: str) -> None:
    """With c = 1 and s = 1, a small step on A and B moves W by G's 2r leading triplets (the paper's theorem 3.1)."""
    W, G = weight("random", shape), gradient(shape).double()
    start = planned(W, G.float(), direction=direction, scale="unit", alpha=R).init
    A, B = start.A.double(), start.B.double()
    moved = G @ A.T @ A + B @ B.T @ G
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    assert relative(moved, (U[:, : 2 * R] * S[: 2 * R]) @ Vh[: 2 * R]) < 1e-5


@shapes
def test_random_directions_are_the_seeds_and_the_targets(shape: str) -> None:
    W, G = weight("random", shape), gradient(shape)
    first = planned(W, G, direction="random").init.A
    torch.manual_seed(9)
    assert torch.equal(planned(W, G, direction="random").init.A, first)
    assert not torch.equal(planned(W, G, direction="random", seed=1).init.A, first)
    method = LoraGA(rank=R, direction="random")
    assert not torch.equal(built(method, W, stats=GivenStats({GRADIENT: G}), name="h.1.up").init.A, first)


def test_a_target_without_a_gradient_is_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    W = weight("random")
    one, other = target_of(W), target_of(W, "h.1.up")
    method = LoraGA(rank=R)
    with caplog.at_level(logging.WARNING):
        score = method.score(other, W, GivenStats({GRADIENT: torch.zeros_like(W)}))  # type: ignore[arg-type]
        decisions = method.allocate({one: 1.0, other: score})
    assert [decisions[t].rank for t in (one, other)] == [R, 0]
    assert "h.1.up: the gradient is zero" in caplog.text


def test_a_gradient_of_small_rank_gives_orthonormal_factors_all_the_same() -> None:
    G = normal(16, 3) @ normal(3, 40, seed=1)
    plan = planned(weight("random"), G.float(), scale="unit")
    assert relative(plan.init.A @ plan.init.A.T, torch.eye(R)) < 1e-5
    assert relative(plan.init.B.T @ plan.init.B, torch.eye(R)) < 1e-5


def test_twice_the_rank_must_fit_the_target() -> None:
    target = target_of(weight("random"))
    assert LoraGA(rank=8).allocate({target: 1.0})[target].rank == 8
    with pytest.raises(PlanError, match=r"2 x rank.*h\.0\.up: got rank 18, wanted 1 to 16"):
        LoraGA(rank=9).allocate({target: 1.0})


@pytest.mark.parametrize(
    ("options", "where"),
    [({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout"), ({"stable_gamma": 0.0}, "stable_gamma")],
)
def test_options_out_of_range_are_refused(options: dict[str, float], where: str) -> None:
    with pytest.raises(PlanError, match=rf"method\.{where}"):
        LoraGA(**options)  # type: ignore[arg-type]


def test_dropout_is_handed_to_peft() -> None:
    assert LoraGA(dropout=0.05).peft() == {"lora_dropout": 0.05}


@pytest.mark.parametrize("architecture", [name for name in MODELS if name != "roberta"])
def test_the_gradient_is_that_of_the_summed_loss(architecture: str, tmp_path: Path) -> None:
    """The span of A and B is that of autograd's gradient, one text at a time (of a language model)."""
    bench = Bench(MODELS[architecture](), tmp_path / "store")
    plan = bench.plan(LoraGA(rank=R, scale="unit"))
    model, task = bench.model, bench.task
    assert task.prompts is not None
    model.requires_grad_(True)
    for row, prompt in zip(task.sequences, task.prompts, strict=True):
        ids = torch.tensor([row])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        at = torch.arange(len(row) - 1)
        at = at[at + 1 >= prompt]
        (-logits[at, ids[0, 1:][at]]).sum().backward()  # type: ignore[no-untyped-call]
    for target_plan in plan.targets:
        G = model.get_submodule(target_plan.target.name).weight.grad
        assert isinstance(G, Tensor)
        G = G.T if target_plan.target.transposed else G
        U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        A, B = target_plan.init.A.double(), target_plan.init.B.double()
        assert relative(A.T @ A, Vh[:R].T @ Vh[:R]) < 1e-3
        assert relative(B @ B.T, U[:, R : 2 * R] @ U[:, R : 2 * R].T) < 1e-3
