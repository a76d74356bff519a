"""One process of several that train together; test_distributed.py starts them and compares what they leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from tests.training.support import TOKENIZER, TRAINERS, here, tuned
from torch import Tensor
from torch.distributed.tensor import DTensor

from keeptune.adapter.install import trained_state
from keeptune.core.plan import Plan
from keeptune.hosts.callback import Callback
from keeptune.methods.keep import Keep
from keeptune.training.attach import attach

__all__ = ["BACKENDS", "answers", "callbacks", "interrupted", "main", "rows", "scenarios", "trained"]

EXAMPLES = 8  # all of them are in each step, so that the order does not matter
Found = dict[str, Tensor]


def _zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration, as accelerate writes it."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(auto, "auto") | {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}


# accelerate shards on accelerators only; FSDP2 itself asks for none, so that it is told of one that is not there.
BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}, "accelerator_config": {"use_configured_state": True}},
    "zero1": {"deepspeed": _zero(1)},
    "zero2": {"deepspeed": _zero(2)},
}


def scenarios(processes: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, trainer, arguments: with and without accumulation and clipping."""
    for trainer, pieces, clip in [("trl", 1, 0.0), ("trl", 2, 0.5), ("transformers", 2, 0.0)]:
        yield (
            f"{trainer}, {pieces} micro-batches, clipped at {clip}",
            trainer,
            {
                "per_device_train_batch_size": EXAMPLES // processes // pieces,
                "gradient_accumulation_steps": pieces,
                "max_grad_norm": clip,
            },
        )


def trained(
    plan: Plan,
    trainer: str,
    folder: Path,
    *,
    penalised: bool = True,
    resume: Path | None = None,
    loss: str = "nll",
    callback: Callback | None = None,
    **extra: Any,
) -> Found:
    """Train, with a plan attached or by a callback; the state at the end and what was logged."""
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate sets it, and leaves it to the next
    if extra.get("fsdp"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = tuned(plan)
    made = TRAINERS[trainer](model, folder, **extra)
    if callback is not None:
        made.add_callback(callback)
        made.processing_class = TOKENIZER
    elif penalised:
        attach(made, plan, loss)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert (type(made.model_wrapped).__name__ == "DeepSpeedEngine") == ("deepspeed" in extra)
    rows = [row for row in made.state.log_history if "loss" in row]
    logged = [key for key in rows[0] if key.startswith(("penalty", "drift", "grad_norm", "nll"))]
    log = {f"log {key}": torch.tensor([row[key] for row in rows]) for key in logged}
    shards = torch.tensor(sum(isinstance(parameter.data, DTensor) for parameter in model.parameters()))
    return trained_state(model, plan) | log | {"shards": shards}


def interrupted(plan: Plan, folder: Path, processes: int, **extra: Any) -> dict[str, Found]:
    """Three steps of Adam in one go; and a stop after two, and the third."""
    extra |= {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    extra |= {"per_device_train_batch_size": EXAMPLES // processes}
    whole = trained(plan, "transformers", folder, **extra)
    return {"whole": whole, "resumed": trained(plan, "transformers", folder, resume=folder / "checkpoint-2", **extra)}


def answers(processes: int) -> dict[str, Any]:
    """Arguments of a training that is long enough for answers to change."""
    return {"per_device_train_batch_size": EXAMPLES // processes // 2, "gradient_accumulation_steps": 2, "max_steps": 3}


def rows(processes: int) -> dict[str, Any]:
    """Arguments of a training with momentum and weight decay."""
    return answers(processes) | {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}


def callbacks(plan: Plan) -> dict[str, Callback]:
    """Callbacks that are added late: with a plan, and with knowledge, for a plain LoRA that is adopted."""
    texts = [f"Once upon a time there were {n} little birds.{' They sang.' * (n % 3)}" for n in range(16)]
    return {"given": Callback(plan=plan), "adopted": Callback(method=Keep(nats=0.001, every=1), knowledge=texts)}


def main(folder: str) -> None:
    """Run every scenario under every back-end; the first process writes what it has."""
    out = Path(folder)
    plan = Plan.load(out / "plan")
    state = PartialState(cpu=True)
    for backend, sharding in here(BACKENDS).items():
        found = {
            name: trained(plan, trainer, out / "unused", **extra, **sharding)
            for name, trainer, extra in scenarios(state.num_processes)
        } | interrupted(plan, out / backend, state.num_processes, **sharding)
        for name in ("rows", *(["off"] if "deepspeed" not in sharding else [])):
            own, arguments = Plan.load(out / name), rows(state.num_processes)
            found[name] = trained(own, "transformers", out / "unused", **arguments, **sharding)
        for name, one in callbacks(plan).items() if "deepspeed" not in sharding else ():
            if name == "given" or not sharding:  # no plan can be made of shards
                own, folder = (plan if name == "given" else Plan.load(out / name)), out / f"{backend} {name}"
                found[name] = trained(
                    own, "transformers", folder, callback=one, **rows(state.num_processes), **sharding
                )
        if not sharding:
            found |= {loss: trained(plan, "trl", out / "unused", loss=loss, **answers(2)) for loss in ("eaft", "asft")}
        if state.is_main_process:
            flat = {f"{name}|{key}": value for name, states in found.items() for key, value in states.items()}
            save_file(flat, out / f"{backend}.safetensors")
    state.destroy_process_group()
