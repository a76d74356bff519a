"""What a launcher asks for by its environment: weights in shards, on any device, and what is refused of it."""

import os
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import PreTrainedModel

from keeptune.adapter.trained_head import head_names
from keeptune.core.errors import RecipeError
from keeptune.core.plan import Plan
from keeptune.core.processes import gathered, on_machine, world
from keeptune.model.blocks import blocks_of
from keeptune.model.pretrained import LoadOptions, load_model, load_places
from keeptune.training.losses.base import TaskLoss

_FSDP2 = "Launch it by `keeptune launch --sharding fsdp2` (in accelerate's configuration: `fsdp_version: 2`)."
_DDP = "Launch it by `keeptune launch --sharding multi_gpu`, or take another loss."
_PACKED = "Launch it by `keeptune launch --sharding multi_gpu`, or set `quantization: {load_in_4bit: true}`."
_ROWS = "Launch it by `keeptune launch --sharding multi_gpu`, or train the whole module (`modules_to_save`)."


def shard_anywhere(config: Any) -> None:
    """Has accelerate shard on the CPU too: it does so on accelerators only, of which FSDP2 itself needs none."""
    if (asks("FSDP") or config.fsdp) and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def shard_blocks(trainer: Any, plan: Plan) -> None:
    """Has FSDP2 shard by blocks, unless the launcher names other modules, and leaves PEFT's wrappers in memory.

    Encoders name their embeddings beside their blocks, and accelerate shards those by itself: twice, which fails.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin, model = trainer.accelerator.state.fsdp_plugin, trainer.model
    if plugin.transformer_cls_names_to_wrap is None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks_of(base)})
    if head_names(plan):  # on the meta device these cannot be tied again
        plugin.cpu_ram_efficient_loading = False


def refuse_launcher(
    task: str, examples: int, loss: TaskLoss | None, device_map: Any, rows: Any, *, shards: bool
) -> None:
    """Refuses what a launcher asks for and cannot be trained exactly, before anything is loaded.

    ``loss`` is None for nll; ``device_map`` the recipe's; ``rows`` the tokens whose rows are trained; ``shards`` says
    whether FSDP2 takes the base as it is quantised.

    Raises:
        RecipeError: It is refused, with the reason and what to do.
    """
    if world() == 1:
        return
    fsdp, judged = asks("FSDP"), task.endswith("preference")
    both = judged or (loss is not None and loss.reads != "log_probs")
    what = f"task.kind {task}" if judged else f"task.loss {loss and loss.name}"
    old = fsdp and os.environ.get("FSDP_VERSION", "1") != "2"
    apart = both and (fsdp or asks("DEEPSPEED"))
    for refused, got, next_step in (
        (old, "FSDP 1, which flattens the factors of several modules into one tensor", _FSDP2),
        (
            apart,
            f"{what} under {'FSDP2' if fsdp else 'DeepSpeed'}, which reads whole weights beside the trainer's pass",
            _DDP,
        ),
        (fsdp and rows, "`trainable_token_indices` under FSDP2: accelerate cannot shard PEFT's wrapper", _ROWS),
        (fsdp and not shards, "a base that is quantised otherwise than in four bits under FSDP2", _PACKED),
        (device_map is not None, f"`device_map` with {world()} processes", "Leave it out, or start one process."),
        (world() > examples, f"{world()} processes for {examples} examples", f"Start at most {examples}."),
    ):
        if refused:
            wanted = "what takes the steps of one process: DDP, FSDP2 or ZeRO-1 or 2 on whole examples"
            raise RecipeError("launcher", got=got, wanted=wanted, next_step=next_step)


def load_to_share(name: str, options: LoadOptions) -> PreTrainedModel:
    """Loads a base whose weights FSDP2 shares out, on the CPU: no device may have room for all of it.

    Where the launcher says so (``FSDP_CPU_RAM_EFFICIENT_LOADING``) the first process of a machine alone reads weights,
    and accelerate sends them to the others, whose own are not set.

    Raises:
        ModelError: As of ``load_model``.
    """
    source = replace(options, device="cpu")
    reads = on_machine()[0] == 0 or os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() != "true"
    model = load_model(name, source) if reads else None
    dtype = gathered(model and model.dtype)[0]
    if model is not None:
        return model
    assert dtype is not None  # the first process is the first of its machine
    return load_places(name, source, dtype)


def asks(engine: str) -> bool:
    """Returns whether the launcher asks for an engine of accelerate's: ``"FSDP"``, ``"DEEPSPEED"``."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
