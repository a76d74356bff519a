"""exact_svd: its laws, and what happens where LAPACK gives up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.linalg.decompositions import exact_svd, projected_svd


def weight(m: int, n: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(m + n)
    if rank is None:
        return torch.randn(m, n, generator=generator)
    return torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)


def failing(times: int) -> Callable[..., Any]:
    plain, left = torch.linalg.svd, [times]

    def svd(*args: Any, **options: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise torch.linalg.LinAlgError("did not converge")
        return plain(*args, **options)

    return svd


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("shape", [(9, 9), (14, 9), (9, 14)])
@pytest.mark.parametrize("rank", [None, 4])
def test_the_laws_hold_on_every_route(
    times: int,
    shape: tuple[int, int],
    rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    W = weight(*shape, rank)
    wanted = torch.linalg.svdvals(W)
    monkeypatch.setattr(torch.linalg, "svd", failing(times))
    with caplog.at_level(logging.WARNING):
        U, S, Vh = exact_svd(W, "h.0.up")
    assert (U.dtype, S.dtype, Vh.dtype) == (torch.float32,) * 3
    torch.testing.assert_close((U * S) @ Vh, W, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(U.T @ U, torch.eye(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(S, wanted, atol=2e-5, rtol=1e-4)
    assert (S.diff() <= 0).all()
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    said = [("float32", "float64", "slower")[i] for i in range(times + (times == 2))]
    assert [word in caplog.text for word in said] == [True] * len(said)
    assert bool(caplog.text) == (times > 0)
    assert not caplog.text or "h.0.up" in caplog.text


def test_a_projection_survives_a_solver_that_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    W, U = weight(8, 6), torch.linalg.qr(weight(6, 3))[0]
    monkeypatch.setattr(torch.linalg, "svd", failing(2))
    P, S, Vh = projected_svd(W, U)
    torch.testing.assert_close((P * S) @ Vh, W @ U @ U.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_module(bad: float) -> None:
    W = weight(4, 4)
    W[1, 2] = bad
    with pytest.raises(StatisticsError, match=r"h\.3\.up: got NaN or infinite numbers in its weight"):
        exact_svd(W, "h.3.up")
