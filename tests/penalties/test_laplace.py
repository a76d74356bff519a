"""The Laplace penalty: its scale, its blind spot at B = 0, and what it says of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench

from keeptune.adapter.install import held_parameters, install
from keeptune.core.errors import KeeptuneError
from keeptune.core.plan import Plan
from keeptune.methods.lalora import Lalora
from keeptune.methods.lora import Lora
from keeptune.methods.pissa import Pissa
from keeptune.penalties.base import penalty_named
from keeptune.penalties.laplace import Laplace
from keeptune.training.penalty_engine import Penalties

TANGENT = ("diag", "b-kfac", "b-tri-kfac")
DELTA = ("delta-kfac", "delta-act")


def planned(folder: Path, method: Any = None, **options: Any) -> Plan:
    return Bench(MODELS["llama"](), folder).plan(method or Lora(rank=4), [Laplace(**options)])


def turned(plan: Plan, *, also_B: bool) -> Any:
    """A model whose A is anything at all; B is as it was, or moved a little."""
    model = install(MODELS["llama"](), plan)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in plan.targets:
            found = {name: held.parameter for name, held in held_parameters(model, t).items()}
            found["A"].copy_(torch.randn(found["A"].shape, generator=generator))
            if also_B:
                found["B"].add_(0.1 * torch.randn(found["B"].shape, generator=generator))
    return model


def value(model: Any, plan: Plan) -> float:
    model.zero_grad()
    return float(Penalties(model, plan).step())


@pytest.mark.parametrize("curvature", TANGENT)
def test_at_B_0_the_papers_forms_cannot_see_A(tmp_path: Path, curvature: Any) -> None:
    """B is held as if A were still where it was: another A costs the same, to the last bit."""
    plan = planned(tmp_path, curvature=curvature)
    model = turned(plan, also_B=True)
    before = value(model, plan)
    with torch.no_grad():
        for t in plan.targets:
            held_parameters(model, t)["A"].parameter.mul_(-7.0)
    assert before > 0
    assert value(model, plan) == before
    assert all(not held_parameters(model, t)["A"].parameter.grad.any() for t in plan.targets)  # type: ignore[union-attr]
    assert any("A moves free of cost" in note for note in plan.provenance["notes"])


@pytest.mark.parametrize("curvature", DELTA)
def test_forms_on_the_change_see_A(tmp_path: Path, curvature: Any) -> None:
    plan = planned(tmp_path, curvature=curvature)
    model = turned(plan, also_B=True)
    before = value(model, plan)
    with torch.no_grad():
        for t in plan.targets:
            held_parameters(model, t)["A"].parameter.mul_(-7.0)
    assert value(model, plan) == pytest.approx(49 * before, rel=1e-3)
    assert "notes" not in plan.provenance


def test_at_B_0_coupling_adds_nothing_and_elsewhere_it_does(tmp_path: Path) -> None:
    for method, same in ((Lora(rank=4), True), (Pissa(rank=4), False)):
        values = []
        for curvature in ("b-kfac", "b-tri-kfac"):
            plan = planned(tmp_path, method, curvature=curvature)
            values.append(value(turned(plan, also_B=True), plan))
        assert (values[0] == pytest.approx(values[1], rel=1e-5)) is same


def test_a_start_with_B_is_seen_whole(tmp_path: Path) -> None:
    plan = planned(tmp_path, Pissa(rank=4), curvature="b-kfac")
    assert value(turned(plan, also_B=False), plan) > 0
    assert "notes" not in plan.provenance


def test_the_relative_form_costs_the_strength_where_the_change_is_as_large_as_the_weight(tmp_path: Path) -> None:
    """The whole of W as the change, from PiSSA at full rank: mean_t q(W) / q(W) = 1."""
    bench = Bench(MODELS["llama"](), tmp_path, roles=["k_proj"])
    plan = bench.plan(Pissa(rank=16), [Laplace(strength=3.0, curvature="delta-act")])
    model = install(MODELS["llama"](), plan, anchor="twin")
    with torch.no_grad():
        for t in plan.targets:
            held_parameters(model, t)["B"].parameter.mul_(2.0)  # 2 W - W
    assert value(model, plan) == pytest.approx(3.0, rel=1e-3)


def test_batches_take_the_first_examples_of_the_knowledge(tmp_path: Path) -> None:
    whole, part = (planned(tmp_path, batches=batches, batch_size=2) for batches in (None, 2))
    few = Bench(MODELS["llama"](), tmp_path)
    few.data = few.data.first(4)
    first = few.plan(Lora(rank=4), [Laplace()])
    name = next(key for key in part.penalties[0].tensors if key.startswith("Omega"))
    assert torch.equal(part.penalties[0].tensors[name], first.penalties[0].tensors[name])
    assert not torch.equal(part.penalties[0].tensors[name], whole.penalties[0].tensors[name])


def test_lalora_is_lora_with_the_penalty(tmp_path: Path) -> None:
    plan = Bench(MODELS["llama"](), tmp_path).plan(Lalora(rank=4, curvature="delta-kfac", batches=1))
    for a, b in zip(plan.targets, Bench(MODELS["llama"](), tmp_path).plan(Lora(rank=4)).targets, strict=True):
        assert torch.equal(a.init.A, b.init.A) and not a.init.B.any()
        assert (a.scale, a.trainable) == (b.scale, b.trainable)
    (penalty,) = plan.penalties
    assert penalty.name == "laplace"
    assert {k: penalty.options[k] for k in ("curvature", "batches")} == {
        "curvature": "delta-kfac",
        "batches": 1,
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strength": -1.0}, "strength"),
        ({"batches": 0}, "batches"),
        ({"curvature": "kfac"}, "curvature"),
        ({"labels": "drawn"}, "labels"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(KeeptuneError, match=told):
        penalty_named("laplace", options)
