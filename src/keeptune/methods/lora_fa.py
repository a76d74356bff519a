"""LoRA-FA: freeze the down-projection, train the up-projection only.

Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023.

    y = W x + (alpha / r) B A x,   A random and frozen, B = 0 at the start           (1)
    g_B <- (r / alpha)^2 g_B (A Aᵀ)⁻¹                                                (2)

With (1) alone and AdamW, as the papers that compare with it do, the change stays in the row space that A
spans from the start. (2) is what PEFT's ``create_lorafa_optimizer`` does before its Adam: the step of B whose
``s B A`` comes nearest to the step that full fine-tuning would take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from keeptune.methods.lora import Lora


@dataclass(frozen=True)
class LoraFA(Lora):
    """LoRA with a frozen A.

    Args:
        optimizer: ``"adamw"``, or ``"preconditioned"`` for PEFT's, with eq. 2.
    """

    name = "lora-fa"
    paper = "Zhang et al., LoRA-FA, 2023"
    trains = frozenset({"B"})

    optimizer: Literal["adamw", "preconditioned"] = "adamw"

    def training(self) -> Mapping[str, Any]:
        """Returns PEFT's optimiser where it is wanted (eq. 2)."""
        return {"optimizer": "lora-fa"} if self.optimizer == "preconditioned" else {}
