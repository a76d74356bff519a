"""The laws of repair: its closed form against least squares on rows, its limits and its monotone drift."""

from __future__ import annotations

import math

import pytest
import torch
from tests.models import relative
from tests.reference.repair_reference import covariance, objective, repaired_by_least_squares
from torch import Tensor

from keeptune.core.errors import DataError
from keeptune.core.low_rank import LowRank
from keeptune.posthoc.repair_equations import (
    Curve,
    Solution,
    damped,
    directions,
    mu_for_drift,
    output_energy,
    white_like,
)

M, N, R, DAMPING = 7, 12, 3, 1e-3
MUS = (0.01, 0.3, 1.0, 30.0)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change(seed: int = 0) -> LowRank:
    return LowRank(draw(M, R, seed=seed), draw(R, N, seed=seed + 1))


def rows(count: int, seed: int, rank: int = N) -> Tensor:
    """Inputs with a strong common direction, in a space of the given rank."""
    return (draw(count, rank, seed=seed) + 2) @ draw(rank, N, seed=seed + 1)


TASK, KNOWLEDGE = rows(40, 10), rows(50, 20)
OMEGA_T, OMEGA_K = covariance(TASK), covariance(KNOWLEDGE)


DAMPED = damped(OMEGA_T, DAMPING)
RATIOS, INVERSE = ALONG = directions(DAMPED, OMEGA_K)


def repaired(start: LowRank, mu: float, omega_k: Tensor = OMEGA_K) -> LowRank:
    return Solution(DAMPED, omega_k, mu).of(start)


def test_damping_is_a_share_of_the_mean_eigenvalue() -> None:
    mean = float(torch.linalg.eigvalsh(OMEGA_T).mean())
    assert relative(DAMPED - OMEGA_T, DAMPING * mean * torch.eye(N, dtype=torch.float64)) < 1e-9
    assert relative(damped(7 * OMEGA_T, DAMPING), 7 * DAMPED) < 1e-12


def test_directions_diagonalise_both_covariances() -> None:
    assert relative(INVERSE.T @ INVERSE, DAMPED) < 1e-9
    assert relative(INVERSE.T @ RATIOS.diag() @ INVERSE, OMEGA_K) < 1e-9
    assert torch.equal(RATIOS, RATIOS.sort().values)
    null, _ = directions(DAMPED, covariance(rows(30, 50, rank=5)))
    assert float(null[: N - 5].max()) < 1e-9 * float(null[-1])
    assert float(null.min()) >= 0


@pytest.mark.parametrize("mu", MUS)
def test_the_closed_form_is_the_least_squares_solution_on_rows(mu: float) -> None:
    wanted = repaired_by_least_squares(change().dense(), TASK, KNOWLEDGE, mu, DAMPING)
    assert relative(repaired(change(), mu).dense(), wanted) < 1e-8


def test_the_closed_form_where_the_data_have_fewer_rows_than_features() -> None:
    task, knowledge = rows(5, 30), rows(4, 40)
    result = Solution(damped(covariance(task), 1e-2), covariance(knowledge), 0.5).of(change())
    wanted = repaired_by_least_squares(change().dense(), task, knowledge, 0.5, 1e-2)
    assert relative(result.dense(), wanted) < 1e-8


@pytest.mark.parametrize("mu", MUS)
def test_any_other_change_has_a_larger_objective(mu: float) -> None:
    start = change()
    best = repaired(start, mu)
    least = objective(best.dense(), start.dense(), TASK, KNOWLEDGE, mu, DAMPING)
    for seed in range(20):
        step = draw(M, N, seed=100 + seed) * 10.0 ** -(seed % 4)
        assert objective(best.dense() + step, start.dense(), TASK, KNOWLEDGE, mu, DAMPING) > least
    assert least < objective(start.dense(), start.dense(), TASK, KNOWLEDGE, mu, DAMPING)


def test_mu_zero_gives_the_change_back_bit_for_bit() -> None:
    start = change()  # float64: a way there and back would leave rounding behind
    result = repaired(start, 0.0)
    assert torch.equal(result.B, start.B)
    assert torch.equal(result.A, start.A)


@pytest.mark.parametrize("mu", MUS)
def test_only_a_changes(mu: float) -> None:
    start = change().to(torch.float32)
    result = repaired(start, mu)
    assert result.B is start.B
    assert result.A.dtype == torch.float32
    assert result.rank == start.rank
    assert not torch.equal(result.A, start.A)


def test_a_large_mu_leaves_only_the_null_space_of_the_knowledge() -> None:
    knowledge = rows(30, 50, rank=5)
    result = repaired(change(), 1e9, covariance(knowledge))
    assert float((knowledge @ result.dense().T).norm()) < 1e-6 * float((knowledge @ change().dense().T).norm())
    assert float((TASK @ result.dense().T).norm()) > 0.01 * float((TASK @ change().dense().T).norm())  # not nothing


def test_the_product_does_not_depend_on_its_factors() -> None:
    start, G = change(), draw(R, R, seed=60)
    other = LowRank(start.B @ G, torch.linalg.solve(G, start.A))
    assert relative(repaired(other, 0.3).dense(), repaired(start, 0.3).dense()) < 1e-9
    grids = [Curve.of(c, ALONG, 1.0).at(0.3) for c in (start, other)]
    assert math.isclose(*grids, rel_tol=1e-9)


