"""Nodes switched off give exactly zero, none of them is the base, and afterwards the model is what it was."""

from __future__ import annotations

import pytest
import torch
from tests.models import Factory, gpt2, llama
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.target import Target
from keeptune.model.blocks import down_projections
from keeptune.model.probes.block_calls import without_nodes

IDS = torch.tensor([[1, 5, 9, 14]])


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def outputs_of(model: PreTrainedModel, target: Target) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(target.name).register_forward_hook(lambda _m, _i, output: seen.append(output))
    logits(model)
    handle.remove()
    return seen[0]


@pytest.fixture(params=[llama, gpt2])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    make: Factory = request.param
    made = make().eval()
    for target in down_projections(made):  # GPT-2 starts with biases of zero
        bias = made.get_submodule(target.name).bias
        if isinstance(bias, Tensor):
            with torch.no_grad():
                bias.fill_(0.5)
    return made


def test_these_nodes_give_zero_and_others_do_not(model: PreTrainedModel) -> None:
    first, last = down_projections(model)
    before = outputs_of(model, first)
    with without_nodes(model, {first.name: [0, 7], last.name: []}):
        found = outputs_of(model, first)
    assert (found[..., [0, 7]] == 0).all()
    others = [node for node in range(first.out_features) if node not in (0, 7)]
    assert torch.equal(found[..., others], before[..., others])
    assert (before[..., [0, 7]] != 0).all()


def test_it_is_the_model_whose_rows_and_biases_are_zero(model: PreTrainedModel) -> None:
    target = down_projections(model)[0]
    with without_nodes(model, {target.name: [3, 4]}):
        found = logits(model)
    module = model.get_submodule(target.name)
    with torch.no_grad():
        weight = module.weight
        assert isinstance(weight, Tensor)
        (weight.T if target.transposed else weight)[[3, 4]] = 0
        if isinstance(module.bias, Tensor):
            module.bias[[3, 4]] = 0
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)


def test_suppressing_nothing_is_the_base_and_nothing_stays_behind(model: PreTrainedModel) -> None:
    base, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    names = [target.name for target in down_projections(model)]
    with without_nodes(model, dict.fromkeys(names, ())):
        assert torch.equal(logits(model), base)
    with pytest.raises(RuntimeError, match="broken"), without_nodes(model, {names[0]: range(4)}):
        assert not torch.equal(logits(model), base)
        raise RuntimeError("broken")
    assert torch.equal(logits(model), base)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_zero_and_not_a_product_with_zero(model: PreTrainedModel) -> None:
    target = down_projections(model)[0]
    weight = model.get_submodule(target.name).weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        (weight.T if target.transposed else weight)[2] = torch.inf
    with without_nodes(model, {target.name: [2]}):
        assert logits(model).isfinite().all()
