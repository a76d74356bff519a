from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import MODELS, Bench, calibration, relative
from tests.reference.statistics_reference import covariance
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.methods.lora_null import LoraNull
from keeptune.statistics.covariance import (
    CovarianceAccumulator,
    InputCovariance,
    ReleasedAccumulator,
    ReleasedCovariance,
)

CPU = torch.device("cpu")
quick = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summed(*batches: Tensor) -> CovarianceAccumulator:
    total = CovarianceAccumulator(batches[0].shape[1], CPU)
    for rows in batches:
        total.add(rows)
    return total


@pytest.mark.parametrize("architecture", MODELS)
def test_every_collected_covariance_is_the_slow_obvious_one(architecture: str, tmp_path: Path) -> None:
    """Batched, padded, in float32 - against one example at a time in float64."""
    made = Bench(MODELS[architecture](), tmp_path / "store", data=calibration(lengths=(3, 9, 6, 12)))
    statistics = made.collect(LoraNull(rank=1))
    for target in made.targets():
        found = statistics.view(target)[InputCovariance("knowledge")]
        assert relative(found, covariance(made.model, target.name, made.data)) < 1e-5
        assert found.dtype == torch.float32
        assert torch.equal(found, found.T)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 999))
def test_the_result_does_not_depend_on_how_rows_are_split(sizes: list[int], n: int, seed: int) -> None:
    X = normal(sum(sizes), n, seed=seed)
    parts = summed(*X.split(sizes)).result("x")
    merged = CovarianceAccumulator(n, CPU)
    for rows in X.split(sizes):
        merged.merge(summed(rows))
    whole = X.double().T @ X.double() / len(X)
    assert relative(parts, whole) < 1e-6
    assert torch.equal(merged.result("x"), parts)


@quick
@given(st.permutations(range(5)))
def test_merging_does_not_depend_on_the_order_of_shards(order: list[int]) -> None:
    shards = normal(30, 4).split(6)
    merged = CovarianceAccumulator(4, CPU)
    for index in order:
        merged.merge(summed(shards[index]))
    assert relative(merged.result("x"), summed(*shards).result("x")) < 1e-7
    assert merged.tokens == 30


def test_a_shard_without_tokens_changes_nothing() -> None:
    one, other = summed(normal(5, 3)), summed(normal(5, 3))
    other.merge(CovarianceAccumulator(3, CPU))
    assert torch.equal(one.result("x"), other.result("x"))


def test_no_tokens_is_an_error_that_names_the_module() -> None:
    with pytest.raises(StatisticsError, match=r"h\.0\.up: got no tokens"):
        CovarianceAccumulator(3, CPU).result("h.0.up")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [CovarianceAccumulator, ReleasedAccumulator])
@pytest.mark.parametrize("place", [0, 2])
def test_activations_that_are_no_numbers_are_an_error_that_names_the_module(
    kind: type[CovarianceAccumulator], value: float, place: int
) -> None:
    rows = normal(4, 3)
    rows[1, place] = value
    total = kind(3, CPU)
    total.add(rows)
    with pytest.raises(StatisticsError, match=r"h\.0\.up: got NaN or infinite"):
        total.result("h.0.up")


def test_the_released_sum_is_the_released_codes_arithmetic() -> None:
    """float16 all through: x over the size of its largest signed value, its Gram over 256, added example by example."""
    examples = [normal(5, 3, seed=seed) - 1.0 for seed in range(4)]
    wanted = torch.zeros(3, 3, dtype=torch.float16)
    total = ReleasedAccumulator(3, CPU)
    for rows in examples:
        half = rows.half()
        half = half / torch.max(half).abs()
        wanted += half.T.matmul(half) / 256
        total.add(rows)
    assert torch.equal(total.result("x"), wanted.float())


def test_the_two_covariances_are_different_statistics() -> None:
    assert InputCovariance("knowledge") != ReleasedCovariance("knowledge")
    assert InputCovariance("knowledge") != InputCovariance("task")
    assert InputCovariance("knowledge") == InputCovariance("knowledge")
