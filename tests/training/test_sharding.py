"""What a launcher asks for and is refused; one process on several devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples.encoder import make_encoder
from tests.training.support import EXAMPLES, MODEL, TOKENIZER, planned, tuned
from transformers import AutoModelForSequenceClassification

from keeptune.core.errors import ModelError, RecipeError
from keeptune.methods.lora import Lora
from keeptune.model import pretrained
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.model.quantization import goes_with_shards
from keeptune.training import sharding
from keeptune.training.arguments import sft_config
from keeptune.training.losses.asft import Asft
from keeptune.training.losses.dft import Dft
from keeptune.training.sharding import refuse_launcher, shard_blocks
from keeptune.training.trainer import train

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
TASK: dict[str, Any] = {
    "task": "completion",
    "examples": 8,
    "loss": None,
    "device_map": None,
    "rows": None,
    "shards": True,
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two processes, by what they say of themselves."""
    monkeypatch.setattr(sharding, "world", lambda: 2)
    return monkeypatch


@pytest.mark.parametrize(
    ("said", "changes", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "got FSDP 1, .*fsdp_version: 2"),
        (FSDP, {"loss": Asft()}, "got task.loss asft under FSDP2, .*multi_gpu"),
        (DEEPSPEED, {"task": "unpaired_preference"}, "got task.kind unpaired_preference under DeepSpeed"),
        (FSDP, {"rows": [5]}, "got `trainable_token_indices` under FSDP2: .*multi_gpu"),
        (FSDP, {"shards": False}, "got a base that is quantised otherwise than in four bits"),
        ({}, {"device_map": "auto"}, "got `device_map` with 2 processes.*start one process"),
        ({}, {"examples": 1}, "got 2 processes for 1 examples.*Start at most 1"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_way_out(
    said: dict[str, str], changes: dict[str, Any], told: str, launched: pytest.MonkeyPatch
) -> None:
    for name, value in said.items():
        launched.setenv(name, value)
    with pytest.raises(RecipeError, match=f"launcher: {told}"):
        refuse_launcher(**(TASK | changes))
    launched.setattr(sharding, "world", lambda: 1)
    refuse_launcher(**(TASK | changes))


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ({}, {"loss": Asft()}),
        ({}, {"task": "preference"}),
        (FSDP, {"loss": Dft()}),
        (FSDP, {}),
        ({}, {"rows": [5], "shards": False}),
    ],
)
def test_others_are_taken(said: dict[str, str], changes: dict[str, Any], launched: pytest.MonkeyPatch) -> None:
    for name, value in said.items():
        launched.setenv(name, value)
    refuse_launcher(**(TASK | changes))


def test_one_process_trains_on_one_device_unless_it_is_told_of_several(tmp_path: Path) -> None:
    plan = planned(Lora(rank=2))
    config = sft_config({"max_steps": 1, "save_strategy": "no"}, tmp_path, dtype=torch.float32, device="cpu")
    config._n_gpu = 2
    train(tuned(plan), plan, TOKENIZER, EXAMPLES, config)
    assert config.n_gpu == 1


def test_a_device_map_places_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = load_model(MODEL, LoadOptions(device_map={"": "cpu"}))
    assert all(torch.equal(a, b) for a, b in zip(placed.parameters(), load_model(MODEL).parameters(), strict=True))
    asked: list[Any] = []
    own = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": "disk"})
    own.eval = lambda: own
    monkeypatch.setattr(pretrained, "load_weights", lambda *_, **places: asked.append(places) or own)
    with pytest.raises(ModelError, match="device_map: got parts on 0, disk: .*quantization"):
        load_model(MODEL, LoadOptions(device_map="auto"))
    assert asked == [{"device_map": "auto"}]


def test_blocks_are_sharded_and_what_the_launcher_names(tmp_path: Path) -> None:
    """An encoder names its embeddings too, which accelerate would shard twice."""
    make_encoder(tmp_path, ["a text"])
    encoder = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None, cpu_ram_efficient_loading=True)
    state = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    trainer: Any = SimpleNamespace(is_fsdp_enabled=True, accelerator=state.accelerator, model=encoder)
    shard_blocks(trainer, planned(Lora(rank=2)))
    assert plugin.transformer_cls_names_to_wrap == ["RobertaLayer"]
    assert plugin.transformer_cls_names_to_wrap != encoder._no_split_modules
    assert plugin.cpu_ram_efficient_loading
    plugin.transformer_cls_names_to_wrap = ["RobertaSelfAttention"]
    shard_blocks(trainer, planned(Lora(rank=2), modules_to_save=["lm_head"]))
    assert plugin.transformer_cls_names_to_wrap == ["RobertaSelfAttention"]
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize(
    ("fields", "taken"), [(None, True), ({"load_in_4bit": True}, True), ({"load_in_8bit": True}, False)]
)
def test_four_bits_go_with_shards(fields: dict[str, Any] | None, taken: bool) -> None:
    assert goes_with_shards(fields, SimpleNamespace()) == taken
    assert goes_with_shards(None, SimpleNamespace(quantization_config=fields)) == taken
