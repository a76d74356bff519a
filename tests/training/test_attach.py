"""What a plan asks of a trainer: its learning rate, in any trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tests.models import save
from tests.training.support import EXAMPLES, TOKENIZER, TRAINERS, arguments, planned, trl_trainer, tuned
from trl import SFTConfig

from keeptune.adapter.install import trained_state
from keeptune.core.errors import DataError, TrainError
from keeptune.methods.l2_lora import L2Lora
from keeptune.methods.lora import Lora
from keeptune.training.attach import attach
from keeptune.training.guard import Guard
from keeptune.training.trainer import train


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_plan_may_ask_for_a_share_of_the_learning_rate(trainer: str, tmp_path: Path) -> None:
    """Once, however often it is attached; steps of SGD are that much shorter."""
    lora = planned(Lora(rank=2))
    plan = dataclasses.replace(lora, training={"learning_rate_factor": 0.4})
    found = []
    for asked, rate in ((plan, 0.05), (lora, 0.02)):
        model = tuned(asked)
        made = TRAINERS[trainer](model, tmp_path, learning_rate=rate)
        attach(made, asked)
        attach(made, asked)
        made.train()
        assert made.state.log_history[0]["learning_rate"] == pytest.approx(0.02)
        found.append(trained_state(model, asked))
    assert all(torch.allclose(found[0][name], value) for name, value in found[1].items())


def test_a_rate_cannot_be_scaled_in_an_optimiser_that_is_there(tmp_path: Path) -> None:
    plan = dataclasses.replace(planned(Lora(rank=2)), training={"learning_rate_factor": 0.4})
    model = tuned(plan)
    made = trl_trainer(model, tmp_path)
    made.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainError, match="an optimiser of your own"):
        attach(made, plan)


def test_tokens_without_rows_and_rows_that_are_not_saved_are_refused_before_training(tmp_path: Path) -> None:
    plan = planned(Lora(rank=2))
    model = tuned(plan)
    made = trl_trainer(model, tmp_path)
    rows = len(model.get_input_embeddings().weight)
    made.train_dataset = Dataset.from_dict({"input_ids": [[1, rows], [2]]})
    with pytest.raises(DataError, match=rf"the training data: got the token {rows}, .*resize_token_embeddings"):
        attach(made, plan)
    base = model.get_base_model()
    base.name_or_path = str(save(base.__class__(base.config), tmp_path / "base").folder)
    base.config.vocab_size = rows + 1
    with pytest.raises(TrainError, match=rf"an embedding of {rows + 1} rows, where {rows} are saved.*load and plan"):
        attach(trl_trainer(model, tmp_path), plan)


# attach and Guard


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_without_what_the_plan_asks_for_does_not_start(trainer: str, tmp_path: Path) -> None:
    plan = dataclasses.replace(planned(Lora(rank=2)), training={"learning_rate_factor": 0.4})
    made = TRAINERS[trainer](tuned(plan), tmp_path, optim=SFTConfig.optim)
    made.add_callback(Guard(plan))
    with pytest.raises(TrainError, match=r"without the plan's learning_rate_factor.*keeptune\.attach"):
        made.train()
    made = TRAINERS[trainer](tuned(plan), tmp_path, optim=SFTConfig.optim)
    attach(made, plan)
    made.train()


def test_attaching_twice_adds_nothing(tmp_path: Path) -> None:
    plan = planned(L2Lora(rank=2))
    made = trl_trainer(tuned(plan), tmp_path)
    attach(made, plan)
    before = (made.training_step, made.log, len(made.callback_handler.callbacks))
    attach(made, plan)
    assert (made.training_step, made.log, len(made.callback_handler.callbacks)) == before


def test_what_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    lora = planned(Lora(rank=2))
    plan = dataclasses.replace(lora, training={"learning_rate_faktor": 0.4})
    with pytest.raises(TrainError, match='training: got "learning_rate_faktor".*Did you mean "learning_rate_factor"'):
        attach(trl_trainer(tuned(lora), tmp_path, optim=SFTConfig.optim), plan)


def test_keeptunes_own_training_attaches(tmp_path: Path) -> None:
    plan = dataclasses.replace(planned(Lora(rank=2)), training={"learning_rate_factor": 0.4})
    model = tuned(plan)
    extra = arguments(tmp_path, bf16=False, activation_checkpointing=False, optim=SFTConfig.optim)
    loss = train(model, plan, TOKENIZER, EXAMPLES, SFTConfig(**extra))
    assert [point["step"] for point in loss] == [1, 2]
    assert all(p.keys() == {"step", "loss", "learning_rate"} for p in loss)
    assert [p["learning_rate"] for p in loss] == pytest.approx([0.02, 0.02])
