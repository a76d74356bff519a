"""Training off the directions that a plan keeps: OPLoRA, in any trainer and in a loop of one's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from tests.models import relative
from tests.reference.oplora_reference import project_in_forward, top
from tests.training.support import MODEL, TRAINERS, largest_gap, plain_trainer, planned, tuned
from transformers import TrainerCallback

from keeptune.adapter.export import Base, export
from keeptune.adapter.install import lora_layer, trained_state
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.methods.lora import Lora
from keeptune.methods.oplora import Oplora
from keeptune.model.pretrained import load_model
from keeptune.penalties.l2 import L2
from keeptune.training.attach import attach
from keeptune.training.projection import Projection

K = 6
ADAM: dict[str, Any] = {
    "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.05, "max_steps": 4,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(Oplora(rank=2, k=K))


def touched(model: PeftModel, plan: Plan) -> float:
    """How much of a factor lies in the directions, relative, the most of all."""
    state = trained_state(model, plan)
    pairs = [(state[f"{t.target.name}.B"].T, t.kept["U"]) for t in plan.targets]
    pairs += [(state[f"{t.target.name}.A"], t.kept["V"]) for t in plan.targets]
    return max(float((factor @ Q).norm() / factor.norm()) for factor, Q in pairs)


def trained(plan: Plan, folder: Path, trainer: str = "transformers", resume: Any = None, **extra: Any) -> Any:
    """The model, its state and how much each step touched."""
    model, seen = tuned(plan), list[float]()
    made = TRAINERS[trainer](model, folder, **(ADAM | extra))
    attach(made, plan)
    look = TrainerCallback()
    look.on_step_end = lambda *_, **__: seen.append(touched(model, plan))  # type: ignore[method-assign]
    if plan.training:
        made.add_callback(look)
    made.train(resume_from_checkpoint=resume)
    return model, trained_state(model, plan), seen


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_step_touches_the_directions_whatever_the_penalties(trainer: str, tmp_path: Path) -> None:
    plan = planned(Oplora(rank=2, k=K), [L2(strength=0.15, on="factors", unit="absolute")])
    _, _, seen = trained(plan, tmp_path, trainer)
    assert len(seen) == 4
    assert max(seen) < 1e-6


@pytest.mark.parametrize("left_out", ["", "gradients", "factors"])
def test_training_is_that_of_a_forward_pass_that_projects(
    left_out: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of nothing less: neither projected gradients alone hold under Adam, nor factors alone go the same way."""
    free = tuned(planned(Lora(rank=2)))
    project_in_forward(free, [t.target.name for t in plan.targets], K)
    plain_trainer(free, tmp_path, **ADAM).train()
    if left_out:
        monkeypatch.setattr(Projection, left_out, lambda self: setattr(self, "taken", self.taken + 1))
    _, found, seen = trained(plan, tmp_path)
    assert (max(seen) > 1e-2) == (left_out == "factors")
    gaps = [
        relative(found[f"{name}.{side}"], getattr(lora_layer(free, name), f"lora_{side}")["default"].weight.detach())
        for name in (t.target.name for t in plan.targets)
        for side in "BA"
    ]
    assert max(gaps) < 1e-4 if not left_out else max(gaps) > 1e-2


def test_the_largest_triplets_of_the_base_are_triplets_of_what_is_exported(plan: Plan, tmp_path: Path) -> None:
    """And its largest, but where what was learned has a larger one."""
    model, *_ = trained(plan, tmp_path / "run")
    export(model, plan, tmp_path / "out", base=Base(MODEL, partial(load_model, MODEL)))
    merged = PeftModel.from_pretrained(load_model(MODEL), str(tmp_path / "out")).merge_and_unload()
    base, same = load_model(MODEL), set[bool]()
    for t in plan.targets:
        W, after = (read_weight(one, t.target).double() for one in (base, merged))
        U, S, V = top(W, K)
        assert float((after - W).norm()) > 0.1 * float(S[-1])
        assert float((after @ V - U * S).abs().max()) < 1e-6 * float(S[0])
        assert float((after.T @ U - V * S).abs().max()) < 1e-6 * float(S[0])
        largest = bool(torch.linalg.matrix_norm(after - (U * S) @ V.T, 2) <= S[-1])
        assert torch.allclose(top(after, K)[1], S, rtol=1e-5) == largest
        same.add(largest)
    assert same == {True, False}


def test_without_directions_it_is_plain_lora_bit_for_bit(tmp_path: Path) -> None:
    found, wanted = (trained(planned(method), tmp_path)[1] for method in (Oplora(rank=2, k=0), Lora(rank=2)))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_resumed_run_ends_as_one_that_was_not_stopped(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    whole = trained(plan, tmp_path, save_strategy="steps", save_steps=2)[1]
    again = trained(Plan.load(tmp_path / "plan"), tmp_path, resume=str(tmp_path / "checkpoint-2"))[1]
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_loop_of_ones_own_takes_the_trainers_steps(plan: Plan, tmp_path: Path) -> None:
    once: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    wanted = trained(plan, tmp_path, **once)[1]
    model = tuned(plan).train()
    (batch,) = plain_trainer(model, tmp_path, **once).get_train_dataloader()
    projection, factors = Projection(model, plan), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=ADAM["learning_rate"], weight_decay=ADAM["weight_decay"])
    model(**batch).loss.backward()
    with pytest.raises(TrainError, match="gradients or factors were not projected"):
        projection.factors()
    projection.gradients()
    torch.nn.utils.clip_grad_norm_(factors, ADAM["max_grad_norm"])
    optimizer.step()
    projection.factors()
    assert largest_gap(trained_state(model, plan), wanted) < 1e-5


def test_what_cannot_be_projected_is_refused(plan: Plan, tmp_path: Path) -> None:
    made = plain_trainer(tuned(plan), tmp_path, **ADAM)
    attach(made, plan)
    made.training_step = type(made).training_step.__get__(made)  # a loop without it
    with pytest.raises(TrainError, match=r"step 1: got an optimiser step whose gradients or factors were not"):
        made.train()
    made = plain_trainer(tuned(plan), tmp_path, **ADAM)
    made.accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(TrainError, match="method oplora: got DeepSpeed, .*DDP or FSDP2"):
        attach(made, plan)
