"""What is not exact under DeepSpeed is refused; test_distributed.py trains under it where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from tests.pipeline.support import recipe_of, values, write_data
from tests.training.support import EXAMPLES, TOKENIZER, planned, tuned

from keeptune.core.errors import KeeptuneError, RecipeError, TrainError
from keeptune.methods.lora import Lora
from keeptune.pipeline.run import start
from keeptune.training import checkpoints
from keeptune.training.arguments import sft_config
from keeptune.training.trainer import train
from keeptune.training.zero import refuse_other_states


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What `accelerate launch` says of DeepSpeed, as if it were installed."""
    monkeypatch.setattr(DeepSpeedPlugin, "set_deepspeed_weakref", lambda _: None)  # it asks for the package
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as TRL's configurations have it: the recipe says it
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value", "dtype", "said"),
    [
        ("ZERO_STAGE", "3", "float32", "got ZeRO-3, wanted ZeRO-1 or 2, .*Use DDP, or FSDP2"),
        ("ZERO_STAGE", "0", "float32", "got ZeRO-0, "),
        ("CONFIG_FILE", {"zero_optimization": {"stage": 3}}, "float32", "got ZeRO-3, "),
        ("CONFIG_FILE", {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "float32", "got bf16, .*false"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "float32", "got an optimiser or weights that are offloaded"),
        ("ZERO_STAGE", "2", "bfloat16", "got bf16, for which DeepSpeed rounds the trained factors"),
        ("ZERO_STAGE", "1", "float32", None),
        ("ZERO_STAGE", "2", "float32", None),
    ],
)
def test_what_is_not_exact_is_refused_by_the_environment(
    name: str, value: Any, dtype: str, said: str | None, asked: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name == "CONFIG_FILE":
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(value))
        value = str(path)
    asked.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    train = {"per_device_train_batch_size": 4}
    made = recipe_of(values(write_data(tmp_path), tmp_path / "o", tmp_path / "store", dtype=dtype, train=train))
    if said is None:
        start(made)
        return
    with pytest.raises(TrainError, match=f"DeepSpeed: {said}"):
        start(made)
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="it is installed")
def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        RecipeError, match=r"train\.deepspeed: got what a launcher .*not installed, .*pip install deepspeed"
    ):
        sft_config({}, tmp_path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("written", "here", "said"),
    [
        (2, 0, "got 2 processes with ZeRO, wanted no ZeRO"),
        (0, 2, "got no ZeRO, wanted 2 processes with ZeRO"),
        (2, 3, "got 2 processes with ZeRO, wanted 3 processes with ZeRO"),
        (2, 2, None),
        (0, 0, None),
    ],
)
def test_states_of_an_optimiser_are_gone_on_from_as_they_were_written(
    written: int, here: int, said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "global_step2").mkdir()
    for rank in range(written):
        (tmp_path / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    trainer = SimpleNamespace(is_deepspeed_enabled=here > 0, args=SimpleNamespace(world_size=here))
    if said is None:
        refuse_other_states(trainer, tmp_path)
    else:
        with pytest.raises(KeeptuneError, match=f"checkpoint {tmp_path}: {said}"):
            refuse_other_states(trainer, tmp_path)


def test_a_run_without_zero_does_not_go_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Trainer would, with fresh states of Adam and without a word."""
    plan = planned(Lora(rank=2))
    arguments = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    config = sft_config(arguments, tmp_path, dtype=torch.float32, device="cpu")
    train(tuned(plan), plan, TOKENIZER, EXAMPLES, config)
    states = tmp_path / "checkpoint-2" / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states.parent.mkdir()
    (tmp_path / "checkpoint-2" / "optimizer.pt").rename(states)
    (tmp_path / "checkpoint-2" / "checksums.json").write_text(json.dumps(checkpoints._sums(states.parents[1])))
    with pytest.raises(TrainError, match="got 1 process with ZeRO, wanted no ZeRO"):
        train(tuned(plan), plan, TOKENIZER, EXAMPLES, config)
