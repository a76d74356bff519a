"""Laws of every registered penalty, with every method that trains an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.contract.conftest import ADAPTERS, CASES, RESCALING, WHOLE, World
from tests.models import train_steps
from tests.plan_differences import differences
from torch import Tensor, nn

from keeptune.adapter.install import held_parameters, install
from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan
from keeptune.penalties.base import penalties, penalty_named
from keeptune.pipeline.planning import penalties_of, refuse_scope
from keeptune.training.penalty_engine import Penalties

# The options a penalty is checked with.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ewc": [{"batches": 1, "batch_size": 6}],
    "kl": [{"batch_size": 4}, {"batch_size": 4, "budget": 0.001}],
    "l2": [{}, {"layers": (2.0, 0.5), "unit": "absolute"}, {"on": "factors"}],
    "laplace": [
        {"curvature": "delta-act", "batches": 1, "batch_size": 6},
        {"curvature": "delta-kfac", "strength": 30.0},
        {"curvature": "delta-kfac", "labels": "true"},
        {"curvature": "diag"},
        {"curvature": "b-kfac"},
        {"curvature": "b-tri-kfac"},
    ],
}
PENALTIES = {
    " ".join([name, *(f"{key}={value}" for key, value in options.items())]): penalty_named(name, options)
    for name, cases in OPTIONS.items()
    for options in cases
}
# What they hold is not a change, so that there is something to hold at the start.
ON_FACTORS = {name for name in PENALTIES if "on=factors" in name}
BY_AUTOGRAD = {name for name in PENALTIES if name.startswith("kl ")}
BY_LABELS = {name for name in PENALTIES if any(part in name for part in ("kfac", "diag", "ewc", "kl "))}
PlanOf = Callable[[str, str, str], Plan]
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)
# A penalty sees what a method trains, not from which statistics: one case of each kind of factors.
DISTINCT = {(m.name, m.rank, getattr(m, "variant", None)): case for case, m in reversed(ADAPTERS.items())}
PAIRS = [(case, penalty) for case in DISTINCT.values() for penalty in PENALTIES]
every_pair = pytest.mark.parametrize(("case", "penalty"), PAIRS)
# DoRA's gradient is no slope: it takes the lengths of rows for constants (DoRA, section 4.3).
every_sloping_pair = pytest.mark.parametrize(
    ("case", "penalty"), [pair for pair in PAIRS if not (pair[0] in RESCALING and pair[1] in BY_AUTOGRAD)]
)
# Every architecture, with a start at zero, one that is a part of W, and a frozen factor.
every_place = pytest.mark.parametrize(
    ("architecture", "case", "penalty"),
    [
        (architecture, case, penalty)
        for architecture in ("qwen2", "gpt2", "roberta")
        for case in ("lora rank=4", "pissa rank=4 alpha=6.0", "lora-null rank=4 variant=v2")
        for penalty in PENALTIES
        if architecture != "roberta" or penalty not in BY_LABELS
    ],
)


@pytest.fixture(scope="module")
def penalised(worlds: Callable[[str], World]) -> PlanOf:
    @cache
    def make(architecture: str, case: str, penalty: str) -> Plan:
        return worlds(architecture).bench().plan(CASES[case], [PENALTIES[penalty]])

    return make


def installed(world: World, plan: Plan) -> PeftModel:
    model = install(world.base(), plan)
    assert isinstance(model, PeftModel)
    return model


def gradients(model: PeftModel, plan: Plan) -> tuple[float, list[Tensor]]:
    """The value of all penalties, and the gradient of each held parameter; zeros where there is none."""
    model.zero_grad()
    value = Penalties(model, plan).step()
    return float(value), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in held(model, plan)]


def held(model: PeftModel, plan: Plan) -> list[nn.Parameter]:
    return [held.parameter for t in plan.targets for held in held_parameters(model, t).values()]


def test_every_registered_penalty_is_checked() -> None:
    assert OPTIONS.keys() == penalties().keys()


@every_pair
def test_sizes_said_beforehand_are_those_of_the_tensors(case: str, penalty: str, penalised: PlanOf) -> None:
    plan = penalised("llama", case, penalty)
    own = {one.name for one in CASES[case].penalties()}
    for made in plan.penalties:
        one = penalty_named(made.name, made.options)
        said: dict[str, int] = {}
        for t in plan.targets:
            said |= one.size(t)
        # Of a target or an input group; the texts of a penalty on answers are no part of it, nor are single numbers.
        own_tensors = {name: value for name, value in made.tensors.items() if ":" in name}
        held = {name: value for name, value in own_tensors.items() if name.startswith(tuple(said))}
        assert sum(value.nbytes for value in held.values()) == sum(said.values())
        assert all(value.ndim < 2 for name, value in own_tensors.items() if name not in held)
        assert made.name == PENALTIES[penalty].name or made.name in own


def check_slope(world: World, plan: Plan) -> None:
    """The gradient is the slope of the value along it, and frozen factors have none."""
    model = installed(world, plan)
    train_steps(model, steps=3, rate=1e-2)
    value, found = gradients(model, plan)
    assert value > 0
    parameters = held(model, plan)
    assert all(not g.any() for g, p in zip(found, parameters, strict=True) if not p.requires_grad)
    squares = sum(float(g.double().square().sum()) for g in found)
    assert squares > 0
    step = 1e-2 * value / squares  # lowers or raises the value by about a hundredth
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(parameters, found, strict=True):
                p.add_(g, alpha=sign * step)
            values.append(gradients(model, plan)[0])
            for p, g in zip(parameters, found, strict=True):
                p.add_(g, alpha=-sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(squares, rel=2e-2)


@every_sloping_pair
def test_the_gradient_is_the_slope_of_the_value(
    case: str, penalty: str, worlds: Callable[[str], World], penalised: PlanOf
) -> None:
    check_slope(worlds("llama"), penalised("llama", case, penalty))


@every_place
def test_the_gradient_is_the_slope_of_the_value_on_every_architecture(
    architecture: str, case: str, penalty: str, worlds: Callable[[str], World], penalised: PlanOf
) -> None:
    check_slope(worlds(architecture), penalised(architecture, case, penalty))


@every_pair
def test_nothing_is_held_before_anything_has_changed(
    case: str, penalty: str, worlds: Callable[[str], World], penalised: PlanOf
) -> None:
    plan = penalised("llama", case, penalty)
    value, found = gradients(installed(worlds("llama"), plan), plan)
    if penalty in ON_FACTORS:
        assert value > 0 or not {"A", "B"} <= plan.targets[0].trainable  # what is trained may start at zero
    else:
        assert value == 0
        bound = 1e-6 if penalty in BY_AUTOGRAD else 0.0  # softmax less softmax
        assert all(float(g.abs().max()) <= bound for g in found)


@every_penalty
@pytest.mark.parametrize("case", ["lora rank=4", "pissa rank=4 alpha=6.0"])
def test_a_saved_plan_holds_the_same(
    case: str, penalty: str, worlds: Callable[[str], World], penalised: PlanOf, tmp_path: Path
) -> None:
    plan = penalised("llama", case, penalty)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.key == plan.key
    assert differences(loaded, plan) == []
    found = []
    for made in (plan, loaded):
        model = installed(worlds("llama"), made)
        train_steps(model, steps=2)
        found.append(gradients(model, made))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("penalty", [name for name in PENALTIES if "budget" not in name])
def test_strength_zero_is_the_plan_without_it_and_another_strength_another_plan(
    penalty: str, worlds: Callable[[str], World], penalised: PlanOf
) -> None:
    bench = worlds("llama").bench()
    plain = bench.plan(CASES["lora rank=4"])
    none = dataclasses.replace(PENALTIES[penalty], strength=0.0)
    assert bench.plan(CASES["lora rank=4"], [none]).key == plain.key
    made = penalised("llama", "lora rank=4", penalty)
    assert made.key != plain.key
    double = dataclasses.replace(PENALTIES[penalty], strength=2 * PENALTIES[penalty].strength)
    again = bench.plan(CASES["lora rank=4"], [double])
    assert again.key != made.key
    assert any(line.startswith("penalties: ") for line in differences(again, made))
    values = []
    for plan in (made, again):
        model = installed(worlds("llama"), plan)
        train_steps(model, steps=2)
        values.append(gradients(model, plan)[0])
    assert values[1] == pytest.approx(2 * values[0], rel=1e-5)


@every_penalty
def test_two_penalties_add_up(penalty: str, worlds: Callable[[str], World], penalised: PlanOf) -> None:
    bench = worlds("llama").bench()
    other = penalty_named("l2", {"strength": 3.0})
    plans = [bench.plan(CASES["lora rank=4"], asked) for asked in ([PENALTIES[penalty]], [other])]
    both = bench.plan(CASES["lora rank=4"], [PENALTIES[penalty], other])
    model = installed(worlds("llama"), both)
    train_steps(model, steps=2)
    value, found = gradients(model, both)
    (value_a, a), (value_b, b) = (gradients(model, plan) for plan in plans)
    assert value == pytest.approx(value_a + value_b, rel=1e-6)
    for whole, x, y in zip(found, a, b, strict=True):
        torch.testing.assert_close(whole, x + y)


@pytest.mark.parametrize("case", WHOLE)
def test_methods_that_change_whole_weights_take_no_penalty(case: str, worlds: Callable[[str], World]) -> None:
    with pytest.raises(PlanError, match="changes whole weights"):
        refuse_scope(CASES[case], penalties_of(CASES[case], [penalty_named("l2", {})]), None)


def test_of_dora_the_plan_says_what_is_not_held(worlds: Callable[[str], World], penalised: PlanOf) -> None:
    case = next(case for case, method in CASES.items() if method.name == "dora")
    assert any("magnitudes are free" in note for note in penalised("llama", case, "l2").provenance["notes"])
