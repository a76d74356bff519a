"""FARSS: its equations, the laws of its parts, its variants, and what it does in hard cases."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import MODELS, Bench, GivenStats, RepaddingRunner, relative
from tests.reference import farss_reference as reference
from torch import Tensor

import keeptune
from keeptune import atlas
from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.methods.corda import Corda
from keeptune.methods.farss import Farss, direction_scores, importance, inverse_weights
from keeptune.methods.milora import Milora
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.store import StatStore

RELEASED = Farss.as_released()
M, N = 12, 9
INPUT, GRADIENT = InputCovariance("task"), GradientCovariance("task", "true")


def target(layer: int = 0, name: str = "up", m: int = M, n: int = N) -> Target:
    return Target(f"h.{layer}.{name}", layer, name, m, n, input_group=f"h.{layer}.{name}")


def psd(size: int, seed: int, rank: int | None = None) -> Tensor:
    rows = torch.randn(rank or 3 * size, size, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / rows.shape[0]


def weight(seed: int = 0, m: int = M, n: int = N) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


class Given(GivenStats):
    target: Target


def given_stats(at: Target, sigma_h: Tensor, sigma_delta: Tensor) -> Any:
    found = Given({INPUT: sigma_h, GRADIENT: sigma_delta})
    found.target = at
    return found


def built(method: Farss, at: Target, W: Tensor, sigma_h: Tensor, sigma_delta: Tensor, r: int) -> TargetPlan:
    return method.build(at, W, given_stats(at, sigma_h, sigma_delta), Decision(r))


# Equations


@pytest.mark.parametrize("shape", [(M, N), (N, M), (7, 7)])
@pytest.mark.parametrize("shallow", [True, False])
def test_the_start_is_the_sum_of_the_chosen_parts(shape: tuple[int, int], shallow: bool) -> None:
    m, n = shape
    W, sigma_h, sigma_delta = weight(m=m, n=n), psd(n, 1), psd(m, 2)
    made = built(Farss(boundary=1), target(0 if shallow else 1, m=m, n=n), W, sigma_h, sigma_delta, 3)
    assert relative(made.init.dense(), reference.factors(W, sigma_h, sigma_delta, 3, shallow=shallow)) < 1e-5
    assert made.scale == 1
    torch.testing.assert_close(made.init.B.T @ made.init.B, made.init.A @ made.init.A.T, atol=1e-5, rtol=1e-5)


def test_importance_is_the_trace() -> None:
    W, sigma_h, sigma_delta = weight(), psd(N, 1), psd(M, 2)
    assert importance(W, sigma_h, sigma_delta) == pytest.approx(reference.importance(W, sigma_h, sigma_delta), rel=1e-5)


def test_scores_are_the_kronecker_form_of_rank_one_changes() -> None:
    W, sigma_h, sigma_delta = weight().double(), psd(N, 1).double(), psd(M, 2).double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    variances = torch.stack([((Vh @ sigma_h) * Vh).sum(1), ((sigma_delta @ U) * U).sum(0)])
    found = direction_scores(S, variances)
    for i in range(N):
        wanted = reference.kronecker_form(S[i] * torch.outer(U[:, i], Vh[i]), sigma_h, sigma_delta)
        assert float(found[i]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [1e-9, 3e-9, 1e-12, 5e-10], [5.0], [2.0, 2.0, 2.0, 2.0]])
def test_ranks_are_the_papers(values: list[float]) -> None:
    targets = {target(name=f"t{i}"): value for i, value in enumerate(values)}
    found = Farss(boundary=1, r_min=1, r_max=8, r_avg=5).allocate(targets)
    assert [found[t].rank for t in targets] == reference.paper_ranks(values, 5, 1, 8)


def test_the_papers_ranks_lose_budget() -> None:
    """Log-normal importances, 49 matrices, (1, 50, 64): the mean rank realised falls well below r_avg."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(49, generator=generator).exp().tolist()
    targets = {target(name=f"t{i}", m=128, n=128): value for i, value in enumerate(values)}
    found = Farss(boundary=1, r_min=1, r_max=64, r_avg=50).allocate(targets)
    assert sum(d.rank for d in found.values()) < 0.75 * 50 * 49


# Laws


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=10), st.integers(1, 10))
def test_a_more_important_target_never_gets_more_ranks(values: list[float], average: int) -> None:
    targets = {target(name=f"t{i}", m=64, n=64): value for i, value in enumerate(sorted(values))}
    found = Farss(boundary=1, r_max=12, r_avg=average).allocate(targets)
    allotted = [found[t].rank for t in targets]
    assert allotted == sorted(allotted, reverse=True)


