from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench, GivenStats, logits, off_by, tokens, train_steps
from torch import Tensor

from keeptune.adapter.install import install
from keeptune.adapter.trained_change import change_of
from keeptune.core.plan import Decision
from keeptune.core.target import Target
from keeptune.methods.lora_null import LoraNull, released_null_space
from keeptune.statistics.covariance import InputCovariance, ReleasedCovariance

TARGET = Target("h.0.up", 0, "up", 6, 8, input_group="h.0.up")


def omega() -> Tensor:
    X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    return X.T @ X / 50


def built(weight: Tensor | None = None, **options: Any) -> Any:
    method = LoraNull(**{"rank": 3} | options)
    (request,) = method.requests(TARGET)
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)) if weight is None else weight
    return method.build(TARGET, weight, GivenStats({request: omega()}), Decision(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(("variant", "trained"), [("v1", {"A", "B"}), ("v2", {"B"})])
def test_v1_trains_both_factors_and_v2_only_B(variant: str, trained: set[str]) -> None:
    assert built(variant=variant).trainable == trained


def test_the_variants_start_from_the_same_factors() -> None:
    a, b = built(variant="v1").init, built(variant="v2").init
    assert torch.equal(a.A, b.A)
    assert torch.equal(a.B, b.B)


def test_the_scale_is_one() -> None:
    assert built().scale == 1.0


@pytest.mark.parametrize(
    ("covariance", "request_"),
    [("exact", InputCovariance("knowledge", precision="double")), ("released", ReleasedCovariance("knowledge"))],
)
def test_the_covariance_is_taken_on_knowledge_data(covariance: Any, request_: Any) -> None:
    assert LoraNull(covariance=covariance).requests(TARGET) == {request_}


def test_released_factors_are_float16_values() -> None:
    init = built(covariance="released").init
    assert torch.equal(init.A, init.A.half().float())
    assert torch.equal(init.B, init.B.half().float())
    assert not torch.equal(built().init.A, built().init.A.half().float())


def test_the_released_svd_ranks_negative_eigenvalues_by_size() -> None:
    """Of diag(5, 0.1, -2) the exact bottom is -2; the released code takes 0.1."""
    values, U = released_null_space(torch.diag(torch.tensor([5.0, 0.1, -2.0])), 1)
    torch.testing.assert_close(values, torch.tensor([0.1]) / ((5.0 + 0.1 - 2.0) / 3))  # relative to the mean
    torch.testing.assert_close(U.abs(), torch.tensor([[0.0], [1.0], [0.0]]))


def test_evidence_tells_how_empty_the_null_space_is() -> None:
    evidence = built().evidence
    wanted = torch.linalg.eigvalsh(omega().double())[:3] / omega().double().diagonal().mean()
    torch.testing.assert_close(evidence["null_variance"].double(), wanted, rtol=1e-5, atol=0)
    assert evidence.keys() == {"null_variance", "singular_values"}
    assert all(value.ndim == 1 and len(value) == 3 for value in evidence.values())


def test_a_weight_that_cannot_use_all_null_directions_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    thin = torch.randn(6, 1) @ torch.randn(1, 8)
    with caplog.at_level(logging.WARNING):
        plan = built(thin)
    assert [record.message for record in caplog.records] == ["h.0.up: W reads only 1 of the 3 null directions"]
    assert torch.isfinite(plan.init.dense()).all()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        built()
    assert caplog.records == []


def test_as_released_is_the_released_covariance_at_the_papers_rank() -> None:
    assert LoraNull.as_released() == LoraNull(rank=128, variant="v1", covariance="released", biases=True)
    assert LoraNull.as_released(4, "v2") == LoraNull(rank=4, variant="v2", covariance="released", biases=True)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_the_release_trains_the_biases_that_there_are(variant: Any, tmp_path: Path) -> None:
    bench = Bench(MODELS["gpt2"](), tmp_path)
    method = LoraNull.as_released(4, variant)
    plan = bench.plan(method)
    base, ids = copy.deepcopy(bench.model), tokens(7)
    tuned = install(bench.model, plan)
    assert off_by(logits(tuned, ids), logits(base, ids)) < 1e-4
    train_steps(tuned)
    found = change_of(tuned, plan)
    assert all(found.biases[t.target.name].any() for t in plan.targets)
    size = sum(method.size(t.target, ()).trained for t in plan.targets)
    assert size == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert size > sum(LoraNull(4, variant).size(t.target, ()).trained for t in plan.targets)
    with torch.no_grad():  # what was trained, in the base's own weights
        for name, change in found.weights.items():
            module = base.get_submodule(name)
            dense = change.dense()
            module.weight += dense.T if plan[name].target.transposed else dense  # type: ignore[operator]
            module.bias += found.biases[name]  # type: ignore[operator]
    assert off_by(logits(tuned, ids), logits(base, ids)) < 1e-4
    assert all("bias" not in t.trainable for t in Bench(base, tmp_path).plan(LoraNull(4)).targets), (
        "the paper trains none"
    )
