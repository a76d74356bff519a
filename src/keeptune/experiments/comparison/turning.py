"""What a knob does to weights: to an adapter's tensors, and to a whole model; ``knobs.py`` has the equations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from keeptune.core.errors import ModelError
from keeptune.experiments.comparison.knobs import Intruders, Knob, Layers, Scale

__all__ = ["interpolate", "put_adapter", "refusal", "turned_adapter"]

_DEFAULT, _REDUCED = "default", "intruders_reduced"


def refusal(knob: Knob, tensors: Mapping[str, Tensor] | None, config: Any = None) -> str:
    """Say why a knob cannot be turned on a result.

    Args:
        knob: The knob.
        tensors: The adapter's; None for a whole model.
        config: The adapter's.

    Returns:
        The reason; empty where it can.
    """
    if tensors is None:
        return "PEFT reduces intruder dimensions of LoRA adapters, not of whole models" if _reduces(knob) else ""
    if any("lora_magnitude_vector" in name for name in tensors):
        return "a DoRA adapter sets the lengths of rows, which no factor on its change takes back; export it merged"
    if _reduces(knob) and not all("lora_" in name for name in tensors):
        return "PEFT's reduction of intruder dimensions draws a trained head anew"
    if _reduces(knob) and any(name.endswith("lora_B.bias") for name in tensors):
        return "PEFT's reduction of intruder dimensions drops an adapter's biases"
    # W and B A are then (in, out), and PEFT would write their left factor, (in, r), into B, (out, r).
    if _reduces(knob) and config.fan_in_fan_out:
        return "PEFT's reduction of intruder dimensions cannot read transposed weights (Conv1D)"
    return ""


def _is_left(name: str) -> bool:
    """Tell B and its bias, which hold the factor of a change, from A and from what is no change."""
    return "lora_B" in name or "lora_embedding_B" in name


def _reduces(knob: Knob) -> bool:
    return isinstance(knob, Intruders)


def turned_adapter(wrapped: PeftModel, tensors: Mapping[str, Tensor], knob: Knob) -> dict[str, Tensor]:
    """Compute an adapter's tensors with a knob turned.

    Law: with a scale s the adapter's change is s times what it was; with 1, or where nothing intrudes, it is the same.

    Args:
        wrapped: The base with the adapter; it is left as it is found.
        tensors: The adapter's, as its file has them.
        knob: The knob.

    Returns:
        New tensors under the same names.

    Raises:
        ModelError: The knob cannot be turned on this adapter.
    """
    why = refusal(knob, tensors, wrapped.peft_config[_DEFAULT])
    if why:
        raise ModelError(
            f"knob {knob.slug}", got=why, wanted="a result that it can be turned on", next_step="Leave the knob out."
        )
    if isinstance(knob, Intruders):
        return _reduced(wrapped, tensors, knob.keep)
    assert isinstance(knob, Scale | Layers)
    return {name: value * knob.factor_of(name) if _is_left(name) else value.clone() for name, value in tensors.items()}


def _reduced(wrapped: PeftModel, tensors: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    put_adapter(wrapped, tensors)
    with torch.random.fork_rng(devices=[]):  # PEFT draws the new adapter before it fills it
        reduce_intruder_dimension(wrapped, _DEFAULT, _REDUCED, mitigation_lambda=keep, logging_sink=None)
    try:
        found = get_peft_model_state_dict(wrapped, adapter_name=_REDUCED)
        return {name: found[name].detach().cpu().clone() for name in tensors}
    finally:
        wrapped.set_adapter(_DEFAULT)
        wrapped.delete_adapter(_REDUCED)


def put_adapter(wrapped: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the adapter of a model.

    Args:
        wrapped: The model.
        tensors: As the adapter's file has them.

    Raises:
        ModelError: They do not fit.
    """
    loaded = set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=_DEFAULT)
    if loaded.unexpected_keys:
        raise ModelError(
            "adapter",
            got=f"weights that the model does not have: {', '.join(loaded.unexpected_keys[:3])}",
            wanted="the adapter's own",
            next_step="Load the adapter on its own base.",
        )


def interpolate(
    model: nn.Module, base: nn.Module, tuned: Mapping[str, Tensor], knob: Scale | Layers, whole: Collection[str] = ()
) -> None:
    """Set a model's weights between the base's and the tuned ones, eq. 1, computed in float32 at least.

    Laws: 0 gives the base's weights, and 1 the tuned ones, bit for bit.

    Args:
        model: The model to change; of the architecture of both.
        base: The base.
        tuned: The tuned weights by name.
        knob: The factors.
        whole: Modules that the base does not have, such as a drawn head: they stay as tuned.
    """
    heads = tuple(f"{name}." for name in whole)
    with torch.no_grad():
        for (name, weight), (_, start) in zip(model.named_parameters(), base.named_parameters(), strict=True):
            end = tuned[name].to(weight.device)
            factor = 1.0 if name.startswith(heads) else knob.factor_of(name)
            exact = torch.promote_types(weight.dtype, torch.float32)
            # lerp is exact at both ends.
            weight.copy_(torch.lerp(start.to(exact), end.to(exact), factor))
