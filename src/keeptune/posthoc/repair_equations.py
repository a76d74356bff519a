"""repair: keep what a weight change does to task inputs, undo what it does to knowledge inputs. In float64.

With covariances Ω_t (task) and Ω_k (knowledge) of a target's inputs h, and a finished change ΔW, repair solves

    min over ΔW' of  E_t ||(ΔW' - ΔW) h||² + μ E_k ||ΔW' h||²                                                    (1)

It is a sum of quadratics, one for each row of ΔW'; setting the gradient to zero, ``(ΔW' - ΔW) Ω_t + μ ΔW' Ω_k = 0``,

    ΔW' = ΔW Ω_t (Ω_t + μ Ω_k)⁻¹                                                                                 (2)

which multiplies ΔW = B A from the right: only A changes. With ``M = Ω_t + μ Ω_k``, the objective of any X is that of
ΔW' plus ``||(X - ΔW') M^½||²``, so that the best X of rank r is the nearest to ΔW' in that norm (Eckart-Young):

    B = the r leading left singular vectors of ΔW' M^½,  A = Bᵀ ΔW'                                              (3)

How (2) depends on μ follows from one eigenproblem ``Ω_k v = λ Ω_t v`` with ``VᵀΩ_tV = I``: along v, (2) shrinks the
change by ``1 / (1 + μλ)``; λ is how much more the knowledge uses that direction than the task. With the squared
lengths e of the change along the directions its drift on the knowledge is

    tr(ΔW' Ω_k ΔW'ᵀ) = sum e λ / (1 + μλ)²                                                                       (4)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from keeptune.core.errors import DataError
from keeptune.core.low_rank import LowRank

_TOLERANCE = 1e-9  # of log μ
_LARGEST_MU = 1e30


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A target's relative feature drift as a function of μ, at a cost of n operations for each μ.

    Law: ``at(mu) == output_energy(solution(omega_t, omega_k, mu).of(change), omega_k) / scale``, not increasing in μ:
    every term of (4) falls.

    Args:
        energies: e, ``(n,)``: squared length of the change along each direction.
        ratios: λ, ``(n,)``.
        scale: ``tr(W Ω_k Wᵀ)``, which the drift is relative to: it is free of units.
    """

    energies: Tensor
    ratios: Tensor
    scale: float

    @classmethod
    def of(cls, change: LowRank, along: tuple[Tensor, Tensor], scale: float) -> Self:
        """Returns the curve of ΔW, ``(m, n)``, along the :func:`directions` of its input group."""
        B, (ratios, inverse) = change.B.double(), along
        coordinates = change.A.double() @ inverse.T
        return cls(((B.T @ B) @ coordinates * coordinates).sum(0).clamp_min(0), ratios, scale)

    def at(self, mu: float) -> float:
        """Returns the drift that repair with μ leaves, ``tr(ΔW' Ω_k ΔW'ᵀ) / tr(W Ω_k Wᵀ)``."""
        return float((self.energies * self.ratios / (1 + mu * self.ratios).square()).sum()) / self.scale


def damped(omega_t: Tensor, damping: float) -> Tensor:
    """Adds ``damping * tr(Ω_t) / n`` to the diagonal of Ω_t; returns ``(n, n)``, float64.

    Where the task data have no component, Ω_t has no inverse, (1) leaves ΔW' open, and rounding would decide. Damped,
    the task uses every direction a little, ``damping`` of the mean: a direction that neither data set uses is kept, one
    that only the knowledge uses is removed as soon as μ times its variance passes that little. Covariances are held in
    float32, with an error of about ``6e-8`` of their largest eigenvalue: damping should be above it.

    Args:
        omega_t: Ω_t, ``(n, n)``, symmetric positive semi-definite, not zero.
        damping: Share of the mean eigenvalue of Ω_t, above 0.

    Raises:
        ValueError: damping is not above 0, or Ω_t has no trace.
    """
    matrix = omega_t.to(torch.float64, copy=True)
    mean = float(matrix.trace()) / matrix.shape[0]
    if not (damping > 0 and mean > 0):
        raise ValueError(f"damped: got damping {damping} and mean eigenvalue {mean:g}, wanted both above 0")
    matrix.diagonal().add_(damping * mean)
    return matrix