def test_ranks_fall_as_importance_rises() -> None:
    targets = {target(name=f"t{i}"): value for i, value in enumerate([0.1, 0.2, 0.4, 1.0, 8.0])}
    found = Farss(boundary=1, r_avg=4).allocate(targets)
    allotted = [found[t].rank for t in targets]
    assert allotted == sorted(allotted, reverse=True)
    assert allotted[0] > allotted[-1]


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 2.0, 1e8])
def test_scaling_the_loss_changes_no_rank_and_no_choice(scale: float) -> None:
    W, sigma_h, sigma_delta = weight(), psd(N, 1), psd(M, 2)
    method, at = Farss(boundary=1, r_avg=4), target()
    wanted = built(method, at, W, sigma_h, sigma_delta, 4)
    found = built(method, at, W, sigma_h, sigma_delta * scale, 4)
    assert torch.equal(found.init.A, wanted.init.A)
    values = {target(name=f"t{i}"): value for i, value in enumerate([0.1, 0.2, 0.4, 1.0])}
    assert method.allocate({t: v * scale for t, v in values.items()}) == method.allocate(values)


@pytest.mark.parametrize("r", [1, 3, 8])
def test_identity_covariances_make_deep_pissa_and_shallow_milora(r: int) -> None:
    W, sigma_h, sigma_delta = weight(), 3.0 * torch.eye(N), 0.5 * torch.eye(M)
    for layer, other in ((1, Pissa(rank=r)), (0, Milora(rank=r))):
        found = built(Farss(boundary=1), target(layer), W, sigma_h, sigma_delta, r)
        wanted = other.build(target(layer), W, GivenStats(), Decision(r))  # type: ignore[arg-type]
        assert relative(found.init.dense(), wanted.init.dense()) < 1e-5


@pytest.mark.parametrize("r", [1, 4, 9, 31, 32])
def test_deep_targets_take_the_top_directions_for_every_rank(r: int) -> None:
    """The released code takes the bottom ones for every rank below 128."""
    m = n = 32
    W, sigma_h, sigma_delta = weight(m=m, n=n), psd(n, 1), psd(m, 2)
    s = sorted(reference.scores(W, sigma_h, sigma_delta))
    deep, shallow = target(5, m=m, n=n), target(0, m=m, n=n)
    method = Farss(boundary=2, rank=r)
    top = built(method, deep, W, sigma_h, sigma_delta, r).evidence["direction_score"]
    low = built(method, shallow, W, sigma_h, sigma_delta, r).evidence["direction_score"]
    assert sorted(top.tolist()) == pytest.approx(s[-r:], rel=1e-4)
    assert sorted(low.tolist()) == pytest.approx(s[:r], rel=1e-4)
    released = dataclasses.replace(RELEASED, boundary=2)
    wrong = built(released, deep, W, sigma_h, sigma_delta, r).evidence["direction_score"]
    assert sorted(wrong.tolist()) == pytest.approx(s[:r], rel=1e-4)


# Variants


def plan(bench: Bench, method: Farss) -> Plan:
    return bench.plan(method)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(MODELS["llama"](), tmp_path)


def test_streamed_scores_give_the_same_plan_for_deep_targets(bench: Bench) -> None:
    full = plan(bench, Farss(rank=4, boundary=1, r_avg=4))
    method = Farss(rank=4, boundary=1, r_avg=4, scores="streaming")
    streamed = plan(bench, method)
    deep, shallow = bench.targets()[-1], bench.targets()[0]
    assert method.requests(deep).isdisjoint(method.requests(shallow))
    for a, b in zip(streamed.targets, full.targets, strict=True):
        assert a.decision == b.decision
        assert relative(a.init.dense(), b.init.dense()) < 1e-4


def test_farss_init_takes_the_lowest_and_all_high_the_highest_everywhere(bench: Bench) -> None:
    low = plan(bench, Farss(rank=4, variant="farss-init"))
    high = plan(bench, Farss(rank=4, variant="all-high"))
    split = plan(bench, Farss(rank=4, boundary=1, r_min=4, r_max=4, r_avg=4))
    assert {t.decision.rank for t in (*low.targets, *high.targets)} == {4}
    for a, b, c in zip(low.targets, high.targets, split.targets, strict=True):
        wanted = a if a.target.layer == 0 else b
        assert torch.equal(c.init.A, wanted.init.A)
        assert a.evidence["direction_score"].max() <= b.evidence["direction_score"].min()


