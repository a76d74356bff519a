"""The trained change as a LoRA for the untouched base, in the files that stock PEFT reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from keeptune.adapter.install import trained_state
from keeptune.adapter.trained_head import head_names, task_type, trained_head
from keeptune.core.artefact import write_tensors
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan

__all__ = ["SERVED_RANKS", "biases_of", "change_of", "magnitudes_of", "truncated_changes", "write_lora", "written_rank"]

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM accepts


def change_of(model: PeftModel, plan: Plan) -> dict[str, LowRank]:
    """Compute each target's change relative to the original base: ``s (B diag A - B0 A0)``, exactly.

    Args:
        model: The trained model.
        plan: Its plan.

    Returns:
        Target name to change, scale and diagonal folded into B; rank r, or 2 r where a part of W was taken out
        and both factors were trained. For DoRA, the change of the direction, before rows get their lengths.
    """
    state, changes = trained_state(model, plan), {}
    for target_plan in plan.targets:
        name = target_plan.target.name
        B = state[f"{name}.B"] * state[f"{name}.diag"] if "diag" in target_plan.vectors else state[f"{name}.B"]
        factors = LowRank(B=B, A=state[f"{name}.A"])
        change = factors.minus(target_plan.anchor) if target_plan.anchored else factors
        changes[name] = change.scaled(target_plan.scale)
    return changes


def magnitudes_of(model: PeftModel, plan: Plan) -> dict[str, Tensor]:
    """Read the trained lengths of the weights' rows (DoRA).

    Args:
        model: The trained model.
        plan: Its plan.

    Returns:
        Target name to ``(m,)``; empty for a plan without them.
    """
    state = trained_state(model, plan)
    names = [t.target.name for t in plan.targets if "magnitude" in t.vectors]
    return {name: state[f"{name}.magnitude"] for name in names}


def biases_of(model: PeftModel, plan: Plan) -> dict[str, Tensor]:
    """Read the change of the biases (LoKI).

    Args:
        model: The trained model.
        plan: Its plan.

    Returns:
        Target name to ``(m,)``, with the scale; empty for a plan without them.
    """
    state = trained_state(model, plan)
    return {t.target.name: t.scale * state[f"{t.target.name}.bias"] for t in plan.targets if "bias" in t.vectors}


def written_rank(plan: Plan) -> int:
    """Say which rank the change of a plan has as a LoRA for the untouched base, as :func:`change_of` gives it.

    Args:
        plan: The plan.

    Returns:
        The largest rank of a target.
    """
    ranks = [0]
    for t in plan.targets:
        shared = not t.anchored or (t.removed is None and not {"A", "B"} <= t.trainable)
        ranks.append(t.decision.rank + (0 if shared else t.anchor.rank))
    return max(ranks)


def truncated_changes(changes: Mapping[str, LowRank], rank: int) -> tuple[dict[str, LowRank], float]:
    """Take the nearest change of a smaller rank at each target, by an SVD of the change.

    Laws: no other changes of that rank are nearer; at the rank of the changes or above the error is 0 to rounding.

    Args:
        changes: Target name to change.
        rank: The largest rank wanted.

    Returns:
        The changes, and their error: ``sqrt(sum ‖Δ - Δ_r‖² / sum ‖Δ‖²)`` over all targets.
    """
    found, lost, whole = {}, 0.0, 0.0
    for name, change in changes.items():
        exact = change.to(torch.float64)
        near = exact.truncated(rank)
        found[name] = near.to(torch.float32)
        lost += float(exact.minus(near).norm_squared().clamp_min(0))
        whole += float(exact.norm_squared())
    return found, (lost / whole) ** 0.5 if whole else 0.0


def write_lora(
    model: PeftModel, plan: Plan, changes: Mapping[str, LowRank], folder: Path, base: str, *, portable: bool
) -> int:
    """Write an adapter's config and tensors.

    Args:
        model: The trained model.
        plan: Its plan.
        changes: Each target's change, from :func:`change_of`.
        folder: Where.
        base: Path or hub id of the base, written into the config.
        portable: Pad to one rank that servers allow; else each target keeps its own.

    Returns:
        The adapter's rank.
    """
    magnitudes, biases = magnitudes_of(model, plan), biases_of(model, plan)
    rank = max(change.rank for change in changes.values())
    if portable:
        rank = next((r for r in SERVED_RANKS if r >= rank), rank)
        changes = {name: change.padded(rank) for name, change in changes.items()}
    ranks = {name: change.rank for name, change in changes.items() if change.rank != rank}
    config = LoraConfig(
        task_type=task_type(plan),
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(changes),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=plan.targets[0].target.transposed,
        use_dora=bool(magnitudes),
        lora_bias=bool(biases),
        modules_to_save=list(head_names(plan)) or None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}.lora_magnitude_vector.weight": value for name, value in magnitudes.items()}
    tensors |= {f"base_model.model.{name}": value for name, value in trained_head(model, plan).items()}
    for name, change in changes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = change.A
        tensors[f"base_model.model.{name}.lora_B.weight"] = change.B
        if biases:  # PEFT then has one at every target
            none = torch.zeros(plan[name].target.out_features)
            tensors[f"base_model.model.{name}.lora_B.bias"] = biases.get(name, none)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return rank
