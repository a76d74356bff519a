"""Losses of the task's tokens: their equations, and TRL's trainer with them against those, one token at a time."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from tests.models import relative
from tests.reference.task_loss_reference import token_loss
from tests.training.support import EXAMPLES, MODEL, TOKENIZER, plain_trainer, planned, trl_trainer, tuned
from tests.training.test_outputs import moved
from torch import Tensor

from keeptune.adapter.install import install, trained_state
from keeptune.core.errors import KeeptuneError, PlanError, RecipeError, TrainError
from keeptune.core.plan import Plan
from keeptune.methods.full import Full
from keeptune.methods.keep import Keep
from keeptune.methods.lora import Lora
from keeptune.methods.lora_null import LoraNull
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import load_model
from keeptune.penalties.kl import Kl
from keeptune.penalties.l2 import L2
from keeptune.training import task_loss
from keeptune.training.attach import attach
from keeptune.training.losses.asft import Asft
from keeptune.training.losses.base import loss_named, losses
from keeptune.training.losses.dft import Dft
from keeptune.training.losses.eaft import Eaft, entropy_weight

NAMES = ["dft", "eaft", "asft"]
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(Pissa(rank=2))


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(name: str, options: dict[str, Any], rows: Tensor, base: Tensor, tokens: Tensor) -> Tensor:
    loss = loss_named(name, options)
    assert loss is not None
    answers = rows.log_softmax(-1)
    return loss.losses(answers.gather(-1, tokens[:, None])[:, 0], answers, base.log_softmax(-1))


# The equations


def test_every_loss_is_checked() -> None:
    assert list(losses()) == sorted([*NAMES, "sdft"])  # that has a trainer of its own: test_sdft.py
    assert loss_named("nll", {}) is None


@pytest.mark.parametrize("name", NAMES)
def test_equations(name: str) -> None:
    rows, base, tokens = logits(6, 40), logits(6, 40, seed=1), torch.arange(6)
    rows.requires_grad_()
    found = of(name, {}, rows, base, tokens)
    wanted = torch.stack([token_loss(name, *pair, int(token)) for *pair, token in zip(rows, base, tokens, strict=True)])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), rows)[0] for value in (found, wanted)))


def test_the_gradient_of_dft_is_that_of_the_probability() -> None:
    rows, tokens = logits(6, 40).requires_grad_(), torch.arange(6)
    (found,) = torch.autograd.grad(of("dft", {}, rows, rows.detach(), tokens).sum(), rows)
    (wanted,) = torch.autograd.grad(-rows.softmax(-1).gather(-1, tokens[:, None]).sum(), rows)
    torch.testing.assert_close(found, wanted)


def test_the_entropy_weight_lies_between_a_certain_answer_and_twenty_equal_ones() -> None:
    rows = logits(100, 50)
    assert bool(((entropy_weight(rows) > 0) & (entropy_weight(rows) < 1)).all())
    certain, equal = torch.full((1, 50), -1e4), torch.zeros(1, 50)
    certain[0, 3] = 0
    assert entropy_weight(certain).item() == 0
    assert entropy_weight(equal).item() == pytest.approx(1)
    assert entropy_weight(torch.zeros(1, 5)).item() == pytest.approx(1), "a vocabulary below 20"
    torch.testing.assert_close(entropy_weight(rows + 7), entropy_weight(rows))


@pytest.mark.parametrize(
    ("name", "options", "limit"), [("eaft", {"alpha": 0}, "nll"), ("asft", {"kl_weight": 0}, "dft")]
)
def test_limits(name: str, options: dict[str, Any], limit: str) -> None:
    rows, base, tokens = logits(6, 40), logits(6, 40, seed=1), torch.arange(6)
    nll = -rows.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert torch.equal(
        of(name, options, rows, base, tokens), nll if limit == "nll" else of("dft", {}, rows, base, tokens)
    )
    assert not torch.equal(of(name, {}, rows, base, tokens), of(name, options, rows, base, tokens))


def test_the_kl_is_zero_with_its_gradient_at_the_start() -> None:
    rows, tokens = logits(6, 40).requires_grad_(), torch.arange(6)
    values = [of(name, {}, rows, rows.detach(), tokens).sum() for name in ("asft", "dft")]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, rows)[0] for value in values), atol=1e-12, rtol=1e-9)


# In TRL's trainer


def step(plan: Plan, loss: Any, folder: Path, model: Any = None, **extra: Any) -> tuple[Any, Any]:
    model = tuned(plan) if model is None else model
    made = trl_trainer(model, folder, **(ONE_STEP | extra))
    attach(made, plan, loss)
    made.train()
    return model, made


def defined(name: str, model: PeftModel) -> tuple[Tensor, Tensor]:
    """The loss of the task and -log p_t, a text and a token at a time, without padding, from the models' own logits."""
    base, found, plain = load_model(MODEL), [], []
    for prompt, completion in zip(EXAMPLES.prompts, EXAMPLES.completions, strict=True):
        start = len(TOKENIZER(prompt)["input_ids"])
        ids = [*TOKENIZER(prompt + completion)["input_ids"], TOKENIZER.eos_token_id]
        rows, of_base = (m(input_ids=torch.tensor([ids])).logits[0] for m in (model, base))
        for place in range(start, len(ids)):
            at = (rows[place - 1], of_base[place - 1].detach(), ids[place])
            found.append(token_loss(name, *at))
            plain.append(token_loss("nll", *at).detach())
    return torch.stack(found).mean(), torch.stack(plain).mean()