def directions(omega_t: Tensor, omega_k: Tensor) -> tuple[Tensor, Tensor]:
    """Solves ``Ω_k v = λ Ω_t v`` in float64, by one Cholesky factorisation and one symmetric eigenproblem.

    Laws: ``inverseᵀ inverse == Ω_t`` (damped); ``inverseᵀ diag(ratios) inverse == Ω_k``.

    Args:
        omega_t: Ω_t, ``(n, n)``, positive definite: :func:`damped`.
        omega_k: Ω_k, ``(n, n)``, symmetric positive semi-definite.

    Returns:
        The ratios λ, ``(n,)``, ascending, not negative; and the inverse ``V⁻¹``, ``(n, n)``: from a row to its lengths
        along the directions.
    """
    L = torch.linalg.cholesky(omega_t.double())
    half = torch.linalg.solve_triangular(L, omega_k.double(), upper=False)
    both = torch.linalg.solve_triangular(L, half.T, upper=False)
    ratios, Q = torch.linalg.eigh((both + both.T) / 2)
    # Rounding makes eigenvalues of a null space slightly negative; none is, and drift would rise with μ.
    return ratios.clamp_min(0), Q.T @ L.T


def white_like(omega_k: Tensor) -> Tensor:
    """Returns what stands for Ω_t where there are no task data, ``τ I``: white inputs of the knowledge's mean square.

    Then (2) reads ``ΔW' = ΔW (I + μ Ω_k / τ)⁻¹`` with τ the mean eigenvalue of Ω_k: the nearest change in Frobenius
    norm for a price on its drift. It knows nothing of which directions the task needs.
    """
    n = omega_k.shape[0]
    return torch.eye(n, dtype=torch.float64, device=omega_k.device) * (omega_k.double().trace() / n)


class Solution:
    """(2) for one input group and one μ: one Cholesky factorisation serves every change.

    Laws: optimal, any other change has a larger objective, and of all changes of rank r none has a smaller one than
    :meth:`of_rank`; the product does not depend on how the change is factored (``B G``, ``G⁻¹ A``); μ = 0 leaves the
    change itself, bit for bit; as μ grows the change falls into the null space of Ω_k.

    Args:
        omega_t: Ω_t, ``(n, n)``, positive definite: :func:`damped`.
        omega_k: Ω_k, ``(n, n)``, symmetric positive semi-definite.
        mu: μ, finite and not negative.
    """

    def __init__(self, omega_t: Tensor, omega_k: Tensor, mu: float) -> None:
        self._omega_t = omega_t.double()
        self._root = torch.linalg.cholesky(self._omega_t + mu * omega_k.double()) if mu else None

    def of(self, change: LowRank) -> LowRank:
        """Repairs ΔW, ``(m, n)`` (2): B is the same tensor, A has the dtype it had."""
        if self._root is None:
            return change
        A = torch.cholesky_solve(self._omega_t @ change.A.double().T, self._root).T
        return LowRank(change.B, A.to(change.A.dtype).contiguous())

    def of_rank(self, change: LowRank, rank: int) -> LowRank:
        """Returns the best change of a lower rank (3); the change's own rank or more leaves (2) as it is.

        Its drift is no larger than that of (2): B Bᵀ is a projection.
        """
        whole = self.of(change)
        if rank >= whole.rank:
            return whole
        dense = whole.B.double() @ whole.A.double()
        root = torch.linalg.cholesky(self._omega_t) if self._root is None else self._root
        U = torch.linalg.svd(dense @ root, full_matrices=False).U[:, :rank]
        return LowRank(U.to(change.B.dtype).contiguous(), (U.T @ dense).to(change.A.dtype))


def output_energy(change: LowRank, omega: Tensor) -> float:
    """Computes ``E ||ΔW h||² = tr(ΔW Ω ΔWᵀ)`` over the tokens that Ω was taken over, from r x r products."""
    B, A = change.B.double(), change.A.double()
    return max(float(((B.T @ B) * (A @ omega.double() @ A.T)).sum()), 0.0)


def mu_for_drift(curves: Sequence[Curve], drift: float) -> float:
    """Computes the μ at which the mean drift over targets comes down to a budget, by bisection on log μ.

    Law: the mean of ``curve.at(mu)`` is at most ``drift``, and equal to it within rounding unless μ is 0: the drift is
    within the budget already.

    Raises:
        DataError: There is no curve, for no token of the data reached a target.
        ValueError: The budget is not above 0.
    """
    if not curves:
        got, wanted = "data of which no token reached a changed target", "data that reach some of them"
        raise DataError(
            "repair", got=got, wanted=wanted, next_step="Add knowledge, or leave these targets as they are."
        )
    if not drift > 0:
        raise ValueError(f"mu_for_drift: got drift {drift}, wanted one above 0")

    def mean(mu: float) -> float:
        return sum(curve.at(mu) for curve in curves) / len(curves)

    if mean(0.0) <= drift:
        return 0.0
    high = 1.0
    while mean(high) > drift and high < _LARGEST_MU:
        high *= 10
    low = high
    while mean(low) <= drift and low > 1 / _LARGEST_MU:
        low /= 10
    while high / low > 1 + _TOLERANCE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean(middle) > drift else (low, middle)
    return high
