"""KL to the base: the value against its definition, the base whatever the anchor, its batches, and in trainers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.models import relative
from tests.training.support import MODEL, TRAINERS, knowledge, largest_gap, plain_trainer, planned, tuned
from torch import Tensor

from keeptune.adapter.install import install, trained_state
from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration
from keeptune.methods.lora import Lora
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import load_model
from keeptune.penalties.kl import Kl, held_out, kl_and_slope, kl_divergence, trained_on
from keeptune.penalties.l2 import L2
from keeptune.training.attach import attach
from keeptune.training.penalty_engine import Penalties


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def plan(store: Path) -> Plan:
    return planned(Pissa(rank=2), [Kl(strength=3.0, batch_size=3)], store=store)


def moved(plan: Plan, anchor: Any = "auto") -> PeftModel:
    model = install(load_model(MODEL), plan, anchor=anchor)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator) + 0.01)
    assert isinstance(model, PeftModel)
    return model


def defined(model: Any, texts: list[tuple[int, ...]], prompts: list[int]) -> Tensor:
    """(1), one text and one token at a time, without padding."""
    base, found = load_model(MODEL), []
    for ids, start in zip(texts, prompts, strict=True):
        with torch.no_grad():
            p = base(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        q = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        for i in range(max(start, 1), len(ids)):
            found.append((p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum())
    return torch.stack(found).mean()


def ids_of(spec: Kl, plan: Plan) -> list[tuple[int, ...]]:
    batch = spec.batch(plan.penalties[-1].tensors)
    pairs = zip(batch.input_ids, batch.attention_mask, strict=True)
    return [tuple(row[mask.bool()].tolist()) for row, mask in pairs]


@pytest.mark.parametrize("anchor", ["twin", "residual"])
def test_value_and_gradient_are_those_of_the_definition(anchor: Any, plan: Plan) -> None:
    model = moved(plan, anchor)
    texts = ids_of(Kl(batch_size=3), plan)
    assert len({len(ids) for ids in texts}) > 1, "padding is tried"
    wanted = 3.0 * defined(model.eval(), texts, [0] * 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(wanted, trained)
    model.train()
    assert float(Penalties(model, plan).step()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(wanted.detach()) > 0.01
    for parameter, gradient in zip(trained, gradients, strict=True):
        assert parameter.grad is not None
        assert relative(parameter.grad, gradient) < 1e-3
    assert model.training
    assert all(module.training for module in model.modules())


def test_prompts_do_not_enter(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = knowledge()
    with_prompts = Calibration.of_answers(data.sequences, data.pad_id, [5] * len(data.sequences))
    monkeypatch.setattr("tests.training.support.knowledge", lambda: with_prompts)
    plan = planned(Lora(rank=2), [Kl(batch_size=3)], store=store)
    model = moved(plan).eval()
    wanted = float(defined(model, ids_of(Kl(batch_size=3), plan), [5] * 3).detach())
    assert float(Penalties(model, plan).step()) == pytest.approx(wanted, rel=1e-4)


def test_dropout_does_not_enter(store: Path) -> None:
    values = []
    for dropout in (0.0, 0.9):
        plan = planned(Lora(rank=2, dropout=dropout), [Kl(batch_size=3)], store=store)
        values.append(float(Penalties(moved(plan).train(), plan).step()))
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("texts", [5, 7, 8, 40, 400])
def test_every_text_that_is_not_held_out_comes_once_in_a_round(texts: int) -> None:
    kept, size = held_out(texts, seed=1), 3
    assert len(kept) == (min(texts // 4, 64) if texts >= 8 else 0)
    rounds = -(-(texts - len(kept)) // size)
    batches = [trained_on(texts, size=size, seed=1, number=number) for number in range(2 * rounds)]
    seen = sum(batches[:rounds], [])
    assert sorted(seen + kept) == list(range(texts)) and seen != sorted(seen)
    assert batches[rounds:] == batches[:rounds]


def test_of_texts_that_come_in_turns_each_kind_is_held_out() -> None:
    for period in (2, 4):
        assert {index % period for index in held_out(256, seed=0)} == set(range(period))
    assert held_out(256, seed=0) != held_out(256, seed=1)


def test_lengths_and_first_tokens_of_a_batch(plan: Plan) -> None:
    batch = Kl(batch_size=3).batch(plan.penalties[0].tensors)
    assert not batch.learned[:, 0].any()
    assert torch.equal(batch.learned[:, 1:], batch.attention_mask[:, 1:].bool())


def test_the_slope_is_autograds() -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(5, 9, generator=draw).log_softmax(-1)
    logits = torch.randn(5, 9, generator=draw, requires_grad=True)
    wanted = kl_divergence(base, logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(wanted.sum(), logits)
    value, slope = kl_and_slope(base, logits.detach())
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(slope, gradient)


def test_every_second_step_counts_twice(store: Path) -> None:
    every, single = (planned(Lora(rank=2), [Kl(batch_size=3, every=k)], store=store) for k in (2, 1))
    model, other = moved(every), moved(single)
    penalties = Penalties(model, every)
    found = [float(penalties.step()) for _ in range(4)]
    once = Penalties(other, single)
    wanted = [float(once.step()) for _ in range(2)]
    assert found == [2 * wanted[0], 0.0, 2 * wanted[1], 0.0] and wanted[0] != wanted[1]
    assert penalties.read()["kl_to_base"] == pytest.approx(sum(wanted) / 2)  # of the steps that have one
    assert once.read()["penalty/kl"] == pytest.approx(sum(found) / 4)


def test_what_is_measured_at_the_end_is_the_definition_on_the_texts_held_out(store: Path) -> None:
    plan = planned(Lora(rank=2), [Kl(batch_size=3), L2(strength=30.0)], store=store)
    model = moved(plan).eval()
    penalties = Penalties(model, plan)
    found = penalties.value()
    sequences = knowledge().sequences
    held = [sequences[index] for index in held_out(len(sequences), seed=0)]
    wanted = float(defined(model, held, [0] * len(held)).detach())
    assert found["held_out/kl"] == pytest.approx(wanted, rel=1e-4)
    assert found["held_out/low"] < wanted < found["held_out/high"] and found["held_out/texts"] == len(held) > 1
    assert penalties.value() == found and penalties.taken == 0
    penalties.step()
    assert found["penalty/l2"] == pytest.approx(penalties.read()["penalty/l2"])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_says_at_its_end_what_was_lost(
    trainer: str, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = TRAINERS[trainer](tuned(plan), tmp_path, max_steps=2)
    attach(made, plan)
    with caplog.at_level("INFO"):
        made.train()
    row = made.state.log_history[-1]
    assert row["held_out/kl"] > 0 and row["step"] == 2
    assert f"penalty kl: {row['held_out/kl']:.2g} nats per token" in caplog.text


def test_the_divergence_of_two_coins() -> None:
    base, now = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(kl_divergence(base, now)) == pytest.approx(wanted, rel=1e-6)
    assert float(kl_divergence(base, base)) == 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_counts_once_per_step_whatever_the_accumulation(trainer: str, plan: Plan, tmp_path: Path) -> None:
    found, logs = [], []
    for size in (8, 2):
        model = tuned(plan)
        extra = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 4}
        made = TRAINERS[trainer](model, tmp_path, **extra)
        attach(made, plan)
        made.train()
        found.append(trained_state(model, plan))
        logs.append([row for row in made.state.log_history if "penalty" in row])
    assert largest_gap(*found) < 1e-5
    bare = tuned(plan)
    TRAINERS[trainer](bare, tmp_path, max_steps=4).train()
    assert largest_gap(found[0], trained_state(bare, plan)) > 1e-4
    for a, b in zip(*logs, strict=True):
        for key in ("penalty/kl", "penalty_grad_norm/kl", "penalty_grad_norm", "loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6)
    assert logs[0][0]["penalty/kl"] == pytest.approx(0, abs=1e-6)
    assert logs[0][3]["penalty/kl"] > 0.01


def test_a_resumed_run_goes_on_with_the_same_batches(plan: Plan, tmp_path: Path) -> None:
    extra = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    found = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = tuned(plan)
        made = plain_trainer(model, tmp_path, **extra)
        attach(made, plan)
        made.train(resume_from_checkpoint=resume)
        found.append((trained_state(model, plan), made.state.log_history[-3]["penalty/kl"]))
    assert largest_gap(found[0][0], found[1][0]) == 0
    assert found[0][1] == found[1][1] > 0


def test_a_scale_of_the_loss_scales_it_too(plan: Plan) -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = moved(plan)
        value = Penalties(model, plan).step(scale)
        found.append((float(value), {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-8)


def test_it_adds_to_others(store: Path) -> None:
    both = planned(Lora(rank=2), [L2(strength=30.0), Kl(batch_size=3)], store=store)
    parts = [dataclasses.replace(both, penalties=(one,)) for one in both.penalties]
    found = []
    for plan in (both, *parts):
        model = moved(plan)
        value = Penalties(model, plan).step()
        found.append((float(value), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0] + found[2][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name] + found[2][1][name], rtol=1e-4, atol=1e-7)


def test_knowledge_is_needed() -> None:
    with pytest.raises(PlanError, match="penalty kl: got no knowledge"):
        planned(Lora(rank=2), [Kl()])


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"batch_size": 0}, {"budget": 0.0}, {"every": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="penalty kl"):
        Kl(**options)