def test_sampled_labels_are_another_statistic(bench: Bench) -> None:
    true = plan(bench, Farss(rank=4, boundary=1))
    sampled = plan(bench, Farss(rank=4, boundary=1, labels="sampled"))
    assert any(not torch.equal(a.init.A, b.init.A) for a, b in zip(true.targets, sampled.targets, strict=True))


def test_an_alpha_divides_the_spectrum_by_the_scale(bench: Bench) -> None:
    """So that what acts at the start is the same part of W."""
    plain = plan(bench, Farss(rank=4, boundary=1))
    scaled = plan(bench, Farss(rank=4, boundary=1, alpha=16))
    for a, b in zip(plain.targets, scaled.targets, strict=True):
        assert b.scale == 16 / b.decision.rank
        assert relative(b.scale * b.init.dense(), a.init.dense()) < 1e-5


def test_the_released_options_take_out_more_than_w_has() -> None:
    W, sigma_h, sigma_delta = weight(), psd(N, 1), psd(M, 2)
    made = built(RELEASED, target(), W, sigma_h, sigma_delta, 4)
    residual = W - made.scale * made.init.dense()
    u, v = made.init.B[:, 0] / made.init.B[:, 0].norm(), made.init.A[0] / made.init.A[0].norm()
    assert made.scale == 32
    assert float(u @ residual @ v) == pytest.approx((1 - 32) * float(made.evidence["singular_values"][0]), rel=1e-4)


def test_the_plan_notes_the_budget_that_was_realised(bench: Bench) -> None:
    found = plan(bench, Farss(rank=4, boundary=1, r_avg=6, r_max=8))
    shallow = [t for t in found.targets if t.target.layer == 0]
    assert f"{sum(t.decision.rank for t in shallow)} of {4 * 7} ranks" in found.provenance["notes"][0]
    assert all("importance" in t.evidence for t in shallow)
    assert not any("importance" in t.evidence for t in found.targets if t.target.layer == 1)


