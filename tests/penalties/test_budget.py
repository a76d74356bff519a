"""The budget: its controller, its verdict, what a checkpoint needs of it, and that it is met."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench, calibration, train_steps

from keeptune.adapter.install import install
from keeptune.core.plan import Plan
from keeptune.methods.keep import Keep
from keeptune.methods.lora import Lora
from keeptune.penalties.base import conclusions, penalty_named
from keeptune.penalties.budget import GAIN, LEAST, MOST, RATE, allowed, ascended, excess, verdict
from keeptune.penalties.kl import Kl
from keeptune.training.penalty_engine import Penalties, tokens_of


def planned(folder: Path, **options: Any) -> Plan:
    data = calibration(lengths=(12, 17, 9, 24) * 24)
    return Bench(MODELS["llama"](), folder, data).plan(Keep(rank=4, **options))


def moved(plan: Plan, steps: int = 2) -> Any:
    model = install(MODELS["llama"](), plan)
    train_steps(model, steps=steps)
    return model


def later(model: Any, plan: Plan, steps: int) -> Penalties:
    """Returns the penalties at a step that stands for so many."""
    penalties = Penalties(model, plan)
    for name, value in (("steps until it", 0), ("steps it stands for", steps)):
        penalties._state[0][name].fill_(value)
    return penalties


def test_the_excess_is_zero_at_the_budget_and_bounded() -> None:
    found = excess(torch.tensor([0.0, 0.005, 0.01, 0.2], dtype=torch.float64), 0.01)
    assert found.tolist() == pytest.approx([-1.0, -0.5, 0.0, 1.0])


def test_the_multiplier_falls_within_the_budget_rises_above_and_stays_in_bounds() -> None:
    c = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    assert ascended(-torch.ones(3), c, 4).tolist() == pytest.approx([-1.4, -1.0, -0.8])
    value = -torch.ones(1)
    for _ in range(1000):  # no wind-up
        value = ascended(value, torch.ones(1))
    assert float(value) == pytest.approx(math.log(MOST))  # however long a budget cannot be met
    assert float(ascended(torch.tensor([-50.0]), -torch.ones(1))) == pytest.approx(math.log(LEAST))


@pytest.mark.parametrize(
    ("gradient", "task", "taken"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (2.0, 0.0, 0.0)]
)
def test_what_is_taken_of_a_gradient_is_at_most_as_long_as_the_tasks(
    gradient: float, task: float, taken: float
) -> None:
    assert float(allowed(torch.tensor(gradient), torch.tensor(task))) == taken


@pytest.mark.parametrize(("share", "said"), [(0.79, "not used up"), (0.81, "met"), (1.19, "met"), (1.21, "overdrawn")])
def test_a_budget_is_met_within_a_fifth(share: float, said: str, tmp_path: Path) -> None:
    assert verdict(share * 0.01, 0.01) == said
    row = {"held_out/kl": share * 0.01, "held_out/low": 0.0, "held_out/high": 1.0, "held_out/texts": 4}
    (sentence,) = conclusions(planned(tmp_path, nats=0.01), row)
    advice = ": try a lower learning rate, more texts, or a larger batch_size" if said == "overdrawn" else ""
    assert sentence.endswith(f"of 0.01: {said}{advice}")
    assert conclusions(Bench(MODELS["llama"](), tmp_path).plan(Lora(rank=4)), row) == []


@pytest.mark.parametrize(
    ("mean", "tokens", "size", "every"),
    [(120, 160, 1, 5), (120, 320, 1, 3), (120, 800, 1, 1), (120, 3200, 4, 1), (120, 10**6, 4, 1), (12, 544, 11, 2)]
    + [(120, 1, 1, 8), (1000, 10**6, 1, 1), (120, 0, 1, 1)],
)
def test_what_is_chosen_adds_a_quarter_to_a_step(mean: int, tokens: int, size: int, every: int) -> None:
    assert Keep().penalties()[0].chosen(mean, tokens) == (size, every)
    if 160 <= tokens <= 3200:  # neither the rarest nor the largest
        assert 1.5 * size * mean / every <= 0.26 * tokens
    assert Kl(batch_size=3, every=None).chosen(mean, tokens)[0] == 3
    assert Kl(batch_size=None, every=2).chosen(mean, tokens)[1] == 2


def test_tokens_of_a_batch_are_counted_without_padding() -> None:
    ids, mask = torch.ones(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert tokens_of({"input_ids": ids, "attention_mask": mask, "labels": ids}) == 8
    assert tokens_of({"chosen_input_ids": ids, "rejected_input_ids": ids}) == 20
    assert tokens_of({"text": ["a"]}) == tokens_of([{"prompt": "a"}]) == 0


def test_the_pressure_is_on_at_once_when_there_is_no_room(tmp_path: Path) -> None:
    plan = planned(tmp_path, nats=1e-9, every=1, batch_size=8)
    penalties, found = Penalties(moved(plan), plan), []
    for _ in range(2):
        penalties.step()
        found.append(penalties.read()["multiplier"])
    assert found == pytest.approx([1.0, math.exp(GAIN + RATE)])


@pytest.mark.parametrize("scale", [1.0, 16.0])
@pytest.mark.parametrize("length", [None, 1e-3, 10.0, 1e4])
def test_the_gradient_of_a_budget_is_limited_by_the_tasks(length: float | None, scale: float, tmp_path: Path) -> None:
    """(1) of the controller: the direction stays; where the task's gradient is not there yet, so does the length."""
    plan, k = planned(tmp_path, nats=1e-4, every=2, batch_size=8), 2
    model = moved(plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = later(model, plan, k)._gradients(1.0, 0, limited=False)[1]
    whole = torch.cat([gradients[p].flatten() for p in trained])  # k p ∇D / budget
    size = (scale * length if length else 0.0) / len(whole) ** 0.5
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, size) if length else None
    later(model, plan, k).step(scale)
    added = torch.cat([(p.grad - size).flatten() for p in trained if p.grad is not None]) / scale
    free, p = float(whole.norm()), 1.0
    assert k * p * 10 < free < k * p * 1e4
    assert float(added.norm()) == pytest.approx(min(free, k * p * length) if length else free, rel=1e-3)
    assert float(added @ whole) == pytest.approx(float(added.norm()) * free, rel=1e-3)


