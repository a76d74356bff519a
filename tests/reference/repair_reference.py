"""Repair by brute force: rows sampled, stacked and handed to a dense least-squares solver."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(rows: Tensor) -> Tensor:
    """``E[h hᵀ]`` of rows ``(N, n)``."""
    return rows.double().T @ rows.double() / rows.shape[0]


def damping_rows(rows: Tensor, damping: float) -> Tensor:
    """Rows that add ``damping * mean eigenvalue`` to the diagonal of the covariance, once divided by N as it is."""
    n = rows.shape[1]
    mean = float(rows.double().square().sum()) / rows.shape[0] / n
    return torch.eye(n, dtype=torch.float64) * (damping * mean) ** 0.5


def repaired_by_least_squares(dW: Tensor, task: Tensor, knowledge: Tensor, mu: float, damping: float) -> Tensor:
    """Minimise the objective over all matrices: ``X D ≈ Y`` with a row for each token and each damped direction.

    Args:
        dW: ``(m, n)``.
        task: Task inputs, ``(N_t, n)``.
        knowledge: Knowledge inputs, ``(N_k, n)``.
        mu: μ.
        damping: As the library has it.

    Returns:
        ``(m, n)``, float64.
    """
    dW, task, knowledge = dW.double(), task.double(), knowledge.double()
    kept = torch.cat([task / task.shape[0] ** 0.5, damping_rows(task, damping)])
    undone = knowledge * (mu / knowledge.shape[0]) ** 0.5
    X = torch.cat([kept, undone])
    Y = torch.cat([kept @ dW.T, undone.new_zeros(undone.shape[0], dW.shape[0])])
    return torch.linalg.lstsq(X, Y, driver="gelsd").solution.T


def objective(change: Tensor, dW: Tensor, task: Tensor, knowledge: Tensor, mu: float, damping: float) -> float:
    """``E_t ||(ΔW' - ΔW) h||² + μ E_k ||ΔW' h||²``, with the damping's rows among the task's, token by token."""
    change, dW, task, knowledge = change.double(), dW.double(), task.double(), knowledge.double()
    gap = (task @ (change - dW).T).square().sum() / task.shape[0]
    gap = gap + (damping_rows(task, damping) @ (change - dW).T).square().sum()
    return float(gap + mu * (knowledge @ change.T).square().sum() / knowledge.shape[0])
