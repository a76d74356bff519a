"""Fused experts: each is a target with the statistics of its own tokens, in both layouts, held against modules."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tests.models import MIXTURES, Bench, asking, gpt_oss, inputs_of, llama, logits, off_by, qwen3_moe, relative, tokens
from tests.reference.experts_reference import unfused
from tests.reference.gradient_reference import rows_of
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from keeptune.core.errors import PlanError, StatisticsError
from keeptune.core.weights import read_weight
from keeptune.model.blocks import find_targets, is_nested
from keeptune.model.runner import Runner, Taps
from keeptune.statistics.covariance import (
    GradientCovariance,
    InputCovariance,
    TokenCount,
    WeightFisher,
    tokens_per_learned,
)

every_mixture = pytest.mark.parametrize("architecture", MIXTURES)


@every_mixture
def test_the_reference_computes_what_the_fused_model_does(architecture: str) -> None:
    model = MIXTURES[architecture]()
    assert off_by(logits(unfused(model), tokens()), logits(model, tokens())) < 1e-5


@every_mixture
def test_each_expert_is_a_target_with_a_role_that_all_share(architecture: str) -> None:
    model = MIXTURES[architecture]()
    modules = dict(unfused(model).named_modules())
    experts = [t for t in find_targets(model) if t.expert is not None]
    assert {t.role for t in experts} == {"experts.gate_up_proj", "experts.down_proj"}
    blocks = {t.layer for t in experts}
    assert len(experts) == len(blocks) * 4 * 2
    for t in experts:
        linear = modules[t.name]
        assert isinstance(linear, nn.Linear)
        assert torch.equal(read_weight(model, t), linear.weight)
        assert (t.out_features, t.in_features) == tuple(linear.weight.shape)
        assert is_nested(t.name) and t.input_group == t.name
    assert {t.name for t in find_targets(model, ["experts.down_proj"])} == {t.name for t in experts if "down" in t.role}


@every_mixture
def test_targets_are_found_without_weights(architecture: str) -> None:
    model = MIXTURES[architecture]()
    with torch.device("meta"):
        shapes = type(model)(model.config)
    assert find_targets(shapes) == find_targets(model)
    assert model.config._experts_implementation == MIXTURES[architecture]().config._experts_implementation


@every_mixture
@pytest.mark.parametrize("batch_tokens", [1, 1024])
def test_statistics_of_an_expert_are_those_of_its_own_tokens(
    architecture: str, batch_tokens: int, tmp_path: Path
) -> None:
    """Omega, Gamma, the Fisher and N, against hand counts on modules."""
    model = MIXTURES[architecture]()
    bench, count = Bench(model, tmp_path), TokenCount("task")
    omega, gamma = InputCovariance("task"), GradientCovariance("task", "true")
    fisher = WeightFisher("task", "true", per="token")
    statistics = bench.collect(asking(count, omega, gamma, fisher), batch_tokens=batch_tokens)
    modules, slots = unfused(model), 0
    for t in [t for t in bench.targets() if t.expert is not None and t.layer == 1]:
        rows, view = rows_of(modules, t.name, bench.task), statistics.view(t)
        n = len(rows.h)
        assert int(view[count]) == n > 0
        assert relative(view[omega], rows.h.T @ rows.h / n) < 1e-5
        assert relative(view[gamma], rows.delta.T @ rows.delta / n) < 1e-5
        wanted = rows.delta.square().T @ rows.h.square() / bench.task.learned_tokens
        assert relative(view[fisher] * tokens_per_learned(view, count), wanted) < 1e-5
        slots += n * (t.role == "experts.down_proj")
    assert slots == 2 * bench.task.tokens  # each token goes to two experts


@every_mixture
def test_maps_beside_experts_have_the_statistics_they_have_with_modules(architecture: str, tmp_path: Path) -> None:
    model = MIXTURES[architecture]()
    asked = asking(InputCovariance("task"), GradientCovariance("task", "true"))
    found, bench = Bench(model, tmp_path / "a").collect(asked), Bench(unfused(model), tmp_path / "b")
    wanted = bench.collect(asked)
    for t in [t for t in Bench(model, tmp_path).targets() if t.expert is None]:
        for request in asked.requests(t):
            assert relative(found.view(t)[request], wanted.view(t)[request]) < 1e-5


def test_padding_reaches_no_expert(tmp_path: Path) -> None:
    """Negative control: in batches with padding the rows of an expert are refused, not guessed."""
    bench, name = Bench(qwen3_moe(), tmp_path), "model.layers.0.mlp.experts.1.down_proj"
    seen = sum(len(rows) for rows in inputs_of_all(bench, "model.layers.0.mlp.experts").values())
    assert seen == 2 * bench.data.tokens
    with pytest.raises(StatisticsError, match=r"experts\.1\.down_proj.*some of them padding"):
        inputs_of(bench.model, [name], bench.data)


def inputs_of_all(bench: Bench, module: str) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    names = [t.name for t in bench.targets() if t.module == module and t.name.endswith("down_proj")]
    sinks = {name: [found.setdefault(name, []).append] for name in names}
    Runner(bench.model).run(bench.data.batches(padded=False), Taps(sinks), title="")
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_an_expert_that_no_token_reached_is_reported(tmp_path: Path) -> None:
    model = gpt_oss()
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e9
    bench = Bench(model, tmp_path)
    statistics = bench.collect(asking(TokenCount("task")))
    assert set(statistics.unseen) == {f"model.layers.0.mlp.experts.3.{leaf}" for leaf in ("gate_up_proj", "down_proj")}


def test_a_role_of_experts_is_unknown_to_a_dense_model_and_the_other_way_round() -> None:
    with pytest.raises(PlanError, match=r"experts\.down_proj.*LlamaForCausalLM.*down_proj"):
        find_targets(llama(), ["experts.down_proj"])
    with pytest.raises(PlanError, match=r"targets: down_proj.*Qwen3Moe.*experts\.down_proj"):
        find_targets(qwen3_moe(), ["down_proj"])


@pytest.mark.parametrize("dense", [1, 2])
def test_maps_that_peft_takes_for_experts_are_named_and_left_alone(
    dense: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter there would be lost: PEFT renames mlp.down_proj of a dense block to the experts' parameter.

    It does so where there are no experts in floats, too: none, or packed ones.
    """
    fields = {"num_hidden_layers": 2, "first_k_dense_replace": dense}
    config = DeepseekV3Config(**{**MIXTURES["deepseek"]().config.to_dict(), **fields})
    with caplog.at_level(logging.WARNING):
        roles = {t.role for t in find_targets(DeepseekV3ForCausalLM(config))}
    assert "model.layers.0.mlp.down_proj and 5 more: left alone, since PEFT" in caplog.text
    assert not {role for role in roles if "shared" in role or role in ("down_proj", "up_proj", "gate_proj")}


def test_stacks_that_are_not_marked_as_experts_are_named_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    config = Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        pad_token_id=0,
    )
    with caplog.at_level(logging.WARNING):
        targets = find_targets(Llama4ForCausalLM(config))
    assert not any(t.expert is not None for t in targets)
    assert "experts" in caplog.text and "left alone" in caplog.text
