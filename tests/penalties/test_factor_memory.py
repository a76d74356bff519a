"""What factors hold of a model of 8 billion parameters at their defaults, from shapes: sums, store, training."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.models import relative
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.symmetric import LowRankDiagonal
from keeptune.model.blocks import find_targets
from keeptune.penalties.base import Site
from keeptune.penalties.laplace import Laplace
from keeptune.penalties.measured import read_covariance
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.low_rank_covariance import GradientFactor, InputFactor, packed
from keeptune.statistics.request import Request, RowRequest

BLOCKS = 32
META = torch.device("meta")
GB = 10**9


def block_of_an_8b() -> list[Target]:
    """One block with the shapes of Llama-3.1-8B."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=64,
    )
    with META:
        return find_targets(LlamaForCausalLM(config))


def planned(target: Target) -> TargetPlan:
    init = LowRank(B=torch.zeros(target.out_features, 8), A=torch.zeros(8, target.in_features))
    return TargetPlan(target, Decision(8), init, 1.0, frozenset({"A", "B"}))


def value_of(request: Request, target: Target) -> Tensor:
    """The shape of an entry of the store."""
    if isinstance(request, InputFactor | GradientFactor):
        n = target.in_features if isinstance(request, InputFactor) else target.out_features
        return torch.zeros(min(request.rank, n) + 1, n + 1)
    if isinstance(request, InputCovariance | GradientCovariance):
        n = target.in_features if isinstance(request, InputCovariance) else target.out_features
        return torch.zeros(n, n)
    return torch.ones(())


class Values(SimpleNamespace):
    """Statistics of one target, all zero."""

    def __getitem__(self, request: Request) -> Tensor:
        return value_of(request, self.target)

    def learned(self, _: Request) -> int:
        return 1


def account(**options: Any) -> dict[str, float]:
    """Bytes over all blocks: the sums held at a time, without and with one block at a time; store; training."""
    targets, penalty = block_of_an_8b(), Laplace(curvature="delta-kfac", **options)
    requests = {
        (request, request.site(target)): target
        for target in targets
        for request in penalty.requests(planned(target))
        if isinstance(request, RowRequest)
    }
    sums = 8 * sum(request.numbers(target) for (request, _), target in requests.items())
    store = sum(value_of(request, target).nbytes for (request, _), target in requests.items())
    tensors: dict[str, Tensor] = {}
    for target in targets:
        weight = torch.zeros(()).expand(target.out_features, target.in_features)
        stats: Any = Values(target=target)
        tensors |= penalty.tensors(Site(planned(target), weight, stats, tuple(targets), BLOCKS))
    held = sum(value.nbytes for name, value in tensors.items() if name.startswith(("Omega:", "Gamma:")))
    told: dict[str, int] = {}
    for target in targets:
        told |= penalty.size(planned(target))
    assert sum(told.values()) == held, "what the account of a run takes them for"
    assert sum(request.kept(target) for (request, _), target in requests.items()) == store
    return {"resident": BLOCKS * sums, "block": sums, "store": BLOCKS * store, "training": BLOCKS * held}


def test_the_factors_of_an_8b_stay_within_its_memory() -> None:
    found = account()
    assert found["resident"] <= 4 * GB
    assert found["block"] <= 0.2 * GB
    assert found["store"] <= 2 * GB
    assert found["training"] <= 1 * GB


def test_forced_ranks_are_counted_too() -> None:
    few, many = account(factor_rank=64), account(factor_rank=512)
    assert few["training"] < 0.5 * GB
    assert many["training"] > 2 * GB


def ranks(target: Target, **options: Any) -> Mapping[str, int | None]:
    penalty = Laplace(curvature="delta-kfac", **options)
    return {
        "in": getattr(penalty.inputs(target), "rank", None),
        "out": getattr(penalty.gradients(target), "rank", None),
    }


def test_auto_is_whole_up_to_a_width_and_few_directions_beyond() -> None:
    target = Target("up", 0, "up", 1025, 1024, "up")
    assert ranks(target) == {"in": None, "out": 64}
    assert ranks(Target("down", 0, "down", 1024, 1025, "down")) == {"in": 288, "out": None}
    assert ranks(target, factor_rank=8) == {"in": 8, "out": 8}
    assert ranks(target, factor_rank=None) == {"in": None, "out": None}


@pytest.mark.parametrize("rank", ["many", 2.5, 0])
def test_ranks_that_make_no_sense_are_refused(rank: Any) -> None:
    with pytest.raises(PlanError, match=r"factor_rank: got .*, wanted .*1 or more"):
        Laplace(factor_rank=rank)


def test_training_gets_the_stored_matrix_with_its_trace() -> None:
    """Directions in bfloat16; the diagonal, and with it what the budget is counted in, is that of the sum."""
    target = Target("up", 0, "up", 1500, 40, "up")
    penalty = Laplace(curvature="delta-kfac", factor_rank=12)
    draw = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(1500, 12, generator=draw))[0]
    factor = LowRankDiagonal(U, torch.rand(12, generator=draw) + 1, torch.rand(1500, generator=draw) * 0.01)
    stats: Any = {penalty.gradients(target): packed(SimpleNamespace(factor=factor, error=0.1))}  # type: ignore[arg-type]
    site = Site(planned(target), torch.zeros(1500, 40), stats, (target,), 1)
    read = read_covariance(penalty.gradients(target), site)
    assert isinstance(read, LowRankDiagonal)
    assert read.U.dtype == torch.bfloat16
    assert float(read.trace()) == pytest.approx(float(factor.trace()), rel=1e-6)
    assert relative(read.dense(), factor.dense()) < 0.01
