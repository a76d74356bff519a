from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import EvaConfig
from tests.methods.support import normal, target_of, weight, with_singular_values
from tests.models import MODELS, Bench, GivenStats, relative
from tests.reference.statistics_reference import stacked_inputs
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision
from keeptune.core.target import Target
from keeptune.methods.eva import Eva, components, share_ranks
from keeptune.statistics.covariance import InputCovariance
from keeptune.statistics.input_mean import InputMean

R = 4


def found(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Components of inputs ``(tokens, n)`` from their statistics, which are float32."""
    return components((X.T @ X / len(X)).float(), tuple(X.mean(0).float().tolist()), k)


def inputs(n: int = 24, offset: float = 0.0) -> Tensor:
    return with_singular_values((200, n), 14 * torch.logspace(0, -1, n), seed=3) + offset * normal(1, n, seed=5)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("k", [1, 6, 24])
def test_components_are_those_of_the_centred_inputs(offset: float, k: int) -> None:
    """The definition: right singular vectors of X less its mean."""
    X = inputs(offset=offset)
    _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    xi, V = found(X, k)
    assert relative(V.T @ V, torch.eye(k)) < 1e-12
    assert relative(xi, (S**2 / (S**2).sum())[:k]) < 1e-4
    signs = (V * Vh[:k].T).sum(0).sign()
    assert relative(V[:, :1] * signs[:1], Vh[:1].T) < 1e-4
    assert relative(V @ V.T, Vh[:k].T @ Vh[:k]) < 1e-3
    if k == 24:
        assert float(xi.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_mean_matters() -> None:
    """A negative control: without centring, the first component is the mean."""
    X = inputs(offset=3.0)
    V = components((X.T @ X / len(X)).float(), (0.0,) * 24, 1)[1]
    mean = X.mean(0) / X.mean(0).norm()
    assert abs(float(V[:, 0] @ mean)) > 0.99
    assert abs(float(found(X, 1)[1][:, 0] @ mean)) < 0.9


@pytest.mark.parametrize("X", [torch.zeros(9, 8), normal(1, 8).expand(9, 8)], ids=["zero", "constant"])
def test_inputs_that_do_not_vary_explain_nothing(X: Tensor) -> None:
    xi, V = found(X, 3)
    assert not xi.any()
    assert relative(V.T @ V, torch.eye(3)) < 1e-12


@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_the_size_of_the_inputs_changes_nothing(factor: float) -> None:
    X = inputs(offset=1.0)
    assert relative(found(factor * X, 5)[0], found(X, 5)[0]) < 1e-4
    V, U = found(factor * X, 5)[1], found(X, 5)[1]
    assert relative(V @ V.T, U @ U.T) < 1e-4


# Ranks


def named(index: int) -> Target:
    return Target(f"h.{index}.up", index, "up", 8, 8, input_group=f"h.{index}.up")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.9]), min_size=1, max_size=6), min_size=1, max_size=6),
    st.integers(1, 30),
)
def test_laws_of_the_shared_ranks(lists: list[list[float]], budget: int) -> None:
    variance = {named(i): torch.tensor(sorted(xi, reverse=True)) for i, xi in enumerate(lists)}
    ranks = share_ranks(variance, budget)
    assert list(ranks) == list(variance)
    assert sum(ranks.values()) == min(budget, sum(map(len, lists)))
    taken = [float(x) for t, xi in variance.items() for x in xi[: ranks[t]]]
    left = [float(x) for t, xi in variance.items() for x in xi[ranks[t] :]]
    assert not taken or not left or min(taken) >= max(left)
    # Slow and obvious: one at a time, the first of the largest.
    rest, wanted = {t: xi.tolist() for t, xi in variance.items()}, Counter[Target]()
    for _ in range(sum(ranks.values())):
        best = max((t for t in rest if rest[t]), key=lambda t: rest[t][0])
        rest[best].pop(0)
        wanted[best] += 1
    assert ranks == {t: wanted[t] for t in variance}


def given_stats(X: Tensor) -> GivenStats:
    role: Any = "task"
    return GivenStats({InputCovariance(role): (X.T @ X / len(X)).float(), InputMean(role): X.mean(0).float()})


def test_no_target_gets_more_than_it_can_use_or_rho_allows() -> None:
    X = inputs(24)
    small = Target("h.0.k", 0, "k", 5, 24, input_group="h.0.q")
    large = Target("h.0.q", 0, "q", 24, 24, input_group="h.0.q")
    method = Eva(rank=4, rho=2.5)
    scores = {t: method.score(t, torch.empty(0), given_stats(X)) for t in (small, large)}  # type: ignore[arg-type]
    assert [len(scores[t]) for t in (small, large)] == [5, 10]
    assert {len(Eva(rank=4, rho=1.0).score(t, torch.empty(0), given_stats(X))) for t in (small, large)} == {4}  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"h\.0\.k: got rank 6"):
        Eva(rank=6).score(small, torch.empty(0), given_stats(X))  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_scale_is_alpha_over_the_mean_rank_whatever_the_rank(rank: int) -> None:
    W = weight("random", "square")
    plan = Eva(rank=R, alpha=6.0).build(target_of(W), W, given_stats(inputs(24)), Decision(rank))  # type: ignore[arg-type]
    assert plan.scale == 1.5
    assert plan.init.A.shape == (rank, 24)
    assert not plan.init.B.any()
    assert not plan.anchored
    assert plan.trainable == {"A", "B"}


@pytest.mark.parametrize("architecture", MODELS)
def test_ranks_sum_to_the_budget_and_A_is_orthonormal(architecture: str, tmp_path: Path) -> None:
    bench = Bench(MODELS[architecture](), tmp_path)
    plan = bench.plan(Eva(rank=R))
    ranks = [t.decision.rank for t in plan.targets]
    assert sum(ranks) == R * len(bench.targets())
    assert min(ranks) < R < max(ranks) <= 2 * R
    for target_plan in plan.targets:
        A = target_plan.init.A
        assert relative(A @ A.T, torch.eye(len(A))) < 1e-5
        X = stacked_inputs(bench.model, target_plan.target.name, bench.task)
        _, S, Vh = torch.linalg.svd((X - X.mean(1, keepdim=True)).T, full_matrices=False)
        xi = target_plan.evidence["explained_variance"]
        assert relative(xi, (S**2 / (S**2).sum())[: len(xi)]) < 1e-4


def test_without_redistribution_every_target_gets_the_same(tmp_path: Path) -> None:
    plan = Bench(MODELS["llama"](), tmp_path).plan(Eva(rank=R, rho=1.0))
    assert {t.decision.rank for t in plan.targets} == {R}


# PEFT


def by_peft(bench: Bench, rho: float, alpha: int) -> dict[str, Any]:
    """PEFT's layers by name, from one padded batch with a mask; a target without a rank has no layer."""
    (batch,) = bench.task.batches(10**6)
    config = LoraConfig(
        r=R,
        lora_alpha=alpha,
        target_modules=sorted({t.role for t in bench.targets()}),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, use_label_mask=False),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # PEFT's randomised SVDs draw from the global state
        model = get_peft_model(bench.model, config, low_cpu_mem_usage=True)
        data = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        initialize_lora_eva_weights(model, [data], show_progress_bar=False)
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize(("rho", "sharp"), [(1.0, 2), (2.0, 4)])
def test_ranks_scale_and_subspaces_are_pefts(rho: float, sharp: int, tmp_path: Path) -> None:
    """From one batch; PEFT too centres, and leaves padding out.

    Its SVD is a randomised one of 2 rho rank vectors, of which the first quarter are sharp enough.
    """
    bench = Bench(MODELS["llama"](), tmp_path, roles=["q_proj", "o_proj", "up_proj", "down_proj"])
    plan = bench.plan(Eva(rank=R, rho=rho, alpha=6.0))
    layers = by_peft(bench, rho, 6)
    assert {t.target.name: t.decision.rank for t in plan.targets} == {n: m.r["default"] for n, m in layers.items()}
    for target_plan in plan.targets:
        layer, A = layers[target_plan.target.name], target_plan.init.A[:sharp]
        theirs = layer.lora_A["default"].weight.detach()[:sharp]
        assert layer.scaling["default"] == pytest.approx(target_plan.scale)
        assert relative(A.T @ A, theirs.T @ theirs) < 0.1


def test_targets_that_share_an_input_get_pefts_ranks_between_them(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path, roles=["q_proj", "k_proj", "v_proj", "o_proj"])
    ours = bench.plan(Eva(rank=R, rho=2.0))
    theirs = by_peft(bench, 2.0, 6)
    for layer in (0, 1):
        names = [f"model.layers.{layer}.self_attn.{x}_proj" for x in "qkv"]
        mine = {t.target.name: t.decision.rank for t in ours.targets}
        assert sorted(mine.get(n, 0) for n in names) == sorted(
            theirs[n].r["default"] if n in theirs else 0 for n in names
        )
        assert mine[names[0]] == max(mine.get(n, 0) for n in names)


@pytest.mark.parametrize(
    ("options", "where"), [({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout"), ({"rho": 0.9}, "rho")]
)
def test_options_out_of_range_are_refused(options: dict[str, float], where: str) -> None:
    with pytest.raises(PlanError, match=rf"method\.{where}"):
        Eva(**options)


def test_dropout_is_handed_to_peft() -> None:
    assert Eva(dropout=0.05).peft() == {"lora_dropout": 0.05}
