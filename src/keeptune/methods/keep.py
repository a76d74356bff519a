"""keep: LoRA under a budget on what it loses of the base's answers. keeptune's own (docs/guides/keep.md).

    y = W x + s B A x                                        LoRA: A random, B = 0                    (1)
    min L_task   subject to   D <= nats                      by a controlled multiplier               (2)
    D = mean_i KL(p_base(. | x_<i) || p(. | x_<i))           nats per token, measured                 (3)

D is measured on a knowledge text or more at every k-th optimiser step, and at every step while the budget is overdrawn,
with its gradient (penalties/kl.py); the multiplier follows what is measured (penalties/budget.py). Without knowledge of
the user's the base writes the texts itself. No statistics are taken: the plan costs nothing.
"""

from dataclasses import dataclass

from keeptune.core.options import Range
from keeptune.methods.lora import LoraStart
from keeptune.penalties.kl import Kl


@dataclass(frozen=True)
class Keep(LoraStart):
    """LoRA under a budget.

    Args:
        nats: The budget: how many nats per token may be lost on the knowledge.
        every: At which optimiser steps it is measured and held: 4 is every fourth, and each while it is overdrawn; None
            chooses it.
        batch_size: Knowledge texts of such a step; None chooses: as many as add a quarter to a step.
    """

    name = "keep"
    paper = "keeptune"
    strength_option = ("nats", "divided")
    ranges = {"nats": Range(above=0), **dict.fromkeys(("every", "batch_size"), Range(least=1))}

    nats: float = 0.01
    every: int | None = None
    batch_size: int | None = None

    def penalties(self) -> tuple[Kl]:
        """Returns the budget."""
        return (Kl.of(self, budget=self.nats),)
