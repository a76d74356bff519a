"""Trainers on a real tiny model, and what their steps leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tests.assets import STORIES
from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from keeptune.adapter.install import install
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration, tokenize_calibration
from keeptune.data.completions import TaskExamples
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.store import StatStore

MODEL = str(STORIES)
DEEPSPEED = find_spec("deepspeed") is not None
TOKENIZER = load_tokenizer(MODEL)
EXAMPLES = TaskExamples(
    prompts=tuple(f"Q: what is {n} plus {n}?\nA:" for n in range(8)), completions=tuple(f" {2 * n}" for n in range(8))
)


def knowledge() -> Calibration:
    texts = [f"Once upon a time there were {n} little birds.{' They sang.' * (n % 3)}" for n in range(8)]
    return tokenize_calibration(texts, TOKENIZER, max_length=32, where="knowledge")


def task() -> Calibration:
    data = knowledge()
    return Calibration.of_answers(data.sequences, data.pad_id, tuple(len(ids) // 2 for ids in data.sequences))


def planned(
    method: Any, penalties: Sequence[Any] = (), *, store: Path = Path("unused"), layers: Any = (0, 1), **extra: Any
) -> Plan:
    """A plan for the first two of five blocks unless told; penalties that need statistics need a store of their own."""
    data: Any = {"knowledge": knowledge(), "task": task()} if store != Path("unused") else {}
    options = PlanOptions(layers=layers, **extra)
    return plan_for(load_model(MODEL), method, StatStore(store), data=data, penalties=penalties, options=options)


def arguments(folder: Path, **extra: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "learning_rate": 0.05, "optim": "sgd",
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False,
    } | extra  # fmt: skip


def trl_trainer(model: PeftModel, folder: Path, callbacks: Any = None, **extra: Any) -> Any:
    config = SFTConfig(**arguments(folder, **({"bf16": False, "activation_checkpointing": False} | extra)))
    return SFTTrainer(
        model=model, args=config, train_dataset=EXAMPLES.dataset(TOKENIZER, 64)[0], processing_class=TOKENIZER,
        callbacks=callbacks,
    )  # fmt: skip


def plain_trainer(model: PeftModel, folder: Path, callbacks: Any = None, **extra: Any) -> Any:
    rows = [TOKENIZER(p + c)["input_ids"][:16] for p, c in zip(EXAMPLES.prompts, EXAMPLES.completions, strict=True)]
    data: Any = [{"input_ids": ids, "labels": ids} for ids in rows]
    config = TrainingArguments(**arguments(folder, **extra))
    return Trainer(model=model, args=config, train_dataset=data, callbacks=callbacks)


TRAINERS: dict[str, Callable[..., Any]] = {"trl": trl_trainer, "transformers": plain_trainer}


def tuned(plan: Plan) -> PeftModel:
    model = install(load_model(MODEL), plan)
    assert isinstance(model, PeftModel)
    return model


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


def here(backends: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some back-ends that are installed."""
    return {name: said for name, said in backends.items() if DEEPSPEED or not name.startswith("zero")}


def every(backends: Iterable[str]) -> list[Any]:
    """Parameters of a test, those skipped that are not installed."""
    missing = pytest.mark.skipif(not DEEPSPEED, reason="pip install deepspeed==0.19.8 hjson py-cpuinfo")
    return [pytest.param(name, marks=missing) if name.startswith("zero") else name for name in backends]
