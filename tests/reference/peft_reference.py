"""What PEFT's own initialisations make of one weight, by wrapping one ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from keeptune.core.low_rank import LowRank


class OneLinear(nn.Module):
    """A model with a single weight ``(m, n)``."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.up = nn.Linear(W.shape[1], W.shape[0], bias=False)
        with torch.no_grad():
            self.up.weight.copy_(W)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x)
        return out


def start(W: Tensor, init: str, r: int, alpha: float, **options: Any) -> tuple[LowRank, Tensor, float]:
    """PEFT's factors, what it leaves of W, and its scale."""
    return start_of(OneLinear(W), init, r, alpha, **options)


def start_of(model: OneLinear, init: str, r: int, alpha: float, **options: Any) -> tuple[LowRank, Tensor, float]:
    """The same for a model that PEFT has prepared already."""
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["up"], init_lora_weights=init, **options)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # PEFT's randomised SVDs draw from the global state
        layer = get_peft_model(model, config).base_model.model.up  # type: ignore[arg-type]
    factors = LowRank(B=layer.lora_B["default"].weight.detach(), A=layer.lora_A["default"].weight.detach())
    return factors, layer.get_base_layer().weight.detach(), layer.scaling["default"]


def signed_like(found: LowRank, wanted: LowRank) -> LowRank:
    """The same factors with the signs of another's rows of A; B A is unchanged."""
    signs = (found.A * wanted.A).sum(1).sign()
    return LowRank(B=found.B * signs, A=found.A * signs[:, None])
