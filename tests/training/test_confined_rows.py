"""Rows and their biases in keeptune's own training, through a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.warning import PeftWarning
from tests.training.support import EXAMPLES, TOKENIZER, knowledge, plain_trainer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from keeptune.adapter.install import install, trained_state
from keeptune.adapter.special_layers import biases_are_no_shards
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.methods.loki import Loki
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.store import StatStore
from keeptune.training.arguments import sft_config
from keeptune.training.guard import Guard
from keeptune.training.trainer import train

TRAIN = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "seed": 3, "save_steps": 2}


def base() -> PreTrainedModel:
    """Biases everywhere, and dropout in training."""
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = GPT2LMHeadModel(config).eval()
    return model


def trained(plan: Plan, folder: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    model = install(base(), plan)
    config = sft_config(TRAIN | arguments, folder, dtype=torch.float32, device="cpu", positions=64)
    train(model, plan, TOKENIZER, EXAMPLES, config)
    return trained_state(model, plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [Loki(q=20), Loki(q=30, rank=2, dropout=0.1)], ids=["rows", "within"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method: Loki, tmp_path: Path) -> None:
    plan = plan_for(base(), method, StatStore(tmp_path / "store"), data={"knowledge": knowledge()})
    whole = trained(plan, tmp_path / "whole")
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        patch.setattr("keeptune.training.guard.Guard.on_log", _stop_at_third)
        trained(plan, tmp_path / "stopped", logging_steps=1)
    assert (tmp_path / "stopped" / "checkpoint-2").is_dir()
    resumed = trained(plan, tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    for t in plan.targets:
        rows = list(t.decision.rows or ())
        assert whole[f"{t.target.name}.bias"].nonzero().flatten().tolist() == rows
        assert whole[f"{t.target.name}.B"].any(dim=1).nonzero().flatten().tolist() == rows


class Stopped(BaseException):
    """Stands for a kill inside this process."""


def _stop_at_third(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
    if state.global_step == 3:
        raise Stopped


@pytest.mark.parametrize(
    ("told", "heard"),
    [
        ("a.b.lora_B.bias:(32,), a.c.lora_B.bias:(64,). A 1-D or", False),
        ("a.lora_B.bias:(32,), b.lora_B.bias:(32,), c.lora_B.bias:(32,) (+9 more). A 1-D or", False),
        ("a.lora_B.bias:(32,), b.lora_A.weight:(64,). A 1-D or", True),
        ("a.lora_B.weight:(0,). A 1-D or", True),
        ("a.lora_B.bias:(0,). A 1-D or", True),
    ],
)
def test_of_pefts_warning_only_what_is_of_biases_is_left_out(told: str, heard: bool) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with biases_are_no_shards():
            warnings.warn(f"Adapter 'default': 2 LoRA tensor(s) have invalid shape: {told}", PeftWarning, stacklevel=1)
    assert bool(found) == heard


def test_an_unattached_trainer_says_what_the_plan_asks_for(tmp_path: Path) -> None:
    """The rate that follows q is no business of the user's own trainer until the plan is attached."""
    plan = plan_for(base(), Loki(q=30, rate="by-q"), StatStore(tmp_path / "store"), data={"knowledge": knowledge()})
    made = plain_trainer(install(base(), plan), tmp_path)  # type: ignore[arg-type]
    made.add_callback(Guard(plan))
    with pytest.raises(TrainError, match="learning_rate_factor"):
        made.train()
