"""L2: eqs. 5, 7 and 8 of L2-LoRA, and its units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import MODELS, Bench, task, train_steps

from keeptune.adapter.install import install, trained_state
from keeptune.core.errors import KeeptuneError, PlanError, StatisticsError
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.methods.lora import Lora
from keeptune.methods.pissa import Pissa
from keeptune.model.head import body_fingerprint
from keeptune.model.runner import Runner
from keeptune.penalties.base import penalty_named
from keeptune.penalties.l2 import L2, cubic_weights
from keeptune.statistics.collect import collect
from keeptune.statistics.store import StatStore
from keeptune.training.penalty_engine import Penalties


def planned(folder: Path, penalty: Any, method: Any = None, architecture: str = "llama") -> Plan:
    return Bench(MODELS[architecture](), folder).plan(method or Lora(rank=4), [penalty])


def trained(plan: Plan, architecture: str = "llama") -> Any:
    model = install(MODELS[architecture](), plan)
    train_steps(model, steps=2)
    return model


def dense_changes(model: Any, plan: Plan) -> dict[str, torch.Tensor]:
    state = trained_state(model, plan)
    return {
        t.target.name: t.scale
        * (state[f"{t.target.name}.B"].double() @ state[f"{t.target.name}.A"].double() - t.init.dense().double())
        for t in plan.targets
    }


@pytest.mark.parametrize("method", [Lora(rank=4), Pissa(rank=4)], ids=["lora", "pissa"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_relative_unit_is_the_mean_squared_relative_change(tmp_path: Path, method: Any, architecture: str) -> None:
    plan = planned(tmp_path, L2(strength=0.7), method, architecture)
    model, base = trained(plan, architecture), MODELS[architecture]()
    changes = dense_changes(model, plan)
    shares = [
        float(changes[t.target.name].square().sum() / read_weight(base, t.target).double().square().sum())
        for t in plan.targets
    ]
    assert float(Penalties(model, plan).step()) == pytest.approx(0.7 * sum(shares) / len(shares), rel=1e-4)


def test_the_absolute_unit_is_eq_7_as_it_is_written(tmp_path: Path) -> None:
    weights = (0.25, 2.0)
    plan = planned(tmp_path, L2(strength=0.7, layers=weights, unit="absolute"))
    model = trained(plan)
    changes = dense_changes(model, plan)
    wanted = 0.7 * sum(weights[t.target.layer] * float(changes[t.target.name].square().sum()) for t in plan.targets)
    assert float(Penalties(model, plan).step()) == pytest.approx(wanted, rel=1e-5)


def test_on_the_factors_it_is_eq_5(tmp_path: Path) -> None:
    plan = planned(tmp_path, L2(strength=0.7, layers=(1.0, 0.0), on="factors", unit="absolute"))
    model = trained(plan)
    state = trained_state(model, plan)
    first = [t.target.name for t in plan.targets if t.target.layer == 0]
    wanted = 0.7 * sum(float(state[f"{name}.{f}"].double().square().sum()) for name in first for f in "AB")
    assert float(Penalties(model, plan).step()) == pytest.approx(wanted, rel=1e-5)


def test_the_drift_of_a_layer_is_the_mean_relative_change(tmp_path: Path) -> None:
    plan = planned(tmp_path, L2(strength=0.7, layers="cubic"), Pissa(rank=4))
    model, base = trained(plan), MODELS["llama"]()
    penalties = Penalties(model, plan)
    assert penalties.read() == {}
    penalties.step()
    logs, changes = penalties.read(), dense_changes(model, plan)
    for layer in (0, 1):
        found = [
            float(changes[t.target.name].norm() / read_weight(base, t.target).norm())
            for t in plan.targets
            if t.target.layer == layer
        ]
        assert logs[f"drift/layer_{layer}"] == pytest.approx(sum(found) / len(found), rel=1e-3)


@given(blocks=st.integers(1, 60), first=st.floats(0, 0.6), width=st.floats(0.05, 0.4), floor=st.floats(0, 1))
def test_the_schedule_never_rises_and_stays_within_its_bounds(
    blocks: int, first: float, width: float, floor: float
) -> None:
    weights = cubic_weights(blocks, first, first + width, floor)
    assert len(weights) == blocks
    assert all(a >= b for a, b in zip(weights, weights[1:], strict=False))
    assert all(floor - 1e-12 <= weight <= 1 for weight in weights)


def test_the_schedule_is_eq_8() -> None:
    """L = 12: l_i = 4, l_f = 8."""
    found = cubic_weights(12, floor=0.1)
    assert found[:5] == [1.0] * 5
    assert found[6] == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert found[8:] == pytest.approx([0.1] * 4)


def test_measured_weights_are_the_effects_over_the_largest(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path, data=task(3))
    penalty = L2(strength=1.0, layers="naie", unit="absolute", trace_examples=4)
    plan = bench.plan(Lora(rank=4), [penalty])
    (request,) = penalty.requests(plan.targets[0])
    effects = collect(
        Runner(bench.model),
        {t: frozenset({request}) for t in bench.targets()},
        {"knowledge": task(3)},
        StatStore(tmp_path),
        model_fingerprint=body_fingerprint(bench.model),
    ).view(bench.targets()[0])[request]
    assert effects.shape == (4, 2)
    average = effects.double().mean(dim=0)
    wanted = (average / average.max()).clamp_min(0)
    for t in plan.targets:
        found = plan.penalties[0].tensors[f"weight:{t.target.name}"]
        assert float(found) == pytest.approx(float(wanted[t.target.layer]), rel=1e-5)
    assert "weights of the layers from 0 on" in plan.provenance["notes"][0]


def test_measured_weights_need_knowledge_with_answers(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="prompts and completions"):
        planned(tmp_path, L2(layers="naie"))


def test_on_the_factors_the_relative_unit_compares_with_the_start(tmp_path: Path) -> None:
    plan = planned(tmp_path, L2(strength=0.7, on="factors"))
    model = install(MODELS["llama"](), plan)
    assert float(Penalties(model, plan).step()) == pytest.approx(0.7, rel=1e-5)


def test_weights_of_another_depth_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="3 weights, wanted 2, one per block"):
        planned(tmp_path, L2(layers=(1.0, 0.5, 0.2)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strength": -1.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"layers": (-1.0, 1.0)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"first": 0.7, "last": 0.6}, "first < last"),
        ({"floor": 1.5}, "floor"),
        ({"noise_fraction": 0.0}, "noise_fraction"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"layers": "cubical"}, "layers"),
        ({"strenght": 1.0}, 'Did you mean "strength"'),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(KeeptuneError, match=told):
        penalty_named("l2", options)
