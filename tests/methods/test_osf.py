from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OSFConfig, get_peft_model
from tests.models import MODELS, Bench, labels_for, logits, off_by, tokens, train_steps
from torch import Tensor

from keeptune.adapter.install import install, lora_layer, trained_state
from keeptune.adapter.special_layers import subspace_change
from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.methods.osf import Osf


def planned(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Plan:
    return Bench(MODELS[architecture](dtype=dtype), folder).plan(Osf(**options))


def descend(model: Any, steps: int = 4) -> None:
    """Plain gradient descent."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.05)
    for step in range(steps):
        ids = tokens(step)
        optimiser.zero_grad()
        model(input_ids=ids, labels=labels_for(model, ids)).loss.backward()
        optimiser.step()


def leak(model: Any, plan: Plan, architecture: str, dtype: torch.dtype = torch.float32) -> float:
    """Share of the change that reads or writes the frozen directions, the largest over the targets."""
    fresh, shares = MODELS[architecture](dtype=dtype), []
    for t in plan.targets:
        frozen = t.target.max_rank - t.decision.rank
        U, _, Vh = torch.linalg.svd(read_weight(fresh, t.target).double(), full_matrices=False)
        change = subspace_change(lora_layer(model, t.target.name)).double()
        touched: Tensor = (U[:, :frozen].T @ change).norm() + (change @ Vh[:frozen].T).norm()
        shares.append(float(touched / change.norm()))
    return max(shares)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_gradient_descent_the_change_stays_out_of_the_frozen_directions(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    """Of a 16-bit base too, where PEFT alone rounds the singular vectors."""
    plan = planned(tmp_path, architecture, dtype, preserve=0.25)
    model = install(MODELS[architecture](dtype=dtype), plan)
    descend(model)
    assert leak(model, plan, architecture, dtype) < 1e-4


def test_adam_leaves_the_subspace_by_a_part(tmp_path: Path) -> None:
    """As the module says: it divides projected gradients entry by entry."""
    plan = planned(tmp_path)
    model = install(MODELS["llama"](), plan)
    train_steps(model, steps=4)
    assert leak(model, plan, "llama") > 1e-2


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_it_trains_as_pefts_osf_does(tmp_path: Path, architecture: str) -> None:
    plan = planned(tmp_path, architecture, preserve=0.5)
    names = [t.target.name for t in plan.targets]
    theirs: Any = get_peft_model(MODELS[architecture](), OSFConfig(target_modules=names))  # its default is one half
    ours = install(MODELS[architecture](), plan)
    for model in (theirs, ours):
        train_steps(model, steps=3, rate=1e-3)
    for name, value in trained_state(ours, plan).items():
        assert torch.equal(value, trained_state(theirs, plan)[name]), name
    assert torch.equal(logits(ours, tokens(9)), logits(theirs, tokens(9)))


@pytest.mark.parametrize(("preserve", "frozen"), [(0.5, 16), (0.25, 8), (0.95, 30), (0.04, 1)])
def test_the_rank_is_what_is_left_to_train(tmp_path: Path, preserve: float, frozen: int) -> None:
    plan = Bench(MODELS["llama"](), tmp_path, roles=["up_proj"]).plan(Osf(preserve=preserve))
    for t in plan.targets:
        assert t.decision.rank == 32 - frozen
        values = t.evidence["singular_values"]
        wanted = float((values[:frozen] ** 2).sum() / (values**2).sum())
        assert float(t.evidence["frozen_energy"]) == pytest.approx(wanted)
        assert not t.anchored
    model: Any = install(MODELS["llama"](), plan)
    assert all(lora_layer(model, t.target.name).effective_rank["default"] == frozen for t in plan.targets)


def test_a_gpt2_base_runs_as_before(tmp_path: Path) -> None:
    """Its Conv1D layers become linear ones that share their numbers."""
    base = MODELS["gpt2"]()
    weight = base.get_submodule("transformer.h.0.attn.c_attn").weight
    model: Any = install(base, planned(tmp_path, "gpt2"))
    found = lora_layer(model, "transformer.h.0.attn.c_attn").get_base_layer()
    assert isinstance(found, torch.nn.Linear)
    assert found.weight.data_ptr() == weight.data_ptr()
    assert off_by(logits(model, tokens()), logits(MODELS["gpt2"](), tokens())) < 1e-5


@pytest.mark.parametrize("preserve", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(preserve: float) -> None:
    with pytest.raises(PlanError, match=r"method\.preserve"):
        Osf(preserve=preserve)


def test_a_share_too_small_for_a_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="k_proj: got preserve 0.05, which freezes none of 16 directions"):
        planned(tmp_path, preserve=0.05)
