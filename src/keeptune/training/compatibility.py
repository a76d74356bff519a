"""Trainers that cannot count a penalty exactly once are refused, before anything is trained."""

from typing import Any

from accelerate.utils import DistributedType

from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan

# Optimisers that change weights inside the backward pass leave no gradient to add to.
_STEP_IN_BACKWARD = ("lomo", "layerwise")
_BACK_ENDS = "a single process, DDP, FSDP2 or ZeRO-1/2"
_KNOWN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,  # refuse_zero has seen its stage
}


def refuse_trainer(trainer: Any, plan: Plan) -> None:
    """Raises TrainError for a back-end, an optimiser or a method that cannot count a penalty exactly once."""
    names = ", ".join(penalty.name for penalty in plan.penalties)
    where = f"penalties {names}" if names else f"method {plan.method}"
    kind = trainer.accelerator.distributed_type
    sharding = trainer.accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    for refused, got, wanted, next_step in (
        (
            plan.scope != "adapter",
            f"the method {plan.method}, which changes whole weights",
            "a method that trains low-rank factors",
            "Leave `penalties` out, or take another method.",
        ),
        (
            sharding is not None and sharding.fsdp_version != 2,
            "FSDP 1, which flattens the factors of several modules into one tensor",
            "FSDP2",
            "Set `fsdp_version: 2` in the config of accelerate.",
        ),
        (
            kind == DistributedType.DEEPSPEED and "kept_directions" in plan.training,
            "DeepSpeed, whose optimiser holds the factors and their gradients in a form of its own",
            "a single process, DDP or FSDP2",
            "Train with one of these.",
        ),
        (kind not in _KNOWN, f"the back-end {kind.value}", _BACK_ENDS, "Train with one of these."),
        (
            any(part in optimizer for part in _STEP_IN_BACKWARD),
            f"the optimiser {optimizer}, which changes weights inside the backward pass",
            "one that steps after it",
            "Set train.optim to adamw_torch.",
        ),
    ):
        if refused:
            raise TrainError(where, got=got, wanted=wanted, next_step=next_step)
