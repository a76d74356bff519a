"""Hosts: Axolotl's plugin on a copy of its base class, LLaMA-Factory's launcher, and what they are told."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel, ValidationError
from tests.hosts import axolotl_base
from tests.pipeline.support import keeptune as command
from tests.pipeline.support import write_jsonl
from tests.training.support import EXAMPLES, MODEL, TOKENIZER, arguments
from trl import SFTConfig, SFTTrainer

from keeptune.core.errors import KeeptuneError, TrainError
from keeptune.hosts.adopted import refuse_adapter
from keeptune.hosts.callback import Callback, warn_untried
from keeptune.hosts.programs import HostSection, callback_of
from keeptune.model.pretrained import load_model


@pytest.fixture
def section(tmp_path: Path) -> dict[str, Any]:
    rows = [{"text": f"Once upon a time there were {n} little birds."} for n in range(16)]
    write_jsonl(tmp_path / "knowledge.jsonl", rows)
    method = {"name": "keep", "nats": 0.01, "every": 1}
    return {"method": method, "knowledge": {"file": str(tmp_path / "knowledge.jsonl"), "max_length": 32}}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As Axolotl loads it, by the name in its YAML file."""
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", axolotl_base)
    module, _, name = "keeptune.hosts.AxolotlPlugin".rpartition(".")
    return getattr(importlib.import_module(module), name)()


class Theirs(BaseModel):
    """Axolotl's own keys; others are left out of what plugins are given."""

    base_model: str


def merged(plugin: Any) -> type[BaseModel]:
    """Axolotl's merge_input_args: its model and those of plugins, which are named by strings."""
    module, _, name = plugin.get_input_args().rpartition(".")
    return type("AxolotlInputConfig", (Theirs, getattr(importlib.import_module(module), name)), {})


def test_axolotls_plugin_trains_under_a_budget_and_exports(
    plugin: Any, section: dict[str, Any], tmp_path: Path
) -> None:
    assert isinstance(plugin, axolotl_base.BasePlugin)
    checked = merged(plugin).model_validate({"base_model": MODEL, "keeptune": section})
    cfg = checked.model_dump(exclude_none=True)
    callbacks = plugin.add_callbacks_pre_trainer(cfg, None)
    assert [type(one) for one in callbacks] == [Callback]
    config = SFTConfig(**arguments(tmp_path / "out", bf16=False, activation_checkpointing=False))
    trainer = SFTTrainer(
        load_model(MODEL),
        config,
        train_dataset=EXAMPLES.dataset(TOKENIZER, 64)[0],
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        callbacks=callbacks,
    )
    trainer.train()
    rows = trainer.state.log_history
    assert [row["kl_budget"] for row in rows if "loss" in row] == [0.01, 0.01]
    assert rows[1]["penalty_grad_norm"] > 0 and 0 < rows[-1]["held_out/kl"] < 0.02
    for name in ("adapter/adapter_model.safetensors", "report.html"):
        assert (tmp_path / "out/keeptune" / name).is_file()


def test_axolotl_refuses_an_unknown_key_and_a_missing_section(plugin: Any, section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"keeptune\.knowlege\s+Extra inputs are not permitted"):
        merged(plugin).model_validate({"base_model": MODEL, "keeptune": section | {"knowlege": "general"}})
    with pytest.raises(ValidationError, match=r"keeptune\s+Field required"):
        merged(plugin).model_validate({"base_model": MODEL})


def test_a_section_has_several_sets_the_mixture_that_ships_and_every_key_of_a_recipe(section: dict[str, Any]) -> None:
    mixed = HostSection.model_validate(section | {"knowledge": "general"})
    assert len(mixed.knowledge) == 2 and len(mixed.texts) > 64
    several = section | {"knowledge": [section["knowledge"], "general"], "penalties": [{"name": "l2"}]}
    assert len(HostSection.model_validate(several).texts) == len(mixed.texts) + 16
    assert isinstance(callback_of(several, "here"), Callback)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metod": "keep"}, r"here, key metod: got an unknown key.*method"),
        (
            {"knowledge": {"file": "k.jsonl", "exampels": 3}},
            r"key knowledge\.0\.exampels: got an unknown key.*examples",
        ),
        ({"knowledge": []}, "knowledge"),
        ({"method": {"name": "keep", "nats": -1}}, "nats"),
    ],
)
def test_a_wrong_section_says_where(changes: dict[str, Any], told: str, section: dict[str, Any]) -> None:
    with pytest.raises(KeeptuneError, match=told):
        callback_of(section | changes, "here")


def test_llamafactory_has_its_file_without_the_section_and_the_callback(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``run_exp(args, callbacks)`` of llamafactory 0.9.5, src/llamafactory/train/tuner.py."""
    file, seen = tmp_path / "train.yaml", []
    file.write_text(json.dumps({"stage": "sft", "learning_rate": 1e-4, "keeptune": section}), encoding="utf-8")
    words = ("llamafactory", file, "--learning_rate", "1e-3")
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, None)
    missing = command(*words, capsys=capsys)
    assert missing.code == 2 and "pip install llamafactory" in missing.err

    tuner = ModuleType("llamafactory.train.tuner")
    tuner.run_exp = lambda args=None, callbacks=None: seen.append((args, callbacks))  # type: ignore[attr-defined]
    for name, module in {
        "llamafactory": ModuleType("l"),
        "llamafactory.train": ModuleType("t"),
        tuner.__name__: tuner,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert command(*words, capsys=capsys).code == 0
    ((args, (callback,)),) = seen
    assert args == {"stage": "sft", "learning_rate": 1e-3} and isinstance(callback, Callback)

    file.write_text(json.dumps({"stage": "sft"}), encoding="utf-8")
    bare = command("llamafactory", file, capsys=capsys)
    assert bare.code == 2 and "keeptune: {knowledge: general}" in bare.err and len(seen) == 1


@pytest.mark.parametrize(
    ("module", "found", "warned"),
    [
        ("axolotl", "0.21.3", False),
        ("axolotl", "0.25.0", True),
        ("axolotl", "0.210", True),
        ("unsloth", "2026.10.9", False),
    ],
)
def test_a_host_of_a_version_that_was_not_tried_is_warned_of(
    module: str, found: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr("keeptune.hosts.callback.version", lambda package: found)
    warn_untried()
    assert (f"{module} {found}" in caplog.text) == warned


def test_hosts_are_not_imported_with_keeptune() -> None:
    script = "import sys, keeptune; assert not [m for m in sys.modules if m.startswith('keeptune.hosts')]"
    subprocess.run([sys.executable, "-c", script], check=True)


@dataclass
class TheirConfig(LoraConfig):
    """A host's own kind of LoRA, such as ms-swift's."""

    lorap_emb_lr: float = 1e-6


def test_a_lora_of_a_hosts_own_class_is_a_plain_one_unless_it_says_more() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "target_parameters": []}  # as Axolotl writes it
    refuse_adapter(get_peft_model(load_model(MODEL), TheirConfig(**options)), plain=True)
    with pytest.raises(TrainError, match="got a LoRA with lorap_emb_lr=0.1"):
        refuse_adapter(get_peft_model(load_model(MODEL), TheirConfig(**options, lorap_emb_lr=0.1)), plain=True)
