"""LoRA-Null's build against the definition computed plainly, at 1024 x 1024 and rank 64."""

from __future__ import annotations

import torch
from scipy.linalg import subspace_angles
from timing import compare
from torch import Tensor

from keeptune.methods.lora_null import null_factors, null_space

N, R = 1024, 64


def definition(omega: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Compute eqs. 7-12 as written: full SVD of the covariance, full SVD of W U Uᵀ, in float64."""
    U = torch.linalg.svd(omega.double())[0][:, -R:]
    P, S, Vh = torch.linalg.svd(W.double() @ U @ U.T)
    root = S[:R].sqrt()
    return P[:, :R] * root, root[:, None] * Vh[:R]


def rows() -> list[dict[str, str]]:
    """Time one target, and three that share an input as q, k and v do."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(N, N, generator=generator))[0]
    X = torch.randn(4 * N, N, generator=generator) @ torch.diag(torch.logspace(0, -3, N)) @ mix
    omega = X.T @ X / len(X)
    weights = [torch.randn(N, N, generator=generator) for _ in range(3)]

    def ours(count: int) -> list[Tensor]:
        U = null_space(omega, R)[1]
        return [null_factors(W, U)[0].A for W in weights[:count]]

    def plain(count: int) -> list[Tensor]:
        return [definition(omega, W)[1] for W in weights[:count]]

    angle = float(subspace_angles(ours(1)[0].double().T.numpy(), plain(1)[0].T.numpy()).max())
    found = []
    for count, name in ((1, "one target"), (3, "q, k, v (one covariance)")):
        times = compare({"plain": lambda c=count: plain(c), "keeptune": lambda c=count: ours(c)}, rounds=5)
        found.append(
            {
                "benchmark": f"LoRA-Null build, {N} x {N}, r {R}, {name}",
                "plain": f"{times['plain']:.3f} s",
                "keeptune": f"{times['keeptune']:.3f} s",
                "ratio": f"{times['plain'] / times['keeptune']:.1f} x faster",
                "check": f"largest principal angle {angle:.1e}",
            }
        )
    return found
