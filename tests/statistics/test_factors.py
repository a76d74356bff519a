"""Rank-k covariances as statistics: what is stored is what the full covariance gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.linalg.test_streaming import top_and_diagonal
from tests.models import MODELS, Bench, asking, counted_passes, relative

from keeptune.core.errors import StatisticsError
from keeptune.core.target import Target
from keeptune.linalg.streaming_eigen import Truncated
from keeptune.linalg.symmetric import Dense, LowRankDiagonal
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.low_rank_covariance import (
    GradientFactor,
    InputFactor,
    gradient_request,
    input_request,
    packed,
    read_factor,
    unpacked,
)
from keeptune.statistics.running_mean import checked_result

CPU = torch.device("cpu")


def test_packing_loses_nothing() -> None:
    U = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))[0]
    factor = LowRankDiagonal(U, torch.tensor([3.0, 2.0, 1.0]), torch.rand(7))
    found = unpacked(packed(Truncated(factor, 0.5)))
    assert torch.equal(found.factor.dense(), factor.dense())
    assert found.error == 0.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_are_near_the_covariances_and_equal_at_full_rank(architecture: str, tmp_path: Path) -> None:
    bench = Bench(MODELS[architecture](), tmp_path)
    ranks = (None, 6, 200)
    pairs = [
        [input_request("task", rank) for rank in ranks],
        [gradient_request("task", "true", rank) for rank in ranks],
    ]
    statistics = bench.collect(asking(*(request for three in pairs for request in three)))
    for target in bench.targets():
        view = statistics.view(target)
        for full, few, many in pairs:
            wanted = read_factor(full, view[full])
            assert isinstance(wanted, Dense)
            small, large = read_factor(few, view[few]), read_factor(many, view[many])
            assert isinstance(small, LowRankDiagonal)
            assert small.rank == 6
            assert relative(large.dense(), wanted.dense()) < 1e-5
            least = relative(top_and_diagonal(wanted.dense().double(), 6), wanted.dense())
            assert relative(small.dense(), wanted.dense()) < 1.1 * least + 1e-5
            torch.testing.assert_close(small.dense().diagonal(), wanted.dense().diagonal(), rtol=1e-4, atol=0)
            assert unpacked(view[few]).error == pytest.approx(least, rel=0.6, abs=1e-4)


def test_of_a_bfloat16_model_they_are_float32(tmp_path: Path) -> None:
    """Products and sums too: what is lost is what the model's own arithmetic loses."""
    single, half = (Bench(MODELS["llama"](dtype=d), tmp_path / str(d)) for d in (torch.float32, torch.bfloat16))
    requests = (InputFactor("task", 48), GradientFactor("task", "true", 48), GradientCovariance("task", "true"))
    exact, rough = single.collect(asking(*requests)), half.collect(asking(*requests))
    for target in single.targets():
        for request in requests:
            found, wanted = rough.view(target)[request], exact.view(target)[request]
            assert found.dtype == torch.float32
            assert relative(read_factor(request, found).dense(), read_factor(request, wanted).dense()) < 0.1
        value = rough.view(target)
        full = Dense(value[requests[2]])
        assert relative(read_factor(requests[1], value[requests[1]]).dense(), full.dense()) < 1e-5


def test_requests_are_the_covariances_without_a_rank() -> None:
    assert input_request("knowledge", None, examples=3) == InputCovariance("knowledge", examples=3)
    assert input_request("knowledge", 8, seed=1) == InputFactor("knowledge", 8, 1)
    assert gradient_request("knowledge", "true", None, seed=2) == GradientCovariance("knowledge", "true", seed=2)
    assert gradient_request("knowledge", "true", 4, examples=5) == GradientFactor("knowledge", "true", 4, examples=5)


def test_one_sweep_serves_factors_of_both_kinds(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path)
    with counted_passes(bench.model) as passes:
        bench.targets()
        probes = passes[0]
        bench.collect(asking(InputFactor("task", 4, seed=9), GradientFactor("task", "true", 4)))
    assert passes == [2 * probes + len(bench.task.batches(1024))]


def test_no_tokens_and_no_numbers_are_told() -> None:
    total = InputFactor("task", 2).accumulator(Target("up", 0, "up", 3, 5, "up"), CPU, lambda: torch.zeros(3, 5))
    with pytest.raises(StatisticsError, match=r"h\.0\.up: got no tokens"):
        checked_result(total, "h.0.up")
    total.add(torch.full((30, 5), float("nan")))
    with pytest.raises(StatisticsError, match=r"h\.0\.up: got NaN"):
        checked_result(total, "h.0.up")
