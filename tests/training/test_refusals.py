"""What cannot count a penalty exactly once is refused before anything is trained; no such back-end is needed here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from tests.training.support import MODEL, plain_trainer, planned, tuned
from transformers import Trainer, TrainingArguments

from keeptune.adapter.install import install
from keeptune.core.errors import PlanError, TrainError
from keeptune.core.plan import Plan
from keeptune.methods.full import Full
from keeptune.methods.lora import Lora
from keeptune.model.pretrained import load_model
from keeptune.penalties.l2 import L2
from keeptune.training.attach import attach


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(Lora(rank=2), [L2()])


def pretend(trainer: Any, kind: DistributedType, version: int = 2) -> None:
    """Let a trainer say that it runs on a back-end."""
    trainer.accelerator = SimpleNamespace(
        distributed_type=kind,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version)),
        scaler=None,
        clip_grad_norm_=None,
        sync_gradients=True,
    )


@pytest.mark.parametrize(
    ("kind", "version", "told"),
    [
        (DistributedType.FSDP, 1, r"penalties l2: got FSDP 1, .*Set `fsdp_version: 2`"),
        (DistributedType.MEGATRON_LM, 2, r"penalties l2: got the back-end MEGATRON_LM, wanted .*FSDP2 or ZeRO-1/2"),
        (DistributedType.XLA, 2, r"penalties l2: got the back-end XLA"),
    ],
)  # fmt: skip
def test_back_ends_without_a_moment_to_add_a_gradient(
    kind: DistributedType, version: int, told: str, plan: Plan, tmp_path: Path
) -> None:
    trainer = plain_trainer(tuned(plan), tmp_path)
    before = trainer.training_step
    pretend(trainer, kind, version)
    with pytest.raises(TrainError, match=told):
        attach(trainer, plan)
    assert trainer.training_step == before


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.FSDP])
def test_others_are_taken(kind: DistributedType, plan: Plan, tmp_path: Path) -> None:
    trainer = plain_trainer(tuned(plan), tmp_path)
    pretend(trainer, kind)
    attach(trainer, plan)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimisers_that_step_in_the_backward_pass(optim: str, plan: Plan, tmp_path: Path) -> None:
    trainer = plain_trainer(tuned(plan), tmp_path)
    trainer.args.optim = optim
    with pytest.raises(
        TrainError, match=rf"penalties l2: got the optimiser {optim}, .*Set train\.optim to adamw_torch"
    ):
        attach(trainer, plan)


def test_a_method_that_changes_whole_weights(plan: Plan, tmp_path: Path) -> None:
    method = Full()
    with pytest.raises(PlanError, match=rf"method {method.name}: got the penalties l2.*Leave `penalties` out"):
        planned(method, [L2()], layers=None)
    by_hand = dataclasses.replace(planned(method, layers=None), penalties=plan.penalties)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=install(load_model(MODEL), planned(method, layers=None)), args=arguments)
    with pytest.raises(TrainError, match=rf"penalties l2: got the method {method.name}, which changes whole weights"):
        attach(trainer, by_hand)


def test_a_trainer_with_a_loop_of_its_own(plan: Plan, tmp_path: Path) -> None:
    """One that never calls training_step would train on without the penalty."""

    class Own(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("never called")

        def _inner_training_loop(self, *args: Any, **kwargs: Any) -> None:
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            self.state.global_step += 1
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)

    trainer = plain_trainer(tuned(plan), tmp_path)
    trainer.__class__ = Own
    attach(trainer, plan)
    with pytest.raises(TrainError, match=r"step 1: got an optimiser step without the penalties l2.*Penalties\.step"):
        trainer.train()
