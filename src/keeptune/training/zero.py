"""DeepSpeed's ZeRO-1 and ZeRO-2: what is not exact under it is refused."""

from pathlib import Path
from typing import Any

from keeptune.core.errors import TrainError

_OTHERS = "Use DDP, or FSDP2 where the model does not fit one device."
_FLOATS = "Set `train: {bf16: false}` (a base of 16 bits then computes in its own dtype), or use DDP or FSDP2."
_AS_BEFORE = "Go on as it was written, or remove the folder; with DDP or FSDP2 the number of processes may change."


def refuse_zero(config: Any) -> None:
    """Refuses what is not exact under DeepSpeed, by a trainer's config and the launcher's environment alone.

    Raises:
        TrainError: The stage is neither 1 nor 2, or something is offloaded or rounded.
    """
    plugin = config.deepspeed_plugin
    if plugin is None:
        return
    asked, stage = plugin.hf_ds_config, plugin.zero_stage
    kinds = ("bf16", "fp16", "torch_autocast")
    rounds = [kind for kind in kinds if getattr(config, kind, False) or asked.get_value(f"{kind}.enabled") is True]
    for refused, got, wanted, next_step in (
        (stage not in (1, 2), f"ZeRO-{stage}", "ZeRO-1 or 2, whose processes hold the trained factors", _OTHERS),
        (asked.is_offload(), "an optimiser or weights that are offloaded", "both on the device", _OTHERS),
        (rounds, f"{' and '.join(rounds)}, for which DeepSpeed rounds the trained factors", "float32", _FLOATS),
    ):
        if refused:
            raise TrainError("DeepSpeed", got=got, wanted=wanted, next_step=next_step)


def refuse_other_states(trainer: Any, checkpoint: Path) -> None:
    """Refuses (TrainError) a checkpoint whose states of Adam a trainer would not find, and would start anew."""
    written = len([*checkpoint.glob("global_step*/*_optim_states.pt")])  # one of each process
    here = trainer.args.world_size if trainer.is_deepspeed_enabled else 0
    if written != here:
        got, wanted = (
            f"{number} process{'es' * (number > 1)} with ZeRO" if number else "no ZeRO" for number in (written, here)
        )
        raise TrainError(f"checkpoint {checkpoint}", got=got, wanted=wanted, next_step=_AS_BEFORE)
