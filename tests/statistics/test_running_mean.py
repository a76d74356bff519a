"""The laws of sums over rows, for every statistic that is one, and the check of their results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import MODELS, Bench, add_up, asking, calibration, relative
from tests.reference.statistics_reference import covariance
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.core.target import Target
from keeptune.model.blocks import find_targets
from keeptune.model.runner import Runner
from keeptune.statistics import collect
from keeptune.statistics.collect import Measured, Pass, run_pass
from keeptune.statistics.covariance import (
    DirectionVariances,
    GradientCovariance,
    InputCovariance,
    ReleasedCovariance,
    TokenCount,
    WeightFisher,
)
from keeptune.statistics.request import RowRequest, RunningMean, checked_result

CPU = torch.device("cpu")
TARGET = Target("h.0.up", 0, "up", 5, 4, "h.0.up")
quick = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W, H, DELTA = normal(5, 4, seed=1), normal(30, 4, seed=2), normal(30, 5, seed=3)
U, _, VH = torch.linalg.svd(W.double(), full_matrices=False)
h, delta = H.double(), DELTA.double()
# Each request, and its sum over the rows written out in float64.
MEANS: dict[RowRequest, Tensor] = {
    InputCovariance("task"): h.T @ h,
    GradientCovariance("task", "true"): delta.T @ delta,
    DirectionVariances("task", "true"): torch.stack([(h @ VH.T).square().sum(0), (delta @ U).square().sum(0)]),
    WeightFisher("task", "true", per="token"): delta.square().T @ h.square(),
}


def empty(request: RowRequest) -> RunningMean:
    return request.accumulator(TARGET, CPU, lambda: W)


def summed(request: RowRequest, *indices: Tensor) -> RunningMean:
    """The sum over some rows, one call for each index."""
    total = empty(request)
    for index in indices:
        rows = (H,) if request.loss is None else (H, DELTA)
        total.add(*(part[index] for part in rows), *[None] * (len(rows) - 1))
    return total


@pytest.mark.parametrize("request_", MEANS, ids=str)
def test_the_mean_depends_neither_on_how_rows_are_split_nor_on_the_order_of_adding_up(request_: RowRequest) -> None:
    wanted = MEANS[request_] / len(H)

    @quick
    @given(st.lists(st.integers(0, 30), min_size=2, max_size=5), st.permutations(range(30)))
    def check(cuts: list[int], order: list[int]) -> None:
        edges = [0, *sorted(cuts), 30]
        parts = [torch.tensor(order[a:b], dtype=torch.long) for a, b in zip(edges, edges[1:], strict=False)]
        assert relative(summed(request_, *parts).result(), wanted) < 1e-6
        first, second, *others = (summed(request_, part) for part in parts)
        add_up(first, second)
        left = first.result()
        back, other = (summed(request_, part) for part in (parts[1], parts[0]))
        add_up(back, other)
        assert torch.equal(back.result().nan_to_num(), left.nan_to_num())  # commutative, to the last bit
        tail = summed(request_)
        for part in others:  # (first + second) + (others), against one after the other
            add_up(tail, part)
        add_up(first, tail)
        assert first.tokens == 30
        assert relative(first.result(), wanted) < 1e-6

    check()


def test_a_shard_without_tokens_changes_nothing() -> None:
    one, other = (summed(InputCovariance("task"), torch.arange(5)) for _ in range(2))
    add_up(other, summed(InputCovariance("task")))
    assert torch.equal(one.result(), other.result())


@pytest.mark.parametrize("request_", [*MEANS, ReleasedCovariance("task")], ids=str)
def test_what_is_no_number_is_refused_with_the_module(request_: RowRequest) -> None:
    total = empty(request_)
    with pytest.raises(StatisticsError, match=r"h\.0\.up: got no tokens"):
        checked_result(total, "h.0.up")
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 2):
            total, rows = empty(request_), (H.clone(), DELTA.clone())
            for part in rows:
                part[1, place] = value
            total.add(*(rows[:1] if request_.loss is None else (*rows, None)))
            with pytest.raises(StatisticsError, match=r"h\.0\.up: got NaN or infinite"):
                checked_result(total, "h.0.up")


def of_two_processes(
    requests: list[RowRequest], patch: pytest.MonkeyPatch, *, examples_alone: bool
) -> Iterator[tuple[RunningMean, RunningMean, RunningMean]]:
    """The sums of one process alone, and of the first and the second of two before they are added up."""
    model, found = MODELS["llama"](), []
    batches = calibration(lengths=(3, 9, 6, 12)).batches(12)
    measured = [(request, target) for target in find_targets(model)[:7:3] for request in requests]
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        found.append(dict[Measured, RunningMean]())
        patch.setattr(collect, "world", lambda world=world: world)
        patch.setattr(collect, "share", lambda every, rank=rank, world=world: every[rank::world])
        patch.setattr(collect, "add_up", lambda part: None)
        deliver = lambda request, target, total: found[-1].update({(request, target): total})  # noqa: E731
        run_pass(Runner(model), batches, Pass("task", examples_alone, None), measured, deliver, title="")
    for one in measured:
        alone, first, second = (each[one] for each in found)
        yield alone, first, second


def test_processes_divide_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for alone, first, second in of_two_processes(
        [InputCovariance("task"), TokenCount("task")], monkeypatch, examples_alone=False
    ):
        assert (first.tokens, second.tokens, alone.tokens) == (21, 9, 30)
        add_up(first, second)
        assert relative(first.result(), alone.result()) < 1e-6


def test_of_examples_that_are_alone_each_process_sums_all(monkeypatch: pytest.MonkeyPatch) -> None:
    released = [ReleasedCovariance("task")]
    monkeypatch.setattr(collect, "_add_up", lambda total: pytest.fail("sums in float16 are not added up"))
    for alone, *others in of_two_processes(released, monkeypatch, examples_alone=True):
        assert [total.tokens for total in others] == [30, 30]
        assert all(torch.equal(total.result(), alone.result()) for total in others)  # to the last bit
    monkeypatch.undo()
    # Negative control: of parts of the batches a sum in float16 does not add up.
    *_, (alone, first, second) = of_two_processes(released, monkeypatch, examples_alone=False)
    add_up(first, second)
    assert first.tokens == alone.tokens
    assert not torch.equal(first.result(), alone.result())


@pytest.mark.parametrize("architecture", MODELS)
def test_every_collected_covariance_is_the_slow_obvious_one(architecture: str, tmp_path: Path) -> None:
    """Batched, padded, in float32 - against one example at a time in float64."""
    made = Bench(MODELS[architecture](), tmp_path / "store", data=calibration(lengths=(3, 9, 6, 12)))
    statistics = made.collect(asking(InputCovariance("knowledge")))
    for target in made.targets():
        found = statistics.view(target)[InputCovariance("knowledge")]
        assert relative(found, covariance(made.model, target.name, made.data)) < 1e-5
        assert found.dtype == torch.float32
        assert torch.equal(found, found.T)


def test_the_released_sum_is_the_released_codes_arithmetic() -> None:
    """float16 all through: x over the size of its largest signed value, its Gram over 256, added example by example."""
    examples = [normal(5, 4, seed=seed) - 1.0 for seed in range(4)]
    wanted = torch.zeros(4, 4, dtype=torch.float16)
    total = empty(ReleasedCovariance("task"))
    for rows in examples:
        half = rows.half()
        half = half / torch.max(half).abs()
        wanted += half.T.matmul(half) / 256
        total.add(rows)
    assert torch.equal(total.result(), wanted.float())


def test_the_two_covariances_are_different_statistics() -> None:
    assert InputCovariance("knowledge") != ReleasedCovariance("knowledge")
    assert InputCovariance("knowledge") != InputCovariance("task")
    assert InputCovariance("knowledge") == InputCovariance("knowledge")
