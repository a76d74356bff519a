"""Packed examples say what they say alone, or packing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.support import EXAMPLES, TOKENIZER, planned, tuned
from trl import SFTConfig

from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.methods.lora import Lora
from keeptune.training import trainer as training
from keeptune.training.arguments import sft_config
from keeptune.training.packing import refuse_leaks


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return planned(Lora(rank=2), [], store=tmp_path_factory.mktemp("store"))


def config(folder: Path, **more: Any) -> SFTConfig:
    arguments = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 64, "save_strategy": "no", **more}
    return sft_config(arguments, folder, dtype=torch.float32, device="cpu", positions=512)


def test_the_loss_of_packed_examples_is_that_of_each_alone(plan: Plan, tmp_path: Path) -> None:
    losses = []
    for packing in (True, False):
        made = training._trainer(
            tuned(plan), plan, TOKENIZER, EXAMPLES, config(tmp_path, packing=packing, per_device_train_batch_size=8)
        )
        inputs = next(iter(made.get_train_dataloader()))
        assert ("position_ids" in inputs) == packing
        with torch.no_grad():
            loss = made.compute_loss(made.model.eval(), inputs)
        losses.append((float(loss), int((inputs["labels"] != -100).sum())))
    (packed, tokens), (alone, same) = losses
    assert tokens == same
    assert packed == pytest.approx(alone, rel=1e-5)


def test_what_joins_examples_is_refused(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainError, match=r"train\.packing: got packing_strategy wrapped"):
        training._trainer(
            tuned(plan), plan, TOKENIZER, EXAMPLES, config(tmp_path, packing=True, packing_strategy="wrapped")
        )
    made = training._trainer(tuned(plan), plan, TOKENIZER, EXAMPLES, config(tmp_path, packing=True))
    collate = made.data_collator
    made.data_collator = lambda rows: {"input_ids": collate(rows)["input_ids"]}  # no border between examples
    with pytest.raises(TrainError, match="examples that see each other of a llama model"):
        refuse_leaks(made)
