"""Post-hoc variants of a finished run that need no training: its change scaled, and PEFT's intruder reduction.

With W0 the base's weights and W1 the tuned ones, s in [0, 1],

    W_s = W0 + s (W1 - W0)                                                                                (1)

is the interpolation of WiSE-FT (Wortsman et al., CVPR 2022). For a LoRA, W1 - W0 = (alpha / r) B A, so that s is folded
into B; the base stays as it is.

Intruder dimensions are singular vectors u_i of W1 that resemble none of W0 (Shuttleworth et al., arXiv 2410.21228):

    W = W1 + (k - 1) sum_i sigma_i u_i v_i^T,     i among the first 10 with max_j |u_i . u0_j| < 0.5       (2)

by ``peft.tuners.lora.intruders``, whose ``mitigation_lambda`` is k: 1 leaves the adapter as it is and 0 takes intruders
out whole, as in the paper and in PEFT's code; its docstring has it the other way round. What is left is cut to the
adapter's rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from keeptune.core.errors import ModelError, RecipeError
from keeptune.core.weights import is_quantised

_DEFAULT, _REDUCED = "default", "intruders_reduced"
_FAMILIES = {"scale": "scaled", "intruders": "intruders reduced"}


@dataclass(frozen=True, slots=True)
class Variant:
    """A post-hoc variant; RecipeError where the kind is unknown or the value is not from 0 to 1.

    Args:
        kind: ``"scale"``: the whole change times ``value`` (eq. 1); ``"intruders"``: of each intruder dimension the
            share ``value`` stays (eq. 2). With 1 both leave the result as it is.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.kind not in _FAMILIES or not 0 <= self.value <= 1:  # NaN is not
            wanted = f"{' or '.join(_FAMILIES)}, from 0 to 1"
            raise RecipeError("variant", got=f"{self.kind} {self.value}", wanted=wanted, next_step="Correct it.")

    @property
    def slug(self) -> str:
        """Its name as a folder, in as many digits as separate it from every other value."""
        return f"{self.kind}-{repr(float(self.value)).removesuffix('.0')}"

    @property
    def family(self) -> str:
        """What is added to the label of the runs that it is a variant of."""
        return _FAMILIES[self.kind]

    def plain(self) -> dict[str, Any]:
        """It as JSON: ``{kind: value}``."""
        return {self.kind: self.value}


def variant_of(plain: Mapping[str, Any]) -> Variant:
    """Reads a variant, such as ``{"scale": 0.5}``; raises RecipeError where it is none."""
    if len(plain) != 1:
        raise RecipeError("variant", got=repr(dict(plain)), wanted="one kind and its value", next_step="Correct it.")
    ((kind, value),) = plain.items()
    return Variant(kind, value)


def standard_variants(scales: Sequence[float], intruders: Sequence[float] = (0.5,)) -> list[Variant]:
    """Returns the variants of a comparison: factors of the whole change, and shares of intruders that stay."""
    return [
        *(Variant("scale", factor) for factor in scales if factor != 1),
        *(Variant("intruders", keep) for keep in intruders),
    ]


def refusal(variant: Variant, tensors: Mapping[str, Tensor] | None, config: Any = None) -> str:
    """Returns why a result, an adapter's tensors or a whole model (None), cannot have a variant; empty where it can."""
    reduces = variant.kind == "intruders"
    if tensors is None:
        return "PEFT reduces intruder dimensions of LoRA adapters, not of whole models" if reduces else ""
    if any("lora_magnitude_vector" in name for name in tensors):
        return "a DoRA adapter sets the lengths of rows, which no factor on its change takes back; export it merged"
    if getattr(config, "task_type", None) == "CAUSAL_LM" and not all("lora_" in name for name in tensors):
        return "modules or rows of tokens were trained in full beside the adapter's factors; export it merged"
    if reduces and not all("lora_" in name for name in tensors):
        return "PEFT's reduction of intruder dimensions draws a trained head anew"
    if reduces and any(name.endswith("lora_B.bias") for name in tensors):
        return "PEFT's reduction of intruder dimensions drops an adapter's biases"
    # W and B A are then (in, out), and PEFT would write their left factor, (in, r), into B, (out, r).
    if reduces and config.fan_in_fan_out:
        return "PEFT's reduction of intruder dimensions cannot read transposed weights (Conv1D)"
    return ""


def variant_adapter(wrapped: PeftModel, tensors: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """Computes the tensors of an adapter's variant, under the same names; ModelError where it cannot have it.

    Law: with a scale s the adapter's change is s times what it was; with 1, or where nothing intrudes, it is the same.
    ``wrapped`` is the base with the adapter, and has the adapter's ``tensors`` afterwards.
    """
    why = refusal(variant, tensors, wrapped.peft_config[_DEFAULT])
    if variant.kind == "intruders" and is_quantised(wrapped):
        why = "PEFT's reduction of intruder dimensions reads weights as they are packed"
    if why:
        raise ModelError(
            f"variant {variant.slug}", got=why, wanted="a result that can have it", next_step="Leave the variant out."
        )
    if variant.kind == "intruders":
        return _reduced(wrapped, tensors, variant.value)
    return {
        # B and its bias hold the factor of a change; A and what is no change stay.
        name: value * variant.value if "lora_B" in name or "lora_embedding_B" in name else value.clone()
        for name, value in tensors.items()
    }


def _reduced(wrapped: PeftModel, tensors: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    put_adapter(wrapped, tensors)
    with torch.random.fork_rng(devices=[]):  # PEFT draws the new adapter before it fills it
        reduce_intruder_dimension(wrapped, _DEFAULT, _REDUCED, mitigation_lambda=keep, logging_sink=None)
    try:
        reduced = get_peft_model_state_dict(wrapped, adapter_name=_REDUCED)
        return {name: reduced[name].detach().cpu().clone() for name in tensors}
    finally:
        wrapped.set_adapter(_DEFAULT)
        wrapped.delete_adapter(_REDUCED)


def put_adapter(wrapped: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors, as an adapter's file has them, into the adapter of a model; ModelError where they do not fit."""
    loaded = set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=_DEFAULT)
    if loaded.unexpected_keys:
        raise ModelError(
            "adapter",
            got=f"weights that the model does not have: {', '.join(loaded.unexpected_keys[:3])}",
            wanted="the adapter's own",
            next_step="Load the adapter on its own base.",
        )


def interpolate(
    model: nn.Module, base: nn.Module, tuned: Mapping[str, Tensor], factor: float, whole: Collection[str] = ()
) -> None:
    """Sets a model's weights between the base's and the ``tuned`` ones, eq. 1, computed in float32 at least.

    Laws: a factor of 0 gives the base's weights, and 1 the tuned ones, bit for bit. Modules in ``whole``, which the
    base does not have, such as a drawn head, stay as tuned.
    """
    heads = tuple(f"{name}." for name in whole)
    with torch.no_grad():
        for (name, weight), (_, start) in zip(model.named_parameters(), base.named_parameters(), strict=True):
            end = tuned[name].to(weight.device)
            own = 1.0 if name.startswith(heads) else factor
            exact = torch.promote_types(weight.dtype, torch.float32)
            # lerp is exact at both ends.
            weight.copy_(torch.lerp(start.to(exact), end.to(exact), own))
