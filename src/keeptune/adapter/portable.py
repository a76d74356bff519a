"""The trained change as a LoRA for the untouched base, in the files that stock PEFT reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel

from keeptune.adapter.install import trained_factors
from keeptune.core.artefact import write_tensors
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan

__all__ = ["change_of", "write_lora"]

_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM accepts


def change_of(model: PeftModel, plan: Plan) -> dict[str, LowRank]:
    """Compute each target's change relative to the original base: ``s (B A - B0 A0)``, exactly.

    Args:
        model: The trained model.
        plan: Its plan.

    Returns:
        Target name to change, scale folded into B; rank r, or 2 r where the start was a part of W and both
        factors were trained.
    """
    changes = {}
    for name, factors in trained_factors(model, plan).items():
        target_plan = plan[name]
        change = factors.minus(target_plan.anchor) if target_plan.anchored else factors
        changes[name] = change.scaled(target_plan.scale)
    return changes


def write_lora(changes: Mapping[str, LowRank], plan: Plan, folder: Path, base: str, *, portable: bool) -> int:
    """Write an adapter's config and tensors.

    Args:
        changes: From :func:`change_of`.
        plan: The plan.
        folder: Where.
        base: Path or hub id of the base, written into the config.
        portable: Pad to one rank that servers allow; else each target keeps its own.

    Returns:
        The adapter's rank.
    """
    rank = max(change.rank for change in changes.values())
    if portable:
        rank = next((r for r in _SERVED_RANKS if r >= rank), rank)
        changes = {name: change.padded(rank) for name, change in changes.items()}
    ranks = {name: change.rank for name, change in changes.items() if change.rank != rank}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(changes),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=plan.targets[0].target.transposed,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, change in changes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = change.A
        tensors[f"base_model.model.{name}.lora_B.weight"] = change.B
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return rank
