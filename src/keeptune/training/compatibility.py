"""Trainers that cannot count a penalty exactly once are refused, before anything is trained."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType

from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.penalties.base import OutputPenalty, penalty_named

__all__ = ["refuse_trainer"]

# Optimisers that change weights inside the backward pass leave no gradient to add to.
_STEP_IN_BACKWARD = ("lomo", "layerwise")
_KNOWN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
}


def refuse_trainer(trainer: Any, plan: Plan) -> None:
    """Refuse what cannot count a penalty exactly once.

    Args:
        trainer: The trainer.
        plan: A plan with penalties.

    Raises:
        TrainError: The back-end, the optimiser or the method is such.
    """
    where = f"penalties {', '.join(penalty.name for penalty in plan.penalties)}"
    if plan.scope != "adapter":
        raise TrainError(
            where,
            got=f"the method {plan.method}, which changes whole weights",
            wanted="a method that trains low-rank factors",
            next_step="Leave `penalties` out, or take another method.",
        )
    kind = trainer.accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise TrainError(
            where,
            got="DeepSpeed, whose engine steps inside the backward pass and keeps the gradients to itself",
            wanted="a single process, DDP or FSDP2",
            next_step="Use FSDP2 (`fsdp_version: 2`) where the model does not fit one device.",
        )
    sharding = trainer.accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
    if sharding is not None and sharding.fsdp_version != 2:
        raise TrainError(
            where,
            got="FSDP 1, which flattens the factors of several modules into one tensor",
            wanted="FSDP2",
            next_step="Set `fsdp_version: 2` in the config of accelerate.",
        )
    outputs = [p.name for p in plan.penalties if isinstance(penalty_named(p.name, p.options), OutputPenalty)]
    if sharding is not None and outputs:
        raise TrainError(
            f"penalty {outputs[0]}",
            got="FSDP, where a second pass through the model would gather and free its weights amid the trainer's own",
            wanted="a single process or DDP",
            next_step="Take a penalty on the weight change: laplace with delta-kfac is the second order of this one.",
        )
    if kind not in _KNOWN:
        raise TrainError(
            where,
            got=f"the back-end {kind.value}",
            wanted="a single process, DDP or FSDP2",
            next_step="Train with one of these.",
        )
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if any(part in optimizer for part in _STEP_IN_BACKWARD):
        raise TrainError(
            where,
            got=f"the optimiser {optimizer}, which changes weights inside the backward pass",
            wanted="one that steps after it",
            next_step="Set train.optim to adamw_torch.",
        )