def test_a_second_method_on_the_same_task_costs_no_pass(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    plan(bench, Farss(rank=4, boundary=1))

    def never(_: object) -> Any:
        raise AssertionError("the store has everything")

    with caplog.at_level(logging.INFO):
        made = bench.plan(Corda(rank=4, mode="ipm"), runner=RepaddingRunner(bench.model, never))
    assert len(made.targets) == 14
    assert "8 of 8 InputCovariance(data='task', examples=None, precision='single') taken from" in caplog.text


# Hard cases


def test_zero_gradients_share_evenly_and_choose_by_singular_value(caplog: pytest.LogCaptureFixture) -> None:
    targets = {target(name=f"t{i}"): 0.0 for i in range(3)}
    with caplog.at_level(logging.WARNING):
        found = Farss(boundary=1, r_avg=5).allocate(targets)
    assert [d.rank for d in found.values()] == [5, 5, 5]
    assert "every gradient is zero" in caplog.text
    W, nothing = weight(), torch.zeros(M, M)
    for layer, other in ((1, Pissa(rank=3)), (0, Milora(rank=3))):
        made = built(Farss(boundary=1), target(layer), W, psd(N, 1), nothing, 3)
        wanted = other.build(target(layer), W, GivenStats(), Decision(3))  # type: ignore[arg-type]
        assert relative(made.init.dense(), wanted.init.dense()) < 1e-5


def test_one_target_without_gradients_does_not_take_the_others_least_ranks() -> None:
    targets = {target(name="a"): 0.0, target(name="b"): 1.0, target(name="c"): 1.0}
    found = Farss(boundary=1, r_avg=4).allocate(targets)
    assert found[target(name="a")].rank == 8
    assert found[target(name="b")].rank == found[target(name="c")].rank >= 1


def test_ties_are_broken_by_order() -> None:
    W = torch.eye(6)
    for boundary, kept in ((0, [1, 1, 1, 0, 0, 0]), (1, [0, 0, 0, 1, 1, 1])):  # deep: the first; shallow: the last
        made = built(Farss(boundary=boundary), target(m=6, n=6), W, torch.eye(6), torch.eye(6), 3)
        torch.testing.assert_close(made.init.dense(), torch.diag(torch.tensor(kept).float()))


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient_covariances_still_give_finite_factors(rank: int) -> None:
    made = built(Farss(boundary=1), target(), weight(), psd(N, 1, rank), psd(M, 2, rank), 4)
    assert torch.isfinite(made.init.B).all() and torch.isfinite(made.init.A).all()
    constant = torch.full((N, N), 2.0)  # every input is the same
    assert torch.isfinite(built(Farss(boundary=0), target(), weight(), constant, psd(M, 2), 4).init.A).all()


def test_a_shallow_target_smaller_than_r_max_gets_what_it_can_have() -> None:
    small, large = target(name="a", m=3, n=9), target(name="b", m=64, n=64)
    found = Farss(boundary=1, r_max=16, r_min=4, r_avg=8).allocate({small: 1e-6, large: 1.0})
    assert found[small].rank == 3
    assert found[large].rank == 4


@pytest.mark.parametrize(
    "options",
    [
        {"r_min": 0},
        {"r_min": 9, "r_max": 8},
        {"r_avg": 0},
        {"boundary": -1},
        {"alpha": 0.0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"method.{next(iter(options))}"):
        Farss(**options)


@pytest.mark.parametrize(("blocks", "wanted"), [(2, 1), (4, 1), (12, 3), (30, 7), (32, 8)])
def test_the_boundary_is_a_quarter_of_the_depth_unless_it_is_given(blocks: int, wanted: int) -> None:
    assert Farss().fitted(blocks).boundary == wanted
    assert Farss(boundary=2).fitted(blocks).boundary == 2


def test_a_plan_in_python_takes_its_boundary_from_the_model(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path)
    made, given = (
        plan_for(bench.model, method, StatStore(tmp_path), data={"task": bench.task})
        for method in (Farss(rank=4, r_max=4, r_avg=3), Farss(rank=4, r_max=4, r_avg=3, boundary=1))
    )
    assert made.options["boundary"] == 1
    assert all(torch.equal(a.init.B, b.init.B) for a, b in zip(made.targets, given.targets, strict=True))


def test_inverse_weights_do_not_depend_on_the_unit() -> None:
    values = {target(name=f"t{i}"): value for i, value in enumerate([0.5, 2.0, 3.5])}
    for factor in (1e-20, 1e20):
        assert inverse_weights({t: v * factor for t, v in values.items()}) == pytest.approx(inverse_weights(values))


@pytest.mark.parametrize("architecture", MODELS)
def test_the_parts_equal_the_reference_on_a_model(architecture: str, tmp_path: Path) -> None:
    bench, method = Bench(MODELS[architecture](), tmp_path), Farss(rank=4, boundary=1, r_avg=4)
    statistics, made = bench.collect(method), plan(bench, method)
    read: Callable[[Target], Tensor] = lambda t: read_weight(bench.model, t)  # noqa: E731
    shallow = [t for t in bench.targets() if t.layer == 0]
    I = [  # noqa: E741
        reference.importance(read(t), statistics.view(t)[INPUT], statistics.view(t)[GRADIENT]) for t in shallow
    ]
    assert [made[t.name].decision.rank for t in shallow] == reference.paper_ranks(I, 4, 1, 4)
    for t in made.targets:
        view = statistics.view(t.target)
        wanted = reference.factors(
            read(t.target), view[INPUT], view[GRADIENT], t.decision.rank, shallow=t.target.layer == 0
        )
        assert relative(t.init.dense(), wanted) < 1e-3


def test_the_release_caps_the_largest_rank_by_the_rank_and_the_mean_by_that() -> None:
    small = Farss.as_released(rank=32)
    assert (small.r_max, small.r_avg, RELEASED.r_max, RELEASED.r_avg) == (32, 32, 64, 50)


@pytest.mark.parametrize(
    ("method", "shares", "uncapped"),
    [
        (Farss(), (6, 1, 8), (8, 1, 8)),
        (Farss(rank=2), (2, 1, 2), (6, 1, 8)),
        (Farss(rank=2, r_min=4), (2, 2, 2), (6, 4, 8)),
        (Farss.as_released(rank=32), (32, 1, 32), (50, 1, 64)),
    ],
)
def test_no_shallow_target_gets_more_than_the_rank(method: Farss, shares: Any, uncapped: Any) -> None:
    """On the first block of atlas, at the defaults too; as the released code caps them."""
    tokenizer, model = load_tokenizer(str(atlas.model_path())), load_model(str(atlas.model_path()))
    rows = map(json.loads, atlas.data_path("topics.train.jsonl").read_text().splitlines()[:16])
    task = [(f"{row['text']}\nTopic:", f" {row['topic']}") for row in rows]
    method, options = dataclasses.replace(method, boundary=1), keeptune.PlanOptions(layers=[0])
    made = keeptune.plan(model, tokenizer, method, task=task, options=options)
    I = [float(t.evidence["importance"]) for t in made.targets]  # noqa: E741
    ranks = [t.decision.rank for t in made.targets]
    assert ranks == reference.paper_ranks(I, *shares)
    assert ranks != reference.paper_ranks(I, *uncapped)
    assert max(ranks) <= method.rank
    assert method.size(made.targets[0].target, ()).rank == shares[0]
