"""FARSS's build against its definition, from the same statistics, on the seven targets of a block 1,024 wide."""

from __future__ import annotations

import torch
from timing import compare
from torch import Tensor

from keeptune.core.plan import Decision
from keeptune.core.target import Target
from keeptune.methods.farss import Farss
from keeptune.statistics.covariance import GradientCovariance, InputCovariance

N, R = 1024, 64
SHAPES = {"q": (N, N), "k": (N // 4, N), "v": (N // 4, N), "o": (N, N)}
SHAPES |= {"gate": (11 * N // 4, N), "up": (11 * N // 4, N), "down": (N, 11 * N // 4)}


class _Given(dict[object, Tensor]):
    target: Target


def _loop(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> Tensor:  # noqa: N803
    """Compute eqs. 8 and 13-16 as written: each direction's quadratic forms on their own, the trace of the product."""
    torch.trace(sigma_delta @ W @ sigma_h @ W.T) / W.numel()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    s = [S[i] ** 2 * (Vh[i] @ sigma_h @ Vh[i]) * (U[:, i] @ sigma_delta @ U[:, i]) for i in range(len(S))]
    top = torch.stack(s).argsort(descending=True)[:R]
    return (U[:, top] * S[top].sqrt()) @ (S[top].sqrt()[:, None] * Vh[top])


def _matrices(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> Tensor:  # noqa: N803
    """Compute the same with whole matrices: the diagonals of Vᵀ Σ_h V and Uᵀ Σ_δ U."""
    torch.trace(sigma_delta @ W @ sigma_h @ W.T) / W.numel()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    s = S**2 * (Vh @ sigma_h @ Vh.T).diagonal() * (U.T @ sigma_delta @ U).diagonal()
    top = s.argsort(descending=True)[:R]
    return (U[:, top] * S[top].sqrt()) @ (S[top].sqrt()[:, None] * Vh[top])


def rows() -> list[dict[str, str]]:
    """Time score and build of a block of deep targets."""
    generator = torch.Generator().manual_seed(0)

    def psd(size: int) -> Tensor:
        X = torch.randn(2 * size, size, generator=generator)
        return X.T @ X / len(X)

    method = Farss(rank=R, boundary=1, r_max=R)
    cases = []
    for name, (m, n) in SHAPES.items():
        target = Target(f"h.1.{name}", 1, name, m, n, input_group=name)
        stats = _Given({InputCovariance("task"): psd(n), GradientCovariance("task", "true"): psd(m)})
        stats.target = target
        cases.append((target, torch.randn(m, n, generator=generator) / n**0.5, stats))

    def ours() -> list[Tensor]:
        found = []
        for target, W, stats in cases:
            method.score(target, W, stats)  # type: ignore[arg-type]
            found.append(method.build(target, W, stats, Decision(R)).init.dense())  # type: ignore[arg-type]
        return found

    def plain(definition: object) -> list[Tensor]:
        return [definition(W, *stats.values()) for _, W, stats in cases]  # type: ignore[operator]

    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(ours(), plain(_loop), strict=True))
    rivals = {"loop": lambda: plain(_loop), "matrices": lambda: plain(_matrices), "keeptune": ours}
    times = compare(rivals, rounds=3)
    return [
        {
            "benchmark": f"FARSS build, seven targets of a block {N} wide, r {R}, against {label}",
            "plain": f"{times[key]:.2f} s",
            "keeptune": f"{times['keeptune']:.2f} s",
            "ratio": f"{times[key] / times['keeptune']:.1f} x faster",
            "check": f"B A differs by {gap:.1e}",
        }
        for key, label in (
            ("loop", "the equations, direction by direction"),
            ("matrices", "the same with whole matrices"),
        )
    ]
