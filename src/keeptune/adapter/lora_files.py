"""The trained change as a LoRA for the untouched base, in the files that stock PEFT reads."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig

from keeptune.adapter.trained_change import TrainedChange
from keeptune.adapter.trained_head import head_names, task_type
from keeptune.core.artefact import write_tensors
from keeptune.core.plan import Plan

__all__ = ["SERVED_RANKS", "write_lora"]

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM accepts


def write_lora(change: TrainedChange, plan: Plan, folder: Path, base: str, *, portable: bool) -> int:
    """Writes an adapter's config and tensors, and returns the adapter's rank.

    A portable one is padded to one rank that servers allow; else each target keeps its own. ``base`` is the path or hub
    id of the base, written into the config.
    """
    weights = change.weights
    rank = max(part.rank for part in weights.values())
    if portable:
        rank = next((r for r in SERVED_RANKS if r >= rank), rank)
        weights = {name: part.padded(rank) for name, part in weights.items()}
    ranks = {name: part.rank for name, part in weights.items() if part.rank != rank}
    config = LoraConfig(
        task_type=task_type(plan),
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(weights),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=plan.targets[0].target.transposed,
        use_dora=bool(change.magnitudes),
        lora_bias=bool(change.biases),
        modules_to_save=list(head_names(plan)) or None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {f"{name}.lora_magnitude_vector.weight": value for name, value in change.magnitudes.items()}
    tensors |= change.head
    for name, part in weights.items():
        tensors |= {f"{name}.lora_A.weight": part.A, f"{name}.lora_B.weight": part.B}
        if change.biases:  # PEFT then has one at every target
            none = torch.zeros(plan[name].target.out_features)
            tensors[f"{name}.lora_B.bias"] = change.biases.get(name, none)
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", named, {"format": "pt"})
    return rank
