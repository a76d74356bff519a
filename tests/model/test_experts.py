"""Mixtures of experts: each expert is a target, with the statistics of its own tokens; unseen ones are reported."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.models import HIDDEN, Bench, asking, llama, logits, off_by, relative, tokens, train_steps
from tests.reference.gradient_reference import rows_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.adapter.install import install
from keeptune.core.errors import ModelError, StatisticsError
from keeptune.methods.farss import Farss
from keeptune.methods.lora_null import LoraNull
from keeptune.model.blocks import down_projections, find_targets, is_nested
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.covariance import (
    GradientCovariance,
    InputCovariance,
    TokenCount,
    WeightFisher,
    tokens_per_learned,
)
from keeptune.statistics.store import StatStore


class Expert(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, 24, bias=False)
        self.down_proj = nn.Linear(24, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))


class Experts(nn.Module):
    """Each token goes to one expert, as rows of a flat matrix; the last expert never gets one."""

    def __init__(self, hidden: int, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, count)
        self.experts = nn.ModuleList(Expert(hidden) for _ in range(count))
        with torch.no_grad():
            self.router.bias[-1] = -1e9

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights = self.router(flat).softmax(-1)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            places = (chosen == index).nonzero().squeeze(1)
            if len(places):
                out = out.index_add(0, places, weights[places, index, None] * expert(flat[places]))
        return out.reshape(x.shape)


@pytest.fixture
def model() -> PreTrainedModel:
    made = llama()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for layer in made.model.layers:
            layer.mlp = Experts(HIDDEN)
    return made.eval()


def test_each_expert_is_a_target_with_a_role_of_its_own(model: PreTrainedModel) -> None:
    roles = {target.role for target in find_targets(model)}
    assert {f"{i}.{name}" for i in range(4) for name in ("up_proj", "down_proj")} <= roles
    assert is_nested("model.layers.0.mlp.experts.3.up_proj")


def test_an_experts_fisher_is_over_its_own_tokens_and_not_per_text(model: PreTrainedModel, tmp_path: Path) -> None:
    """It may see all tokens, in an order of its own: which row is of which text is not known."""
    bench, count = Bench(model, tmp_path), TokenCount("task")
    token, text = WeightFisher("task", "true", per="token"), WeightFisher("task", "true", per="text")
    statistics = bench.collect(asking(count, token))
    seen = 0.0
    for target in bench.targets():
        if target.role.endswith(".up_proj") and target.name not in statistics.unseen:
            view, rows = statistics.view(target), rows_of(model, target.name, bench.task)
            seen += float(view[count]) * (target.layer == 0)
            wanted = rows.delta.square().T @ rows.h.square() / bench.task.learned_tokens
            assert relative(view[token] * tokens_per_learned(view, count), wanted) < 1e-5
    assert seen == bench.task.tokens
    with torch.no_grad():  # all tokens to one expert
        for layer in model.model.layers:
            layer.mlp.router.bias[0] = 1e9
    with pytest.raises(StatisticsError, match=r'experts\.0\..*per="token"'):
        bench.collect(asking(text))


def test_statistics_of_an_expert_are_those_of_its_own_tokens(model: PreTrainedModel, tmp_path: Path) -> None:
    bench, method = Bench(model, tmp_path), Farss(rank=2, boundary=2, r_max=2, r_avg=1)
    statistics = bench.collect(method)
    compared = 0
    for target in bench.targets():
        if target.name in statistics.unseen:
            continue
        rows = rows_of(model, target.name, bench.task)
        view, n = statistics.view(target), rows.h.shape[0]
        assert relative(view[InputCovariance("task")], rows.h.T @ rows.h / n) < 1e-5
        assert relative(view[GradientCovariance("task", "true")], rows.delta.T @ rows.delta / n) < 1e-5
        compared += "experts" in target.name and 0 < n < bench.task.tokens
    assert compared >= 4


def test_experts_that_no_token_reached_are_reported_and_left_alone(
    model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(model, tmp_path)
    with caplog.at_level(logging.WARNING):
        plan = plan_for(model, LoraNull(rank=2), StatStore(tmp_path), data={"knowledge": bench.data})
    planned = {t.target.name for t in plan.targets}
    unseen = {t.name for t in bench.targets() if ".experts.3." in t.name}
    assert planned.isdisjoint(unseen) and len(unseen) == 4
    assert all(name in caplog.text for name in unseen)
    assert "model.layers.0.mlp.experts.3.up_proj" in " ".join(plan.provenance["notes"])
    assert any(".experts.0." in name for name in planned)


@pytest.mark.parametrize(
    "method", [LoraNull(rank=2), Farss(rank=2, boundary=1, r_max=2, r_avg=1)], ids=lambda m: m.name
)
def test_experts_are_tuned_like_any_target(model: PreTrainedModel, tmp_path: Path, method: object) -> None:
    bench = Bench(model, tmp_path)
    data = {"knowledge": bench.data, "task": bench.task}
    plan = plan_for(model, method, StatStore(tmp_path), data=data)  # type: ignore[arg-type]
    wanted = logits(model, tokens())
    tuned = install(model, plan, anchor="twin")
    assert isinstance(tuned, PeftModel)
    assert off_by(logits(tuned, tokens()), wanted) < 1e-5
    train_steps(tuned)
    assert off_by(logits(tuned, tokens()), wanted) > 1e-3


def test_an_experts_last_map_is_no_down_projection_of_the_mlp(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="mixtures of experts have none of their own"):
        down_projections(model)
