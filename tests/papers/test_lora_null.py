"""LoRA-Null's equations and invariants (methods.md 4.4), on random, ill-conditioned and rank-deficient inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models import MODELS, Bench, GivenStats, calibration, relative, train_steps, trained_factors
from tests.reference.lora_null_reference import factors, leakage, null_basis
from tests.reference.statistics_reference import stacked_inputs
from torch import Tensor

from keeptune.adapter.anchor import subtract
from keeptune.adapter.install import install
from keeptune.adapter.trained_change import change_of
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.lora_null import LoraNull, null_factors
from keeptune.statistics.covariance import InputCovariance, ReleasedCovariance

M, N_IN, R = 20, 32, 4
TARGET = Target("h.0.up", 0, "up", M, N_IN, input_group="h.0.up")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: Tensor, columns: int, seed: int = 0) -> Tensor:
    left = torch.linalg.qr(normal(N_IN, len(values), seed=seed))[0]
    right = torch.linalg.qr(normal(columns, len(values), seed=seed + 1))[0]
    return (left * values) @ right.T * columns**0.5


# X (n x N) as in the paper; the last two leave a null space of exactly r and of far more than r dimensions.
INPUTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: normal(N_IN, 300),
    "correlated": lambda: normal(N_IN, N_IN, seed=1) @ normal(N_IN, 300),
    "ill-conditioned": lambda: with_singular_values(torch.logspace(0, -3, N_IN, dtype=torch.float64), 300),
    "null space of r": lambda: normal(N_IN, N_IN - R, seed=2),
    "fewer tokens": lambda: normal(N_IN, 10, seed=3),
}
UNIQUE = [name for name in INPUTS if name != "fewer tokens"]


def weight() -> Tensor:
    return normal(M, N_IN, seed=9).float()


def statistics(X: Tensor, *, batch: int = 64) -> GivenStats:
    """Both covariances, by the library's accumulators."""
    rows = X.T.float()
    found = GivenStats()
    for request in (InputCovariance("knowledge", precision="double"), ReleasedCovariance("knowledge")):
        total = request.accumulator(TARGET, torch.device("cpu"), lambda: torch.zeros(0))
        for part in rows.split(batch):
            total.add(part)
        found[request] = total.result()
    return found


def built(X: Tensor, *, method: LoraNull | None = None, batch: int = 64) -> TargetPlan:
    method = method or LoraNull(rank=R)
    return method.build(TARGET, weight(), statistics(X, batch=batch), Decision(R))  # type: ignore[arg-type]


def rounding(X: Tensor) -> float:
    """How far float32 products in Ω can turn the null space (Davis and Kahan): eps lambda_1 / (gap above it)."""
    values = torch.zeros(N_IN, dtype=torch.float64)
    found = torch.linalg.svdvals(X) ** 2
    values[: len(found)] = found
    return 1e-6 + 1e-7 * float(values[0] / (values[N_IN - R - 1] - values[N_IN - R]))


@pytest.mark.parametrize("inputs", INPUTS)
def test_1_residual_and_start_make_the_weight(inputs: str) -> None:
    plan = built(INPUTS[inputs]())
    assert relative(subtract(weight(), plan) + plan.init.dense(), weight()) < 1e-6


@pytest.mark.parametrize("inputs", INPUTS)
def test_2_the_adapter_sees_no_more_of_the_inputs_than_the_bottom_of_their_spectrum(inputs: str) -> None:
    """‖A X‖ / (‖A‖ ‖X‖) <= sigma_{n-r+1} / sigma_1, up to float32 rounding of the factors."""
    X = INPUTS[inputs]()
    S = torch.zeros(N_IN, dtype=torch.float64)
    found = torch.linalg.svdvals(X)
    S[: len(found)] = found
    assert leakage(built(X).init.A, X) <= float(S[N_IN - R] / S[0]) + 1e-6


@pytest.mark.parametrize("inputs", UNIQUE)
def test_3_the_start_is_the_weight_projected_on_the_null_space(inputs: str) -> None:
    X = INPUTS[inputs]()
    U = null_basis(X, R)
    assert relative(built(X).init.dense(), weight().double() @ U @ U.T) < rounding(X)


@pytest.mark.parametrize("inputs", INPUTS)
def test_3_the_start_is_the_weight_on_the_adapters_own_row_space(inputs: str) -> None:
    """Where the null space is larger than r its choice is free, but what was chosen is taken whole."""
    plan = built(INPUTS[inputs]())
    U = torch.linalg.qr(plan.init.A.double().T)[0]
    assert relative(plan.init.dense(), weight().double() @ U @ U.T) < 1e-5


