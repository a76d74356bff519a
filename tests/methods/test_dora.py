from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models import MODELS, Bench, copies, logits, off_by, relative, tokens, train_steps

from keeptune.adapter.export import write_merged
from keeptune.adapter.install import check_frozen, install, lora_layer, trained_names, trained_state
from keeptune.core.errors import PlanError, TrainError
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.methods.dora import Dora
from keeptune.methods.lora import Lora
from keeptune.model.head import Head
from keeptune.model.pretrained import LoadOptions, load_model

every_model = pytest.mark.parametrize("architecture", MODELS)


def made(folder: Path, method: Any, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Plan:
    return Bench(MODELS[architecture](dtype=dtype), folder).plan(method)


@every_model
def test_magnitudes_are_the_lengths_of_the_rows_of_W(tmp_path: Path, architecture: str) -> None:
    """Rows of W as the equations have it: GPT-2 stores it the other way round."""
    model = MODELS[architecture]()
    for t in made(tmp_path, Dora(rank=4), architecture).targets:
        W = read_weight(model, t.target)
        wanted = torch.stack([row.norm() for row in W])
        torch.testing.assert_close(t.vectors["magnitude"], wanted)
        assert t.vectors["magnitude"].shape == (t.target.out_features,)
        assert t.trained_parameters == 4 * (t.target.out_features + t.target.in_features) + t.target.out_features


def test_it_starts_where_lora_starts(tmp_path: Path) -> None:
    plain = made(tmp_path, Lora(rank=4, seed=3))
    for t in made(tmp_path, Dora(rank=4, seed=3)).targets:
        assert torch.equal(t.init.A, plain[t.target.name].init.A)
        assert not t.init.B.any()
        assert t.trainable == {"A", "B", "magnitude"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_it_trains_as_pefts_dora_does(tmp_path: Path, architecture: str) -> None:
    """The same start in both: five AdamW steps give the same factors, magnitudes and logits."""
    base = MODELS[architecture]()
    plan = Bench(base, tmp_path).plan(Dora(rank=4, alpha=6.0))
    names = [t.target.name for t in plan.targets]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, use_dora=True, fan_in_fan_out=architecture == "gpt2")
    theirs: Any = get_peft_model(MODELS[architecture](), config)
    with torch.no_grad():
        for t in plan.targets:
            lora_layer(theirs, t.target.name).lora_A["default"].weight.copy_(t.init.A)
    ours = install(base, plan)
    for model in (theirs, ours):
        train_steps(model, steps=5, rate=3e-3)
    a, b = trained_state(ours, plan), trained_state(theirs, plan)
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-4)
    assert off_by(logits(ours.eval(), tokens(9)), logits(theirs.eval(), tokens(9))) < 1e-4
    moved = [a[f"{t.target.name}.magnitude"] - t.vectors["magnitude"] for t in plan.targets]
    assert min(float(m.abs().max()) for m in moved) > 1e-3


@every_model
def test_merged_rows_have_the_trained_lengths_and_the_directions_of_V(tmp_path: Path, architecture: str) -> None:
    base = MODELS[architecture]()
    plan = Bench(base, tmp_path).plan(Dora(rank=4))
    model: Any = install(base, plan)
    train_steps(model, steps=3)
    state = trained_state(model, plan)
    write_merged(model, plan, tmp_path / "out", MODELS[architecture]())
    found, fresh = load_model(str(tmp_path / "out"), LoadOptions(head=Head.of(base))), MODELS[architecture]()
    for t in plan.targets:
        name = t.target.name
        W, after = read_weight(fresh, t.target), read_weight(found, t.target)
        V = (W + t.scale * state[f"{name}.B"] @ state[f"{name}.A"]).double()
        torch.testing.assert_close(after.norm(dim=1), state[f"{name}.magnitude"], rtol=1e-5, atol=1e-6)
        for i in range(len(V)):
            assert float(torch.nn.functional.cosine_similarity(V[i], after[i].double(), dim=0)) > 1 - 1e-9
        assert relative(after, W) > 1e-3


def test_on_a_bfloat16_base_lengths_are_float32_and_the_base_keeps_its_bits(tmp_path: Path) -> None:
    """PEFT's own start rounds them to the base's dtype, and with that the output at the start."""
    base = MODELS["llama"](dtype=torch.bfloat16)
    before = copies(base)
    plan = made(tmp_path, Dora(rank=4), dtype=torch.bfloat16)
    model: Any = install(base, plan)
    train_steps(model, steps=2)
    for t in plan.targets:
        layer = lora_layer(model, t.target.name)
        assert layer.lora_magnitude_vector["default"].weight.dtype == torch.float32
        assert torch.equal(layer.get_base_layer().weight, before[f"{t.target.name}.weight"])


def test_a_frozen_magnitude_is_told(tmp_path: Path) -> None:
    plan = made(tmp_path, Dora(rank=4))
    model: Any = install(MODELS["llama"](), plan)
    check_frozen(model, plan)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector.default.weight"
    assert name in trained_names(model, plan)
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(TrainError, match=f"parameter {name}: got frozen"):
        check_frozen(model, plan)


def test_rows_without_a_direction_are_refused(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3:5] = 0
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj: got 2 rows of zeros.*up_proj out of `targets`"):
        Bench(model, tmp_path).plan(Dora(rank=4))
