"""MiLoRA: train the minor part of W, freeze the principal part that holds what was learned.

Wang, Li, Wang, Chen and Chen, "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
NAACL 2025.

    W = U S Vᵀ = W_p + W_m                        W_m: the r smallest triplets
    B = U_m sqrt(S_m),  A = sqrt(S_m) V_mᵀ                               (1)
    y = (W_p + B A) x                             W_p frozen             (2)

With a scale s = alpha / r other than 1, S_m / s takes the place of S_m, as in the released code. The minor triplets
are found in float64: rounding in float32 is of their size where the spectrum falls by many decades.
"""

from dataclasses import dataclass

from keeptune.methods.pissa import Pissa


@dataclass(frozen=True)
class Milora(Pissa):
    """MiLoRA.

    Args:
        alpha: Scale numerator; None is r, a scale of 1 as in the released code.
        dropout: Dropout before A, during training; 0.05 in the paper.
    """

    name = "milora"
    paper = "Wang et al., MiLoRA, NAACL 2025"
    end = "bottom"