@pytest.mark.parametrize("chunk", [2**25, 2000])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_the_equations(
    name: str, chunk: int, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is not the model without its adapter (PiSSA), nor the model as it is now; some tokens at a time."""
    monkeypatch.setattr(task_loss, "AT_ONCE", chunk)
    model = moved(plan, "residual")
    wanted, nll = defined(name, model.eval())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients, before = torch.autograd.grad(wanted, trained), [p.detach().clone() for p in trained]
    _, made = step(plan, name, tmp_path, model.train())
    row = made.state.log_history[0]
    assert row["loss"] == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert row["nll"] == pytest.approx(float(nll), rel=1e-4)
    for old, new, gradient in zip(before, trained, gradients, strict=True):
        assert relative((old - new.detach()) / 0.01, gradient) < 1e-2


def test_dft_is_trls(plan: Plan, tmp_path: Path) -> None:
    ours, theirs = step(plan, "dft", tmp_path, max_steps=3), step(plan, "nll", tmp_path, max_steps=3, loss_type="dft")
    for key in ("loss", "grad_norm", "entropy"):
        assert [r.get(key) for r in ours[1].state.log_history] == [r.get(key) for r in theirs[1].state.log_history]
    states = [trained_state(model, plan) for model, _ in (ours, theirs)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_nll_is_trls_own(plan: Plan, tmp_path: Path) -> None:
    made = trl_trainer(tuned(plan), tmp_path)
    before = made.compute_loss
    attach(made, plan, "nll")
    assert made.compute_loss == before


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_take_the_step_of_one_batch(name: str, plan: Plan, tmp_path: Path) -> None:
    """Texts of other lengths are in each, so that means of means would be wrong."""
    found = []
    for size, pieces in ((8, 1), (2, 4)):
        extra = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces}
        model, made = step(plan, name, tmp_path, moved(plan), **extra)
        found.append(trained_state(model, plan) | {"loss": torch.tensor(made.state.log_history[0]["loss"])})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_other_parts_of_training_go_on_beside(name: str, tmp_path: Path) -> None:
    """Penalties on weights and on answers, checkpointing of activations, an evaluation, bfloat16."""
    plan = planned(Lora(rank=2), [L2(), Kl(batch_size=3)], store=tmp_path / "store")
    extra = {"activation_checkpointing": True, "bf16": True, "max_steps": 3}
    _, made = step(plan, name, tmp_path, **extra)
    rows = [row for row in made.state.log_history if "loss" in row]
    assert all({"penalty/l2", "penalty/kl", "nll"} <= row.keys() for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)
    found = made.evaluate(made.train_dataset)
    assert found["eval_loss"] == pytest.approx(rows[-1]["loss"], rel=0.2)
    assert found["eval_loss"] != pytest.approx(rows[-1]["nll"], rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [Lora(rank=2), LoraNull(rank=2), Keep(rank=2), Full()], ids=lambda m: m.name)
def test_every_kind_of_method(method: Any, name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    plan = planned(method, store=tmp_path / "store", layers=None if method.name == "full" else (0, 1))
    model = install(load_model(MODEL), plan)
    if (method.name, name) == ("full", "asft"):
        with pytest.raises(
            TrainError, match="task.loss asft: got the method full, which overwrites the base.*Take dft or eaft"
        ):
            step(plan, name, tmp_path, model)
        return
    _, made = step(plan, name, tmp_path, model, max_steps=3, learning_rate=1e-3)
    nll = [row["nll"] for row in made.state.log_history if "loss" in row]
    assert nll[-1] < nll[0]


@pytest.mark.filterwarnings("ignore:.*packing")
@pytest.mark.parametrize("name", NAMES)
def test_packed_texts_have_the_loss_of_texts_alone(name: str, plan: Plan, tmp_path: Path) -> None:
    found = []
    for extra in ({}, {"packing": True, "max_length": 256}):
        _, made = step(plan, name, tmp_path, moved(plan), **extra)
        found.append(made.state.log_history[0]["loss"])
    assert len(made.train_dataset) == 1
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# Wrong input


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"label_smoothing_factor": 0.1}, r"got train\.label_smoothing_factor beside it"),
        ({"loss_type": "dft"}, r"got train\.loss_type beside it"),
    ],
)
def test_two_losses_are_refused(arguments: dict[str, Any], told: str, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=told):
        attach(trl_trainer(tuned(plan), tmp_path, **arguments), plan, "eaft")


def test_trainers_without_tokens_are_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"task.loss dft: got a Trainer.*Use TRL's SFTTrainer"):
        attach(plain_trainer(tuned(plan), tmp_path), plan, Dft())


@pytest.mark.parametrize(("name", "refused"), [("dft", False), ("eaft", True), ("asft", True)])
def test_sharded_weights_are_refused_where_they_are_read(name: str, refused: bool, plan: Plan, tmp_path: Path) -> None:
    made = trl_trainer(tuned(plan), tmp_path)
    made.accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, autocast=None)
    if refused:
        with pytest.raises(TrainError, match="got weights in parts"):
            attach(made, plan, name)
    else:
        attach(made, plan, name)


@pytest.mark.parametrize(
    ("name", "options", "error", "told"),
    [
        ("eafd", {}, RecipeError, 'task.loss: got "eafd".*eaft'),
        ("eaft", {"alfa": 1}, RecipeError, "task.loss.alfa.*alpha"),
        ("nll", {"alpha": 1}, RecipeError, 'got "nll"'),
        ("eaft", {"alpha": -1.0}, PlanError, "alpha: got -1.0"),
        ("asft", {"kl_weight": "much"}, RecipeError, "task.loss.kl_weight: got 'much'"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], error: type[KeeptuneError], told: str) -> None:
    with pytest.raises(error, match=told):
        loss_named(name, options)


def test_logits_that_are_more_than_a_projection_are_refused(plan: Plan, tmp_path: Path) -> None:
    """A control: the check of the distributions does see a scale that it is not told of."""
    model = tuned(plan)
    made = trl_trainer(model, tmp_path, **ONE_STEP)
    model.config.logits_scaling = 3.0  # TRL read the config before
    attach(made, plan, Eaft())
    with pytest.raises(TrainError, match="got logits of LlamaForCausalLM that are not known here: .* nats away"):
        made.train()


@pytest.mark.parametrize("fields", [{"final_logit_softcapping": 5.0}, {"logit_scale": 0.5}, {"logits_scaling": 2.0}])
def test_scaled_and_capped_logits(fields: dict[str, float], plan: Plan, tmp_path: Path) -> None:
    model = moved(plan)
    for name, value in fields.items():
        setattr(model.config, name, value)
    _, made = step(plan, Asft(), tmp_path, model)
    assert math.isfinite(made.state.log_history[0]["loss"])
