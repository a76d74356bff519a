"""LoRA-FA: freeze the down-projection, train the up-projection only.

Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023.

    y = W x + (alpha / r) B A x,   A random and frozen, B = 0 at the start           (1)

Trained with AdamW, as the papers that compare with it do, the change stays in the row
space that A spans from the start.
"""

from dataclasses import dataclass

from keeptune.methods.lora import Lora


@dataclass(frozen=True)
class LoraFA(Lora):
    """LoRA with a frozen A."""

    name = "lora-fa"
    paper = "Zhang et al., LoRA-FA, 2023"
    trains = frozenset({"B"})
