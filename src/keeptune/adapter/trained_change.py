"""The trained change relative to the untouched base: as tensors, in a base's weights, as a LoRA that PEFT reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.adapter.expert_layers import saved_factors, saved_names
from keeptune.adapter.install import trained_state
from keeptune.adapter.trained_head import head_edits, head_names, task_type, tied_head, token_rows, trained_head
from keeptune.adapter.vllm_rules import SERVED_RANKS
from keeptune.core.artefact import write_tensors
from keeptune.core.low_rank import LowRank
from keeptune.core.offload import edit_values
from keeptune.core.plan import Plan
from keeptune.core.target import Target


@dataclass(frozen=True, slots=True, eq=False)
class TrainedChange:
    """A trained change, float32 on the CPU.

    Args:
        weights: Target name to ``s (B A - B0 A0)``, the scale folded into B; of rank r, or 2 r where a part of
            W was taken out and both factors were trained. For DoRA, before rows get their lengths.
        magnitudes: Target name to the lengths of W's rows, ``(m,)`` (DoRA).
        biases: Target name to the change of b, ``(m,)``, with the scale (LoKI).
        head: Name to parameter or buffer of what is trained beside: a classifier's head, modules, rows of tokens.
    """

    weights: Mapping[str, LowRank] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)


def change_of(model: PeftModel, plan: Plan) -> TrainedChange:
    """Computes the change that was trained, exactly."""
    state, weights = trained_state(model, plan), {}
    for t in plan.targets:
        name = t.target.name
        factors = LowRank(B=state[f"{name}.B"], A=state[f"{name}.A"])
        weights[name] = (factors.minus(t.init) if t.anchored else factors).scaled(t.scale)
    return TrainedChange(
        weights,
        {t.target.name: state[f"{t.target.name}.magnitude"] for t in plan.targets if "magnitude" in t.vectors},
        {t.target.name: t.scale * state[f"{t.target.name}.bias"] for t in plan.targets if "bias" in t.vectors},
        trained_head(model, plan) | tied_head(model, plan),
    )


def written_rank(plan: Plan) -> int:
    """Returns the largest rank of a target's change in :func:`change_of`."""
    both = {"A", "B"}
    return max((t.decision.rank * (2 if t.anchored and both <= t.trainable else 1) for t in plan.targets), default=0)


def truncated_changes(change: TrainedChange, rank: int) -> tuple[TrainedChange, float]:
    """Returns the nearest change of a smaller rank at each target, by an SVD, and its relative error.

    The error is ``sqrt(sum ‖Δ - Δ_r‖² / sum ‖Δ‖²)`` over all targets.
    Laws: no other changes of that rank are nearer; at the rank of the changes or above the error is 0 to rounding.
    """
    weights, lost, whole = {}, 0.0, 0.0
    for name, part in change.weights.items():
        exact = part.to(torch.float64)
        near = exact.truncated(rank)
        weights[name] = near.to(torch.float32)
        lost += float(exact.minus(near).norm_squared().clamp_min(0))
        whole += float(exact.norm_squared())
    return replace(change, weights=weights), (lost / whole) ** 0.5 if whole else 0.0


def put_change(base: PreTrainedModel, change: TrainedChange, plan: Plan) -> None:
    """Writes a trained change into the weights of a freshly loaded base, in memory or on disk (``edit_values``)."""
    edits: dict[str, list[Callable[[Tensor], object]]] = {}
    for t in plan.targets:
        edits.setdefault(t.target.parameter, []).append(partial(_add, t.target, change))
        if t.target.name in change.biases:
            edits[f"{t.target.name}.bias"] = [partial(_add_bias, change.biases[t.target.name])]
    for key, edit in head_edits(base, plan, change.head).items():
        edits.setdefault(key, []).append(edit)
    edit_values(base, edits)


def _add(target: Target, change: TrainedChange, stored: Tensor) -> None:
    weight, name = target.view(stored), target.name
    tuned = weight.float() + change.weights[name].dense().to(weight.device)
    if name in change.magnitudes:
        tuned *= (change.magnitudes[name].to(weight.device) / tuned.norm(dim=1))[:, None]
    weight.copy_(tuned.to(weight.dtype))


def _add_bias(added: Tensor, stored: Tensor) -> None:
    stored.copy_((stored.float() + added.to(stored.device)).to(stored.dtype))


def hold_change(base: PreTrainedModel, change: TrainedChange) -> None:
    """Adds a change of low rank to what the targets of a base compute, which may be quantised: its weights stay."""

    def add(factors: LowRank, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        here = factors.to(torch.float32, output.device)
        return output + (inputs[0].float() @ here.A.T @ here.B.T).to(output.dtype)

    for name, part in change.weights.items():
        base.get_submodule(name).register_forward_hook(partial(add, part))


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
    plain = {name: part for name, part in weights.items() if plan[name].target.expert is None}
    layers = {name: (part.rank, part.A, part.B) for name, part in plain.items()}
    layers |= {parameter: saved_factors(own, weights) for parameter, own in plan.experts.items()}
    ranks = {name: r for name, (r, _, _) in layers.items() if r != rank}
    config = LoraConfig(
        task_type=task_type(plan),
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=rank,
        target_modules=[],
        target_parameters=sorted(plan.experts) or None,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=any(t.target.transposed for t in plan.targets if t.target.expert is None),
        use_dora=bool(change.magnitudes),
        lora_bias=bool(change.biases),
        modules_to_save=list(head_names(plan)) or None,
        trainable_token_indices=dict(token_rows(plan)) or None,
        ensure_weight_tying=bool(plan.peft.get("ensure_weight_tying")),
        inference_mode=True,
    )
    config.target_modules = sorted(layers.keys() - plan.experts.keys())  # a set, to PEFT, whose order no seed decides
    config.save_pretrained(str(folder))
    tensors = {f"{name}.lora_magnitude_vector.weight": value for name, value in change.magnitudes.items()}
    tensors |= change.head
    saved_as = saved_names(plan.experts)
    for name, (_, A, B) in layers.items():
        tensors |= {f"{saved_as.get(name, name)}.lora_A.weight": A, f"{saved_as.get(name, name)}.lora_B.weight": B}
        if change.biases:  # PEFT then has one at every target
            none = torch.zeros(plan[name].target.out_features)
            tensors[f"{name}.lora_B.bias"] = change.biases.get(name, none)
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    write_tensors(folder / "adapter_model.safetensors", named, {"format": "pt"})
    return rank