@pytest.mark.parametrize("inputs", INPUTS)
def test_4_the_factors_are_balanced(inputs: str) -> None:
    plan = built(INPUTS[inputs]())
    B, A = plan.init.B.double(), plan.init.A.double()
    S = torch.diag(plan.evidence["singular_values"].double())
    assert relative(A @ A.T, S) < 1e-5
    assert relative(B.T @ B, S) < 1e-5
    assert (plan.evidence["singular_values"].diff() <= 0).all()


@pytest.mark.parametrize("inputs", UNIQUE)
def test_4_the_rows_of_A_lie_in_the_null_space(inputs: str) -> None:
    X = INPUTS[inputs]()
    A, U = built(X).init.A.double(), null_basis(X, R)
    assert relative(A @ U @ U.T, A) < rounding(X)


@pytest.mark.parametrize("inputs", UNIQUE)
def test_4_the_factors_are_those_of_the_full_decompositions_up_to_sign(inputs: str) -> None:
    X = INPUTS[inputs]()
    found, (B, A) = built(X).init, factors(weight(), X, R)
    signs = (found.A.double() * A).sum(1).sign()
    assert relative(found.A, signs[:, None] * A) < 10 * rounding(X)
    assert relative(found.B, B * signs) < 10 * rounding(X)


@pytest.mark.parametrize("architecture", MODELS)
def test_5_v2_keeps_A_and_what_it_learns_stays_in_the_null_space(architecture: str, tmp_path: Path) -> None:
    bench = Bench(MODELS[architecture](), tmp_path / "store", calibration())
    inputs = {t.name: stacked_inputs(bench.model, t.name, bench.data) for t in bench.targets()}
    plan = bench.plan(LoraNull(rank=R, variant="v2"))
    tuned = install(bench.model, plan, anchor="twin")
    train_steps(tuned, rate=3e-2, everything=True)
    for name, trained in trained_factors(tuned, plan).items():
        assert torch.equal(trained.A, plan[name].init.A)
        assert not torch.equal(trained.B, plan[name].init.B)
    for name, change in change_of(tuned, plan).weights.items():
        X = inputs[name]
        S = torch.linalg.svdvals(X)
        # U is orthonormal, so a change confined to it passes on at most sigma_{n-r+1} of any input.
        assert float((change.dense().double() @ X).norm()) <= 1.01 * float(S[-R] * change.dense().double().norm())
        assert change.rank == R


def test_6_inputs_of_low_rank_are_not_seen_at_all() -> None:
    """N < n - r: A X == 0 to rounding."""
    X = INPUTS["fewer tokens"]()
    assert leakage(built(X).init.A, X) < 1e-6
    assert built(X).evidence["null_variance"].max() < 1e-6


@pytest.mark.parametrize("inputs", UNIQUE)
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_7_order_and_batching_of_the_inputs_change_nothing(inputs: str, batch: int) -> None:
    X = INPUTS[inputs]()
    order = torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(4))
    assert relative(built(X[:, order], batch=batch).init.dense(), built(X).init.dense()) < rounding(X)


# The released code


def test_the_released_covariance_leaks_measurably_more_on_an_ill_conditioned_spectrum() -> None:
    X = INPUTS["ill-conditioned"]()
    X[3] *= 30  # an outlier channel, as language models have
    exact = leakage(built(X).init.A, X)
    released = leakage(built(X, method=LoraNull(rank=R, covariance="released")).init.A, X)
    assert released > 3 * exact


@pytest.mark.parametrize("decades", [1, 2, 3, 4])
@pytest.mark.parametrize("outlier", [1, 30])
def test_the_leakage_is_that_of_exact_arithmetic_over_four_decades(decades: int, outlier: int) -> None:
    """Products in float32, sums and eigenvectors in float64, against the full SVD of X."""
    X = with_singular_values(torch.logspace(0, -decades, N_IN, dtype=torch.float64), 300)
    X[3] *= outlier
    _, A = factors(weight(), X, R)
    assert leakage(built(X).init.A, X) <= 1.05 * leakage(A, X)


def test_the_released_path_agrees_with_the_exact_one_where_the_spectrum_is_easy() -> None:
    values = torch.cat([torch.ones(N_IN - R), torch.full((R,), 0.05)]).double()
    X = with_singular_values(values, 300)
    exact, released = built(X).init, built(X, method=LoraNull(rank=R, covariance="released"), batch=300).init
    assert 0 < relative(released.dense(), exact.dense()) < 0.1


@pytest.mark.parametrize("zeros", [0, 2])
def test_directions_that_the_weight_does_not_read_give_zero_singular_values(zeros: int) -> None:
    U = torch.linalg.qr(normal(N_IN, R))[0]
    W = normal(M, N_IN, seed=1) @ (torch.eye(N_IN).double() - U[:, :zeros] @ U[:, :zeros].T)
    init, S = null_factors(W, U)
    assert int((1e-6 * S[0] < S).sum()) == R - zeros
    assert relative(init.dense(), W @ U @ U.T) < 1e-6
