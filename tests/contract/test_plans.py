"""Laws of planning, for every registered method on every tiny architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.contract.conftest import ADAPTERS, CASES, COUPLED, WHOLE, World
from tests.models import Bench, RepaddingRunner, add_up, mask_forgotten, padded_left, relative, shard
from tests.plan_differences import differences
from torch import Tensor

from keeptune.core.errors import ArtefactError, PlanError, StatisticsError
from keeptune.core.plan import Plan
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Calibration
from keeptune.linalg.decompositions import bottom_eigenvectors
from keeptune.methods.base import make_plan, methods
from keeptune.methods.lora_null import LoraNull
from keeptune.model.head import body_fingerprint
from keeptune.model.runner import Runner, Taps
from keeptune.statistics.collect import StatsView, source_of
from keeptune.statistics.covariance import InputCovariance, ReleasedCovariance
from keeptune.statistics.request import ModelRequest
from keeptune.statistics.store import StatStore

every_case = pytest.mark.parametrize("case", CASES)
every_adapter = pytest.mark.parametrize("case", ADAPTERS)
ANY = Target("h.0.up", 0, "up", 8, 8, input_group="h.0.up")
ASKING = [case for case, method in ADAPTERS.items() if method.requests(ANY)]
# Attributions are no sums over batches: their laws of padding, batches and shards are in tests/model and tests/stats.
TRACING = {case for case in ASKING if all(isinstance(r, ModelRequest) for r in ADAPTERS[case].requests(ANY))}
# A float16 sum in the order of the examples, as the released code's, has no parts that add up.
ADDING = [c for c in ASKING if c not in TRACING and not any(r.examples_alone for r in ADAPTERS[c].requests(ANY))]
asking = pytest.mark.parametrize("case", ASKING)
PlanOf = Callable[[str], Plan]
TOLERANCE = 5e-4  # of B A, where other batches round otherwise in float32; directions of an encoder are close


def largest_difference(a: Plan, b: Plan) -> float:
    """Of the change B A, or of what A reads where all changes start at zero; infinite where ranks or rows differ."""
    if [(t.target, t.decision) for t in a.targets] != [(t.target, t.decision) for t in b.targets]:
        return math.inf
    pairs = [(x.init, y.init) for x, y in zip(a.targets, b.targets, strict=True)]
    if all(start.is_zero for pair in pairs for start in pair):
        return max(relative(x.A.T @ x.A, y.A.T @ y.A) for x, y in pairs)
    return max(relative(x.dense(), y.dense()) for x, y in pairs)


def test_every_registered_method_is_checked() -> None:
    assert {method.name for method in CASES.values()} == set(methods())


@every_case
def test_equal_inputs_give_a_bit_equal_plan(case: str, world: World, plan_of: PlanOf, tmp_path: Path) -> None:
    """Afresh: another copy of the model, another store."""
    again = world.bench(tmp_path).plan(CASES[case])
    assert again.key == plan_of(case).key
    assert differences(again, plan_of(case)) == []


@every_case
def test_save_and_load_is_the_identity(case: str, plan_of: PlanOf, tmp_path: Path) -> None:
    made = plan_of(case)
    made.save(tmp_path / "plan")
    found = Plan.load(tmp_path / "plan")
    assert found.key == made.key
    assert (found.method, found.scope, dict(found.options), dict(found.peft), dict(found.training)) == (
        made.method,
        made.scope,
        dict(made.options),
        dict(made.peft),
        dict(made.training),
    )
    assert found.summary() == made.summary()
    for a, b in zip(found.targets, made.targets, strict=True):
        assert all(torch.equal(a.evidence[name], value) for name, value in b.evidence.items())
        for found_in, given in ((a.vectors, b.vectors), (a.kept, b.kept)):
            assert found_in.keys() == given.keys()
            assert all(torch.equal(found_in[name], value) for name, value in given.items())


@every_adapter
def test_damaged_factors_are_refused(case: str, plan_of: PlanOf, tmp_path: Path) -> None:
    plan_of(case).save(tmp_path / "plan")
    path = tmp_path / "plan" / "factors.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"factors\.safetensors"):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize("case", [case for case, method in ADAPTERS.items() if method.rank is not None])
def test_ranks_sum_to_at_most_the_budget(case: str, world: World, plan_of: PlanOf) -> None:
    budget = plan_of(case).options["rank"] * len(world.bench().targets())
    assert 0 < sum(t.decision.rank for t in plan_of(case).targets) <= budget
    for target_plan in plan_of(case).targets:
        assert target_plan.init.rank == target_plan.decision.rank <= target_plan.target.max_rank
        assert target_plan.init.shape == (target_plan.target.out_features, target_plan.target.in_features)


@pytest.mark.parametrize("case", [case for case, method in ADAPTERS.items() if method.name != "loki"])
def test_a_rank_too_large_is_refused_with_target_and_role(case: str, world: World) -> None:
    bench = world.bench()
    least = min(target.max_rank for target in bench.targets())
    method = dataclasses.replace(ADAPTERS[case], rank=least + 1)
    with pytest.raises(PlanError) as caught:
        bench.plan(method)
    small = [target for target in bench.targets() if target.max_rank == least]
    assert any(t.name in caught.value.where and t.role in caught.value.next_step for t in small)


@every_adapter
def test_the_start_is_finite_and_float32(case: str, plan_of: PlanOf) -> None:
    for target_plan in plan_of(case).targets:
        for factor in (target_plan.init.B, target_plan.init.A):
            assert factor.dtype == torch.float32
            assert torch.isfinite(factor).all()


@pytest.mark.parametrize("case", [case for case in ADAPTERS if case not in COUPLED])
def test_a_target_is_planned_alike_whichever_others_are(case: str, world: World, plan_of: PlanOf) -> None:
    """Holds as long as a method gives every target the same rank; one that shares ranks out is exempt."""
    bench = world.bench()
    bench.roles = [bench.targets()[-1].role]
    for target_plan in bench.plan(CASES[case]).targets:
        assert torch.equal(target_plan.init.A, plan_of(case)[target_plan.target.name].init.A)


# Statistics


@every_case
def test_requests_are_sufficient(case: str, world: World) -> None:
    """A view that has only what was requested is enough; anything else is refused."""
    bench, method = world.bench(), CASES[case]
    statistics = bench.collect(method)
    read: set[object] = set()

    class Watched(StatsView):
        def __getitem__(self, request):  # type: ignore[no-untyped-def]
            read.add(request)
            return super().__getitem__(request)

    def view(target):  # type: ignore[no-untyped-def]
        return Watched(target, statistics)

    make_plan(method, bench.targets(), lambda target: read_weight(bench.model, target), view)
    target = bench.targets()[0]
    assert read <= frozenset().union(*(method.requests(t) for t in bench.targets()))
    for other in {InputCovariance("task"), InputCovariance("knowledge"), ReleasedCovariance("knowledge")}:
        if other not in method.requests(target):
            with pytest.raises(StatisticsError, match="got a read of"):
                statistics.view(target)[other]


@asking
@pytest.mark.parametrize("batch_tokens", [1, 60])
def test_the_plan_does_not_depend_on_batch_size(
    case: str, world: World, plan_of: PlanOf, batch_tokens: int, tmp_path: Path
) -> None:
    found = world.bench(tmp_path).plan(CASES[case], batch_tokens=batch_tokens)
    assert largest_difference(found, plan_of(case)) < TOLERANCE


@asking
def test_the_plan_does_not_depend_on_the_order_of_examples(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path
) -> None:
    """Batches are formed by length, so the bits are the same."""
    bench = world.bench(tmp_path)
    bench.data = Calibration(bench.data.sequences[::-1], bench.data.pad_id)
    bench.task = shard(bench.task, slice(None, None, -1))
    assert bench.plan(CASES[case]).key == plan_of(case).key


@asking
def test_the_plan_does_not_depend_on_the_padding_side(case: str, world: World, plan_of: PlanOf, tmp_path: Path) -> None:
    bench = world.bench(tmp_path)
    found = bench.plan(CASES[case], runner=RepaddingRunner(bench.model, padded_left))
    assert largest_difference(found, plan_of(case)) < TOLERANCE


@asking
def test_the_plan_does_not_depend_on_the_padding_id(case: str, world: World, plan_of: PlanOf, tmp_path: Path) -> None:
    bench = world.bench(tmp_path)
    bench.data = dataclasses.replace(bench.data, pad_id=5)
    bench.task = dataclasses.replace(bench.task, pad_id=5)
    assert bench.plan(CASES[case]).key == plan_of(case).key


@asking
def test_one_sum_at_a_time_gives_a_bit_equal_plan(case: str, world: World, plan_of: PlanOf, tmp_path: Path) -> None:
    assert world.bench(tmp_path).plan(CASES[case], sum_bytes=0).key == plan_of(case).key


@pytest.mark.parametrize("case", ADDING)
def test_the_plan_does_not_depend_on_the_number_of_shards(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path, shards: int = 3
) -> None:
    method, bench = CASES[case], world.bench(tmp_path)
    for target, request in _sites(bench, case):
        data = bench.data if request.data == "knowledge" else bench.task
        source = source_of(bench.model, body_fingerprint(bench.model), data)
        parts = []
        for number in range(shards):
            total = request.accumulator(target, bench.model.device, partial(read_weight, bench.model, target))
            part = shard(data, slice(number, None, shards)).batches()
            sinks = {request.site(target): [total.add]}
            Runner(bench.model).run(
                part, Taps(sinks) if request.loss is None else Taps({}, sinks), request.loss, title=""
            )
            parts.append(total)
        for other in parts[:-1]:
            add_up(parts[-1], other)
        StatStore(bench.folder).put(request.entry(target, source), parts[-1].result())
    forbidden = RepaddingRunner(bench.model, _never)
    assert largest_difference(bench.plan(method, runner=forbidden), plan_of(case)) < TOLERANCE


def _sites(bench: Bench, case: str):  # type: ignore[no-untyped-def]
    found = {(r, r.site(t)): (t, r) for t in reversed(bench.targets()) for r in CASES[case].requests(t)}
    return list(found.values())


def _never(_: object) -> object:
    raise AssertionError("the store has everything")


@asking
def test_negative_control_a_forgotten_mask_gives_another_plan(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path
) -> None:
    """Shows that the laws about padding can fail.

    A statistic of one example at a time has no padding to forget, and in a text that is read
    from the left no loss depends on the padding, which then has no gradient.
    """
    bench, method = world.bench(tmp_path), CASES[case]
    found = bench.plan(method, runner=RepaddingRunner(bench.model, mask_forgotten))
    if case in TRACING or all(request.examples_alone for request in method.requests(bench.targets()[0])):
        assert found.key == plan_of(case).key
    else:
        assert found.key != plan_of(case).key
        assert largest_difference(found, plan_of(case)) > 200 * TOLERANCE


@asking
def test_other_data_give_another_plan(case: str, world: World, plan_of: PlanOf, tmp_path: Path) -> None:
    bench = world.bench(tmp_path)
    bench.data = Calibration(bench.data.sequences[:6], bench.data.pad_id)
    bench.task = shard(bench.task, slice(6))
    assert largest_difference(bench.plan(CASES[case]), plan_of(case)) > 200 * TOLERANCE


# Methods that train every weight


@pytest.mark.parametrize("case", WHOLE)
def test_a_method_of_every_weight_plans_no_adapter(case: str, plan_of: PlanOf) -> None:
    made = plan_of(case)
    assert (made.scope, made.targets, made.summary()) == ("all", (), [])


def test_targets_of_one_input_group_share_one_eigenproblem(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, method = world.bench(), LoraNull(rank=4)
    statistics, solved = bench.collect(method), []

    def counted(omega: Tensor, r: int) -> tuple[Tensor, Tensor]:
        solved.append(r)
        return bottom_eigenvectors(omega, r)

    monkeypatch.setattr("keeptune.methods.lora_null.bottom_eigenvectors", counted)
    targets = bench.targets()
    make_plan(method, targets, lambda target: read_weight(bench.model, target), statistics.view)
    assert len(solved) == len({target.input_group for target in targets})
