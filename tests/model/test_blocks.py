from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.models import MODELS
from torch import nn

from keeptune.core.errors import ModelError, PlanError
from keeptune.core.weights import read_weight
from keeptune.model.blocks import body, find_targets, roles_of

ROLES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "roberta": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}
# Role -> (m, n) of W in y = W x.
SHAPES = {
    "llama": {"q_proj": (32, 32), "k_proj": (16, 32), "gate_proj": (48, 32), "down_proj": (32, 48)},
    "qwen2": {"q_proj": (32, 32), "v_proj": (16, 32), "up_proj": (48, 32), "down_proj": (32, 48)},
    "gpt2": {"c_attn": (96, 32), "attn.c_proj": (32, 32), "c_fc": (48, 32), "mlp.c_proj": (32, 48)},
    "roberta": {"attention.output.dense": (32, 32), "intermediate.dense": (48, 32), "output.dense": (32, 48)},
}
# The roles of a block that are fed by one tensor; every other role stands alone.
SHARED = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "qwen2": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "gpt2": [],
    "roberta": [{"query", "key", "value"}],
}


@pytest.mark.parametrize("architecture", MODELS)
def test_every_linear_map_is_found_in_model_order_by_role(architecture: str) -> None:
    found = find_targets(MODELS[architecture]())
    assert [(t.layer, t.role) for t in found] == [(layer, role) for layer in (0, 1) for role in ROLES[architecture]]
    assert all(f".{t.layer}." in t.name and t.name.endswith("." + t.role) for t in found)


@pytest.mark.parametrize("architecture", MODELS)
def test_targets_have_the_shape_and_map_of_the_equations(architecture: str) -> None:
    model = MODELS[architecture]()
    for target in find_targets(model):
        shape = (target.out_features, target.in_features)
        assert shape == SHAPES[architecture].get(target.role, shape)
        x = torch.randn(3, target.in_features)
        module = model.get_submodule(target.name)
        shift = module.bias if module.bias is not None else 0.0
        torch.testing.assert_close(module(x), x @ read_weight(model, target).T + shift, rtol=1e-5, atol=1e-5)
        assert target.transposed is (architecture == "gpt2")


@pytest.mark.parametrize("architecture", MODELS)
def test_targets_fed_by_one_tensor_share_an_input_group(architecture: str) -> None:
    groups: dict[tuple[int, str], set[str]] = {}
    for target in find_targets(MODELS[architecture]()):
        groups.setdefault((target.layer, target.input_group), set()).add(target.role)
    alone = set(ROLES[architecture]) - set().union(*SHARED[architecture])
    wanted = [*SHARED[architecture], *({role} for role in alone)]
    for layer in (0, 1):
        found = [roles for (block, _), roles in groups.items() if block == layer]
        assert Counter(map(frozenset, found)) == Counter(map(frozenset, wanted))


@pytest.mark.parametrize("architecture", MODELS)
def test_an_input_group_is_named_after_its_first_module(architecture: str) -> None:
    first: dict[str, str] = {}
    for target in find_targets(MODELS[architecture]()):
        assert first.setdefault(target.input_group, target.name) == target.input_group


def test_the_group_does_not_depend_on_which_roles_are_asked_for() -> None:
    model = MODELS["llama"]()
    every = {t.name: t for t in find_targets(model)}
    assert find_targets(model, ["v_proj"]) == [every[f"model.layers.{i}.self_attn.v_proj"] for i in (0, 1)]


@pytest.mark.parametrize("architecture", MODELS)
def test_layers_are_chosen_by_their_index(architecture: str) -> None:
    model = MODELS[architecture]()
    every = find_targets(model)
    assert find_targets(model, layers=[1]) == [t for t in every if t.layer == 1] != []
    assert find_targets(model, layers=[1, 0, 1]) == every
    role = ROLES[architecture][0]
    assert find_targets(model, [role], [0]) == [t for t in every if (t.layer, t.role) == (0, role)]


@pytest.mark.parametrize(("layers", "got"), [([0, 2], "2"), ([-1], "-1"), ([5, 2, 1], "2, 5"), ([], "none")])
def test_a_layer_that_is_not_there_is_refused_with_the_number_of_blocks(layers: list[int], got: str) -> None:
    with pytest.raises(PlanError, match="0 to 1: the model has 2 blocks") as caught:
        find_targets(MODELS["llama"](), layers=layers)
    assert (caught.value.where, caught.value.got) == ("layers", got)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_head_is_no_target_tied_or_not(architecture: str, tied: bool) -> None:
    model = _tied(architecture, tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    names = [t.name for t in find_targets(model)]
    assert len(names) == 14
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_the_head_as_a_target_is_refused_with_the_true_reason() -> None:
    with pytest.raises(PlanError, match="the head over the vocabulary") as caught:
        find_targets(MODELS["llama"](), ["q_proj", "lm_head"])
    assert "modules_to_save: [lm_head]" in caught.value.next_step


def _tied(architecture: str, tied: bool) -> Any:
    config = MODELS[architecture]().config
    config.tie_word_embeddings = tied
    return type(MODELS[architecture]())(config)


@pytest.mark.parametrize("architecture", MODELS)
def test_an_unknown_role_is_refused_with_those_there_are(architecture: str) -> None:
    with pytest.raises(PlanError) as caught:
        find_targets(MODELS[architecture](), [ROLES[architecture][0], "mlp.c_prj"])
    assert caught.value.where == "targets: mlp.c_prj"
    assert f"Known: {', '.join(sorted(ROLES[architecture]))}." in caught.value.next_step


def test_the_nearest_role_is_offered() -> None:
    with pytest.raises(PlanError, match='Did you mean "down_proj"'):
        find_targets(MODELS["llama"](), ["down_prj"])


def test_a_model_without_linear_maps_is_refused() -> None:
    model = MODELS["llama"]()
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match=r"no linear map"):
        find_targets(model)


@pytest.mark.parametrize("training", [True, False])
def test_finding_targets_leaves_the_model_as_it_was(training: bool) -> None:
    model = MODELS["gpt2"]().train(training)
    find_targets(model)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_role_is_the_shortest_suffix_unique_in_its_block() -> None:
    names = ["h.0.attn.q", "h.0.attn.out", "h.0.mlp.out", "h.1.attn.q", "h.1.attn.out", "h.1.mlp.out", "pool"]
    roles = roles_of(names)
    assert [roles[name] for name in names] == ["q", "attn.out", "mlp.out", "q", "attn.out", "mlp.out", "pool"]


def test_a_role_never_matches_a_piece_of_a_name() -> None:
    roles = roles_of(["h.0.proj", "h.0.q_proj"])
    assert roles == {"h.0.proj": "proj", "h.0.q_proj": "q_proj"}


@pytest.mark.parametrize("architecture", MODELS)
def test_the_body_has_all_targets_and_not_the_head(architecture: str) -> None:
    model = MODELS[architecture]()
    inner = set(body(model).modules())
    assert all(model.get_submodule(t.name) in inner for t in find_targets(model))
    assert model.get_output_embeddings() not in inner