@pytest.mark.parametrize("mu", (0.0, 0.3))
def test_no_other_change_of_a_lower_rank_has_a_smaller_objective(mu: float) -> None:
    start, rank = LowRank(draw(M, N, seed=5), torch.eye(N, dtype=torch.float64)), 2
    best = Solution(DAMPED, OMEGA_K, mu).of_rank(start, rank)
    assert best.rank == rank

    def cost(other: LowRank) -> float:
        return objective(other.dense(), start.dense(), TASK, KNOWLEDGE, mu, DAMPING)

    least, whole = cost(best), repaired(start, mu)
    assert cost(whole.truncated(rank)) > least
    for seed in range(20):
        size = 10.0 ** -(seed % 4)
        assert cost(LowRank(best.B + size * draw(M, rank, seed=200 + seed), best.A)) > least
        assert cost(LowRank(best.B, best.A + size * draw(rank, N, seed=300 + seed))) > least
    assert output_energy(best, OMEGA_K) < output_energy(whole, OMEGA_K)
    assert relative(Solution(DAMPED, OMEGA_K, mu).of_rank(start, M).dense(), whole.dense()) < 1e-9


def test_a_change_in_whole_is_repaired_as_in_low_rank() -> None:
    start = change()
    whole = LowRank(start.dense(), torch.eye(N, dtype=torch.float64))
    assert relative(repaired(whole, 0.3).dense(), repaired(start, 0.3).dense()) < 1e-9


@pytest.mark.parametrize("mu", (0.0, *MUS))
def test_curves_give_the_drift_of_the_repaired_change(mu: float) -> None:
    scale = 3.7
    wanted = output_energy(repaired(change(), mu), OMEGA_K) / scale
    assert math.isclose(Curve.of(change(), ALONG, scale).at(mu), wanted, rel_tol=1e-8)


def test_the_drift_is_that_of_the_rows() -> None:
    wanted = float((KNOWLEDGE @ change().dense().T).square().sum(1).mean())
    assert math.isclose(output_energy(change(), OMEGA_K), wanted, rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_drift_never_rises_with_mu(seed: int) -> None:
    knowledge = rows(30, 70 + seed, rank=1 + 3 * seed)
    result = directions(damped(covariance(rows(8, 80 + seed)), 1e-6), covariance(knowledge))
    curve = Curve.of(change(seed), result, 1.0)
    grid = [0.0, *(10.0**power for power in range(-8, 9))]
    drifts = [curve.at(mu) for mu in grid]
    assert all(after <= before for before, after in zip(drifts, drifts[1:], strict=False))
    assert drifts[-1] < 1e-3 * drifts[0]


@pytest.mark.parametrize("share", (0.9, 0.3, 1e-3))
def test_bisection_meets_the_budget_and_never_passes_it(share: float) -> None:
    curves = [Curve.of(change(seed), ALONG, 2.0 + seed) for seed in range(3)]
    before = sum(curve.at(0.0) for curve in curves) / 3
    mu = mu_for_drift(curves, share * before)
    after = sum(curve.at(mu) for curve in curves) / 3
    assert after <= share * before
    assert math.isclose(after, share * before, rel_tol=1e-6)


def test_a_drift_within_the_budget_changes_nothing() -> None:
    curves = [Curve.of(change(), ALONG, 1.0)]
    assert mu_for_drift(curves, curves[0].at(0.0)) == 0.0
    assert mu_for_drift(curves, 2 * curves[0].at(0.0)) == 0.0
    assert mu_for_drift(curves, 0.999 * curves[0].at(0.0)) > 0.0


def test_without_task_data_the_nearest_change_is_kept() -> None:
    tau = float(OMEGA_K.trace()) / N
    wanted = change().dense() @ torch.linalg.inv(torch.eye(N, dtype=torch.float64) + 0.3 * OMEGA_K / tau)
    assert relative(Solution(white_like(OMEGA_K), OMEGA_K, 0.3).of(change()).dense(), wanted) < 1e-9


def test_a_direction_that_no_data_use_is_kept_and_one_that_only_knowledge_uses_is_removed() -> None:
    task, knowledge = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)
    task[0, 0], knowledge[1, 1] = 1.0, 1.0
    result = Solution(damped(task, 1e-4), knowledge, 10.0).of(change()).dense()
    start = change().dense()
    assert relative(result[:, 2:], start[:, 2:]) < 1e-9
    assert relative(result[:, 0], start[:, 0]) < 1e-9
    assert float(result[:, 1].norm()) < 1e-3 * float(start[:, 1].norm())


def test_negative_control_the_two_covariances_are_not_alike() -> None:
    exchanged = Solution(damped(OMEGA_K, DAMPING), OMEGA_T, 1.0).of(change())
    assert relative(exchanged.dense(), repaired(change(), 1.0).dense()) > 1e-2


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="drift"):
        mu_for_drift([Curve.of(change(), ALONG, 1.0)], 0.0)
    with pytest.raises(DataError, match="no token reached"):
        mu_for_drift([], 0.1)
    with pytest.raises(ValueError, match="damping"):
        damped(OMEGA_T, 0.0)
    with pytest.raises(ValueError, match="mean eigenvalue"):
        damped(torch.zeros(N, N), 1e-3)