def test_a_fixed_strength_is_not_limited(tmp_path: Path) -> None:
    data = calibration(lengths=(12, 17) * 8)
    plan = Bench(MODELS["llama"](), tmp_path, data).plan(Lora(rank=4), [Kl(strength=50.0)])
    model, found = moved(plan), []
    for size in (1e-9, 0.0):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.full_like(parameter, size)
        Penalties(model, plan).step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found)
    assert float(found[0].norm()) > 0.1


def test_a_budget_that_binds_is_met_on_other_texts_and_one_that_does_not_costs_nothing(tmp_path: Path) -> None:
    """Training on a loss that pulls away for ever; one step in three is measured."""
    ends = {}
    for nats in (0.02, 1e6):
        plan = planned(tmp_path, nats=nats, every=3, batch_size=4)
        model = install(MODELS["llama"](), plan)
        penalties = Penalties(model, plan)
        ids = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for step in range(240):
            if step == 160:
                optimizer.param_groups[0]["lr"] = 3e-4
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            penalties.step()
            optimizer.step()
        ends[nats] = penalties.value()["held_out/kl"]
        multiplier = [float(state["log pressure"]) for state in penalties._state]
    assert ends[0.02] == pytest.approx(0.02, rel=0.2)
    assert ends[1e6] > 0.1
    assert multiplier < [math.log(0.05)]


@pytest.mark.parametrize(
    ("every", "nats", "taken"),
    [(3, 1e-9, [1, 3, 4, 5, 6, 7, 8, 9]), (3, 1e6, [1, 3, 6, 9]), (2, 1e6, [1, 3, 5, 7, 9]), (1, 1e6, [*range(10)])],
)
def test_batches_come_ever_more_rarely_up_to_each_kth_step_and_at_every_one_while_the_budget_is_overdrawn(
    every: int, nats: float, taken: list[int], tmp_path: Path
) -> None:
    plan = planned(tmp_path, nats=nats, every=every, batch_size=4)
    model = install(MODELS["llama"](), plan)
    penalties, found = Penalties(model, plan), []
    for step in range(10):
        penalties.step()
        if "kl_to_base" in penalties.read():
            found.append(step)
        if step == 1:
            train_steps(model, steps=2)
    assert found == taken


def test_the_plan_is_not_changed_by_training_and_the_state_goes_on(tmp_path: Path) -> None:
    plan = planned(tmp_path, nats=0.001, every=2)
    key, model = plan.key, moved(plan)
    first = Penalties(model, plan)
    for _ in range(3):
        first.step()
    assert plan.key == key
    again = Penalties(model, plan)
    again.restore(first.state())
    assert again.state() == first.state() != Penalties(model, plan).state()
    assert [float(again.step()) for _ in range(2)] == [float(first.step()) for _ in range(2)]
    again.restore(first.state())  # after the tensors are bound too
    assert again.state() == first.state()


def test_keep_is_lora_under_a_budget(tmp_path: Path) -> None:
    plan = planned(tmp_path, nats=0.003)
    (made,) = plan.penalties
    assert (made.name, penalty_named(made.name, made.options).budget) == ("kl", 0.003)
    plain = Bench(MODELS["llama"](), tmp_path).plan(Lora(rank=4))
    for a, b in zip(plan.targets, plain.targets, strict=True):
        assert torch.equal(a.init.A, b.init.A)
        assert a.scale == b.scale
