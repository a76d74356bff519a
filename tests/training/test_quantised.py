"""Training on a quantised base: precise factors, activation checkpointing, 8-bit and paged optimisers, penalties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from tests.models import NF4, relative
from tests.training.support import MODEL, TRAINERS, knowledge, plain_trainer, task, trl_trainer
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.adapter.install import install, trained_state
from keeptune.core.plan import Plan
from keeptune.data.calibration import tokenize_calibration
from keeptune.methods.base import Method
from keeptune.methods.keep import Keep
from keeptune.methods.lalora import Lalora
from keeptune.methods.lora import Lora
from keeptune.methods.lora_null import LoraNull
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer
from keeptune.penalties.kl import Kl
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.store import StatStore
from keeptune.training.attach import attach
from keeptune.training.penalty_engine import Penalties


def base() -> PreTrainedModel:
    return load_model(MODEL, LoadOptions(quantization=NF4 | {"llm_int8_skip_modules": ["lm_head", "down_proj"]}))


def planned(method: Method, folder: Path, model: PreTrainedModel, penalties: Any = (), data: Any = None) -> Plan:
    data = data or {"knowledge": knowledge(), "task": task()}
    return plan_for(
        model, method, StatStore(folder), data=data, penalties=penalties, options=PlanOptions(layers=[0, 1])
    )


def tuned(plan: Plan, model: PreTrainedModel) -> PeftModel:
    made = install(model, plan)
    assert isinstance(made, PeftModel)
    return made


def test_factors_stay_in_float32_from_the_planned_start_where_trl_rounds_them(tmp_path: Path) -> None:
    plan = planned(LoraNull(rank=4), tmp_path / "store", base())
    model = tuned(plan, base())
    start = trained_state(model, plan)
    trainer = trl_trainer(model, tmp_path)
    # Negative control: what TRL leaves is another start.
    assert max(relative(value, start[name]) for name, value in trained_state(model, plan).items()) > 1e-4
    attach(trainer, plan)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.equal(value, start[name]) for name, value in trained_state(model, plan).items())
    trainer.train()
    assert all(not torch.equal(value, start[name]) for name, value in trained_state(model, plan).items() if "B" in name)


def test_factors_that_moved_before_are_kept(tmp_path: Path) -> None:
    plan = planned(Lora(rank=2), tmp_path / "store", base())
    model = tuned(plan, base())
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.25)
    moved = trained_state(model, plan)
    attach(trl_trainer(model, tmp_path), plan)
    assert all(relative(value, moved[name]) < 2**-8 for name, value in trained_state(model, plan).items())


@pytest.mark.parametrize("kind", ["trl", "transformers"])
def test_a_checkpointed_step_is_the_step_without(kind: str, tmp_path: Path) -> None:
    plan = planned(Lalora(rank=4, curvature="delta-kfac"), tmp_path / "store", base(), [Kl(batch_size=4)])
    found = []
    for checkpointing in (False, True):
        model = tuned(plan, base())
        trainer = TRAINERS[kind](model, tmp_path, activation_checkpointing=checkpointing)
        attach(trainer, plan)
        trainer.train()
        found.append(trained_state(model, plan))
    assert all(relative(value, found[0][name]) < 1e-4 for name, value in found[1].items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # PEFT 0.21 with Transformers 5.23
def test_a_base_prepared_for_training_in_few_bits_is_planned_and_trained(tmp_path: Path) -> None:
    """It turns norms and head to float32, and checkpointing on."""
    ready = prepare_model_for_kbit_training(base())
    plan = planned(LoraNull(rank=4), tmp_path / "store", ready)
    model = tuned(plan, ready)
    trainer = plain_trainer(model, tmp_path, activation_checkpointing=True)
    attach(trainer, plan)
    before = trained_state(model, plan)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained_state(model, plan).items())


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")  # there they are not paged
def test_optimisers_of_bitsandbytes(optim: str, tmp_path: Path) -> None:
    plan = planned(Keep(rank=4), tmp_path / "store", base())
    model = tuned(plan, base())
    trainer = trl_trainer(model, tmp_path, optim=optim, learning_rate=1e-3)
    attach(trainer, plan)
    before = trained_state(model, plan)
    trainer.train()
    after = trained_state(model, plan)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.real
def test_smollm2_in_four_bits_takes_the_penalised_step_with_and_without_checkpointing(
    smollm2_short: Path, tmp_path: Path
) -> None:
    """On real weights, and in bfloat16, as people train: a Fisher's factors, and KL beside them."""
    quantization = NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}
    model = load_model(str(smollm2_short), LoadOptions(quantization=quantization))
    tokenizer = load_tokenizer(str(smollm2_short))
    texts = ["Paris is the capital of France.", "Water boils at 100 degrees.", "The moon orbits the earth."]
    data: Any = {"knowledge": tokenize_calibration(texts, tokenizer, max_length=32, where="knowledge")}
    before = body_fingerprint(model)
    plan = plan_for(
        model,
        Lalora(rank=4, curvature="delta-kfac"),
        StatStore(tmp_path),
        data=data,
        penalties=[Kl(batch_size=3)],
        options=PlanOptions(layers=[2, 3]),
    )
    made = tuned(plan, model)
    ids = torch.tensor([tokenizer("Rome is the capital of Italy.")["input_ids"]])

    def gradients() -> list[Tensor]:
        made.train()
        made.zero_grad()
        made(input_ids=ids, labels=ids).loss.backward()
        Penalties(made, plan).step()
        return [p.grad.clone() for p in made.parameters() if p.requires_grad and p.grad is not None]

    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(std=1e-2, generator=torch.Generator().manual_seed(0))
    plain = gradients()
    made.enable_input_require_grads()
    made.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    made.activation_checkpointing_enable({"use_reentrant": True})
    reentrant = gradients()
    assert all(bool(g.any()) for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, reentrant, strict=True))
    assert body_fingerprint(made.unload()) == before
