"""Post-hoc variants of a finished run that need no training: its change, scaled.

With W0 the base's weights and W1 the tuned ones, s in [0, 1],

    W_s = W0 + s (W1 - W0)                                                                                (1)

is the interpolation of WiSE-FT (Wortsman et al., CVPR 2022). For a LoRA, W1 - W0 = (alpha / r) B A, so that s is folded
into B; the base stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from keeptune.core.errors import ModelError, RecipeError

_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Variant:
    """A post-hoc variant: the whole change times ``scale`` (eq. 1), from 0 to 1, which leaves the result as it is.

    Raises:
        RecipeError: The scale is out of range.
    """

    scale: float

    def __post_init__(self) -> None:
        """Checks the scale."""
        if not 0 <= self.scale <= 1:  # NaN is not
            raise RecipeError("variant", got=f"scale {self.scale}", wanted="0 to 1", next_step="Correct it.")

    @property
    def slug(self) -> str:
        """Its name as a folder, in as many digits as separate it from every other value."""
        return f"scale-{repr(float(self.scale)).removesuffix('.0')}"

    def plain(self) -> dict[str, Any]:
        """It as JSON: ``{"scale": 0.5}``."""
        return {"scale": self.scale}


def standard_variants(scales: Sequence[float]) -> list[Variant]:
    """Returns the variants of a comparison: factors of the whole change."""
    return [Variant(factor) for factor in scales if factor != 1]


def refusal(tensors: Mapping[str, Tensor], config: Any = None) -> str:
    """Returns why an adapter, of these tensors, cannot have a variant; empty where it can."""
    if any("lora_magnitude_vector" in name for name in tensors):
        return "a DoRA adapter sets the lengths of rows, which no factor on its change takes back; export it merged"
    if getattr(config, "task_type", None) == "CAUSAL_LM" and not all("lora_" in name for name in tensors):
        return "modules or rows of tokens were trained in full beside the adapter's factors; export it merged"
    return ""


def scaled_adapter(tensors: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """Computes the tensors of an adapter's variant, under the same names.

    Laws: with a scale s the adapter's change is s times what it was; with 1 it is the same.
    """
    return {
        # B and its bias hold the factor of a change; A and what is no change stay.
        name: value * variant.scale if "lora_B" in name or "lora_embedding_B" in name else value.clone()
        for name, value in tensors.items()
    }


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
