"""Training off the directions that a plan keeps: OPLoRA, in any trainer and in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
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
from torch import Tensor
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
from keeptune.training.guard import Guard
from keeptune.training.projection import Projection

K = 6
ADAM: dict[str, Any] = {
    "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.05, "max_steps": 4,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(Oplora(rank=2, k=K))


def touched(state: dict[str, Tensor], plan: Plan) -> float:
    """How much of the change lies in the directions, relative, the most of all targets."""
    found = []
    for t in plan.targets:
        B, A = (state[f"{t.target.name}.{side}"].double() for side in "BA")
        size = B.norm() * A.norm()
        found += [(t.kept["U"].double().T @ B).norm() * A.norm(), (A @ t.kept["V"].double()).norm() * B.norm()]
        found[-2:] = [part / size.clamp_min(1e-30) for part in found[-2:]]
    return max(map(float, found))


class EachStep(TrainerCallback):
    """Looks at the factors after every step."""

    def __init__(self, look: Callable[[], float]) -> None:
        self.look, self.seen = look, list[float]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.look())


def trained(plan: Plan, folder: Path, trainer: str = "transformers", **extra: Any) -> tuple[PeftModel, list[float]]:
    model = tuned(plan)
    made = TRAINERS[trainer](model, folder, **(ADAM | extra))
    attach(made, plan)
    steps = EachStep(lambda: touched(trained_state(model, plan), plan) if plan.training else 0.0)
    made.add_callback(steps)
    made.train()
    return model, steps.seen


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_step_touches_the_directions_whatever_the_penalties(trainer: str, tmp_path: Path) -> None:
    plan = planned(Oplora(rank=2, k=K), [L2(strength=0.15, on="factors", unit="absolute")])
    model, seen = trained(plan, tmp_path, trainer)
    assert len(seen) == 4
    assert max(seen) < 1e-6
    assert all(float(trained_state(model, plan)[f"{t.target.name}.B"].norm()) > 1e-3 for t in plan.targets)


@pytest.mark.parametrize("left_out", ["gradients", "factors"])
def test_negative_control_projected_gradients_alone_do_not_hold_and_factors_alone_go_elsewhere(
    left_out: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained_state(trained(plan, tmp_path)[0], plan)
    step = 0 if left_out == "gradients" else 1
    monkeypatch.setattr(Projection, left_out, lambda self: self.taken.__setitem__(step, self.taken[step] + 1))
    model, seen = trained(plan, tmp_path)
    assert (max(seen) > 1e-2) == (left_out == "factors")
    assert largest_gap(trained_state(model, plan), whole) > 1e-3


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_training_is_that_of_a_forward_pass_that_projects(clip: float, plan: Plan, tmp_path: Path) -> None:
    free = tuned(planned(Lora(rank=2)))
    names = [t.target.name for t in plan.targets]
    project_in_forward(free, names, K)
    plain_trainer(free, tmp_path, **(ADAM | {"max_grad_norm": clip})).train()
    found = trained_state(trained(plan, tmp_path, max_grad_norm=clip)[0], plan)
    for name in names:
        layer = lora_layer(free, name)
        assert relative(found[f"{name}.B"], layer.lora_B["default"].weight.detach()) < 1e-4
        assert relative(found[f"{name}.A"], layer.lora_A["default"].weight.detach()) < 1e-4


def test_the_largest_triplets_of_the_base_are_triplets_of_what_is_exported(plan: Plan, tmp_path: Path) -> None:
    """And its largest, but where what was learned has a larger one."""
    model, _ = trained(plan, tmp_path / "run")
    export(model, plan, tmp_path / "out", base=Base(MODEL, partial(load_model, MODEL)))
    merged = PeftModel.from_pretrained(load_model(MODEL), str(tmp_path / "out")).merge_and_unload()
    base, same = load_model(MODEL), []
    for t in plan.targets:
        W, after = (read_weight(one, t.target).double() for one in (base, merged))
        U, S, V = top(W, K)
        assert float((after - W).norm()) > 0.1 * float(S[-1])
        assert float((after @ V - U * S).abs().max()) < 1e-6 * float(S[0])
        assert float((after.T @ U - V * S).abs().max()) < 1e-6 * float(S[0])
        rest = torch.linalg.matrix_norm(after - (U * S) @ V.T, 2)
        same.append(bool(rest <= S[-1]))
        assert torch.allclose(top(after, K)[1], S, rtol=1e-5) == same[-1]
    assert {*same} == {True, False}


def test_without_directions_it_is_plain_lora_bit_for_bit(tmp_path: Path) -> None:
    none, lora = (planned(method) for method in (Oplora(rank=2, k=0), Lora(rank=2)))
    assert not none.training
    states = [trained_state(trained(made, tmp_path)[0], made) for made in (none, lora)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_resumed_run_ends_as_one_that_was_not_stopped(plan: Plan, tmp_path: Path) -> None:
    """From a plan that was read back; what a checkpoint holds is off the directions already."""
    whole = trained_state(trained(plan, tmp_path, save_strategy="steps", save_steps=2)[0], plan)
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    model = tuned(again)
    made = plain_trainer(model, tmp_path, **ADAM)
    attach(made, again)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(whole[name], value) for name, value in trained_state(model, again).items())


def test_a_loop_of_ones_own_takes_the_trainers_steps(plan: Plan, tmp_path: Path) -> None:
    wanted = trained_state(trained(plan, tmp_path, lr_scheduler_type="constant", max_steps=2)[0], plan)
    model = tuned(plan)
    batches = plain_trainer(model, tmp_path, per_device_train_batch_size=4, max_steps=4).get_train_dataloader()
    projection = Projection(model, plan)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=ADAM["learning_rate"], weight_decay=ADAM["weight_decay"])
    model.train()
    for _ in range(2):
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            (model(**batch, num_items_in_batch=tokens).loss).backward()
        projection.gradients()
        torch.nn.utils.clip_grad_norm_(factors, ADAM["max_grad_norm"])
        optimizer.step()
        projection.factors()
        optimizer.zero_grad()
    assert touched(trained_state(model, plan), plan) < 1e-6
    assert largest_gap(trained_state(model, plan), wanted) < 2e-4


def test_what_cannot_be_projected_is_refused(plan: Plan, tmp_path: Path) -> None:
    made = plain_trainer(tuned(plan), tmp_path, **ADAM)
    made.add_callback(Guard(plan))
    with pytest.raises(TrainError, match=r"without the plan's kept_directions.*keeptune\.attach"):
        made.train()
    attach(made, plan)
    made.training_step = type(made).training_step.__get__(made)  # a loop without it
    with pytest.raises(TrainError, match=r"step 1: got an optimiser step whose gradients or factors were not"):
        made.train()
    made = plain_trainer(tuned(plan), tmp_path, **ADAM)
    made.accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(TrainError, match="method oplora: got DeepSpeed, .*DDP or FSDP2"):
        attach(made, plan)
