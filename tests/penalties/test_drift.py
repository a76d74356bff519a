"""The drift budget: dual ascent, and what a checkpoint needs of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench, inputs_of, train_steps

from keeptune.adapter.install import install, trained_state
from keeptune.core.errors import KeeptuneError, PlanError
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.methods.keep import Keep
from keeptune.methods.lora import Lora
from keeptune.penalties.base import conclusions, penalty_named
from keeptune.penalties.drift import DriftBudget, ascended, excess
from keeptune.penalties.laplace import Laplace
from keeptune.training.penalty_engine import Penalties


def planned(folder: Path, data: Any = None, **options: Any) -> Plan:
    bench = Bench(MODELS["llama"](), folder, **({} if data is None else {"data": data}))
    return bench.plan(Lora(rank=4), [DriftBudget(**options)])


def trained(plan: Plan) -> Any:
    model = install(MODELS["llama"](), plan)
    train_steps(model, steps=2)
    return model


def drifts(model: Any, plan: Plan, folder: Path) -> dict[str, float]:
    """d of each target, from the rows themselves: the mean squared change of the output over that of the output."""
    bench, state = Bench(MODELS["llama"](), folder), trained_state(model, plan)
    inputs = inputs_of(bench.model, [t.target.name for t in plan.targets], bench.data)
    found = {}
    for t in plan.targets:
        name = t.target.name
        E = t.scale * state[f"{name}.B"].double() @ state[f"{name}.A"].double()
        h, W = inputs[name].double(), read_weight(bench.model, t.target).double()
        found[name] = float((h @ E.T).square().sum() / (h @ W.T).square().sum())
    return found


def test_the_drift_is_the_relative_mean_squared_change_of_the_outputs(tmp_path: Path) -> None:
    plan = planned(tmp_path, budget=0.01, start=2.0, gain=0.0)
    model = trained(plan)
    wanted = drifts(model, plan, tmp_path)
    mean = sum(wanted.values()) / len(wanted)
    penalties = Penalties(model, plan)
    assert float(penalties.step()) == pytest.approx(2.0 * mean / 0.01, rel=1e-4)
    logs = penalties.read()
    assert logs["feature_drift"] == pytest.approx(mean, rel=1e-4)
    assert logs["multiplier"] == pytest.approx(2.0)
    for name, d in wanted.items():
        assert logs[f"feature_drift/{name}"] == pytest.approx(d, rel=1e-4)


def test_a_budget_in_nats_holds_the_second_order_of_the_divergence(tmp_path: Path) -> None:
    plan = planned(tmp_path, curvature="delta-kfac", rho=0.3)
    model, bench = trained(plan), Bench(MODELS["llama"](), tmp_path)
    fixed = bench.plan(Lora(rank=4), [Laplace(1.0, "delta-kfac", rho=0.3)])
    wanted = float(Penalties(model, fixed).step())
    penalties = Penalties(model, plan)
    penalties.step()
    assert penalties.read()["feature_drift"] == pytest.approx(wanted, rel=1e-4)


def test_the_pressure_is_off_while_there_is_room_and_on_at_once_when_there_is_none(tmp_path: Path) -> None:
    plan = planned(tmp_path, budget=1e-9, gain=3.0, start=2.0)
    model = trained(plan)
    penalties = Penalties(model, plan)
    penalties.step()
    assert penalties.read()["multiplier"] == pytest.approx(2.0 * math.exp(-3.0))  # as nothing has drifted yet
    penalties.step()
    assert penalties.read()["multiplier"] == pytest.approx(2.0 * math.exp(0.1 + 3.0))


def test_the_excess_is_zero_at_the_budget_and_bounded() -> None:
    budget = torch.full((4,), 0.01, dtype=torch.float64)
    found = excess(torch.tensor([0.0, 0.005, 0.01, 0.2], dtype=torch.float64), budget)
    assert found.tolist() == pytest.approx([-1.0, math.log(0.5), 0.0, 1.0])


def test_the_multiplier_falls_within_the_budget_and_rises_above() -> None:
    start, budget = torch.zeros(4), torch.full((4,), 0.01)
    found = ascended(start, torch.tensor([0.0, 0.005, 0.01, 0.2]), budget, 0.1)
    assert found.tolist() == pytest.approx([-0.1, 0.1 * math.log(0.5), 0.0, 0.1], abs=1e-6)


def test_a_budget_that_binds_is_met_and_one_that_does_not_costs_nothing(tmp_path: Path) -> None:
    """Training by gradient descent on a loss that pulls away for ever."""
    ends = {}
    for budget in (0.004, 1e6):
        plan = planned(tmp_path, budget=budget)
        model = install(MODELS["llama"](), plan)
        penalties = Penalties(model, plan)
        ids = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for step in range(200):
            if step == 120:
                optimizer.param_groups[0]["lr"] = 3e-4
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            penalties.step()
            optimizer.step()
            logs = penalties.read()
        ends[budget] = logs["feature_drift"]
        multiplier = logs["multiplier"]
    assert ends[0.004] == pytest.approx(0.004, rel=0.2)
    assert ends[1e6] > 0.01
    assert multiplier < 1e-6


def test_the_plan_is_not_changed_by_training_and_the_state_goes_on(tmp_path: Path) -> None:
    plan = planned(tmp_path, budget=0.001)
    key, model = plan.key, trained(plan)
    first = Penalties(model, plan)
    for _ in range(3):
        first.step()
    assert plan.key == key
    again = Penalties(model, plan)
    again.restore(first.state())
    assert again.state() == first.state() != Penalties(model, plan).state()
    assert float(again.step()) == float(first.step())
    again.restore(first.state())  # after the tensors are bound too
    assert float(again.step()) == float(first.step())


def test_at_the_end_it_says_whether_the_budget_was_met(tmp_path: Path) -> None:
    for drift, verdict in ((0.0118, "met"), (0.0125, "overdrawn"), (0.0079, "not used up")):
        (said,) = conclusions(planned(tmp_path, budget=0.01), {"step": 9, "feature_drift": drift})
        assert said.endswith(f"of 0.01 at the end, {verdict}")
    assert conclusions(Bench(MODELS["llama"](), tmp_path).plan(Lora(rank=4)), {"step": 9}) == []


def test_keep_is_lora_under_a_budget(tmp_path: Path) -> None:
    plan = Bench(MODELS["llama"](), tmp_path).plan(Keep(rank=4, drift=0.003))
    (penalty,) = plan.penalties
    assert (penalty.name, penalty.options["budget"], penalty.options["curvature"]) == ("drift", 0.003, "delta-act")
    plain = Bench(MODELS["llama"](), tmp_path).plan(Lora(rank=4))
    for a, b in zip(plan.targets, plain.targets, strict=True):
        assert torch.equal(a.init.A, b.init.A)
        assert a.scale == b.scale


def test_keep_has_one_budget_in_nats_unless_it_is_one_on_drift() -> None:
    (found,) = Keep().penalties()
    assert (found.budget, found.curvature, found.rho) == (0.003, "delta-kfac", 0.5)
    (found,) = Keep(nats=0.01, rho=0.1).penalties()
    assert (found.budget, found.curvature, found.rho) == (0.01, "delta-kfac", 0.1)
    with pytest.raises(PlanError, match="one budget"):
        Keep(nats=0.01, drift=0.01)
    for wrong in ({"nats": 0.0}, {"drift": -1.0}):
        with pytest.raises(PlanError, match="budget"):
            Keep(**wrong)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": 0.0}, "budget"),
        ({"rate": -0.1}, "rate"),
        ({"start": float("inf")}, "start"),
        ({"batches": 0}, "batches"),
        ({"gain": -1.0}, "gain"),
        ({"rho": 1.5}, "rho"),
        ({"strength": 2.0}, "strength"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(KeeptuneError, match=told):
        penalty_named("drift", options)
