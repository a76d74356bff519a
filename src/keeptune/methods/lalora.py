"""LaLoRA: LoRA with a Laplace penalty that holds it where the model's loss on surrogate data is curved.

Sliwa, Schneider, Hennig, Hernandez-Lobato, "Mitigating Forgetting in Low Rank Adaptation", arXiv 2512.17720.
**Our reading**: the abstract and the captions of its figures were at hand, not its equations.

    (I)  at the start (A_0, B_0), on a few batches of each surrogate set: F, the Fisher of the adapter's weights
    (II) L = L_task + λ/2 (θ - θ_0)ᵀ F (θ - θ_0),   θ = (A, B)

F is diagonal (``diag``), Kronecker-factored per weight (``b-kfac``), or with A and B of one adapter coupled
(``b-tri-kfac``): equations (1) to (3) of ``penalties/laplace.py``. Not known to us: the flavour of the Fisher (here the
model's own, sums over tokens), damping (here none), the grid of λ, and what is done about A: **at B_0 = 0 the
Fisher of A is zero in all three forms, and b-tri-kfac is b-kfac**. The forms on the weight change, ``delta-kfac``
and ``delta-act``, have no such blind spot; they are ours (and that of EWC-LoRA and TAK in spirit).

The paper finds two batches per set best; ``batches`` times ``batch_size`` examples are taken of each set of the
recipe's ``knowledge``.
"""

from dataclasses import dataclass

from keeptune.methods.lora import LoraStart
from keeptune.penalties.laplace import Curvature, Laplace
from keeptune.penalties.measured import Draws


@dataclass(frozen=True)
class Lalora(Draws, LoraStart):
    """LaLoRA, our reading.

    Args:
        dropout: Dropout before A, during training; the curvature is taken without.
        strength: λ: how much a nat lost on the knowledge weighs; for ``delta-act`` what a relative drift of 1 costs.
        curvature: ``diag``, ``b-kfac``, ``b-tri-kfac`` as in the paper; ``delta-kfac``, ``delta-act`` on the weight
            change.
        batches: Batches of each knowledge set; None is all of it.
        batch_size: Examples per batch.
    """

    name = "lalora"
    paper = "Sliwa et al., LaLoRA, 2512.17720 (our reading)"
    strength_option = ("strength", "multiplied")

    strength: float = 100.0
    curvature: Curvature = "b-kfac"
    batches: int | None = 2
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.penalties()

    def penalties(self) -> tuple[Laplace]:
        """Returns (II)."""
        return (Laplace.of(self),)
