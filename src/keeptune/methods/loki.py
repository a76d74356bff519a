"""LoKI: find the rows of the MLPs' down-projections that matter least, and write the new knowledge there.

Wang et al., "LoKI: Low-damage Knowledge Implanting of Large Language Models", AAAI 2026.

A node is an output i of a block's down-projection, and row i of W_down; D to a block, L blocks. Attr_l,i of each text t
is measured by ``statistics/neuron_attribution.py`` (KVA).

    T = q/100 L D,   k_l = floor(T / L)                                                   (6)
    S_l^t = the k_l nodes of least Attr_l,i^t                                             (7)
    c_l,i = sum_t [i in S_l^t]                                                            (8)
    S_l = the k_l nodes of largest c_l,i                                                  (9)
    W = [W_S; W_rest],  only W_S is trained                                               (10)
    LoKI*: W_S = W_S^0 + s B_S A_S                                                        (11)

Least is least as signed: nodes that speak against what the model says, not those that say little. The arrows of argsort
in (7) and (9) point the other way in the paper; its text is right. Its min-max normalisation changes no vote
(:mod:`keeptune.linalg.selections`). ``global-low`` and ``global-high`` rank the nodes of all blocks together (Table 5):
T of each text, then the T named most often, so that a block may get many rows or none.

(10) is exactly a LoRA with B = the columns of the identity that S names, frozen, A = 0 and scale 1: of rank |S_l|, with
``W_S + A`` for the trained rows. Weight decay therefore pulls W_S towards where it started; in the released code, which
trains W_S itself, it pulls towards zero. (11) is a LoRA of rank r of which B is zero outside S and stays so (A and B as
in LoRA; the paper swaps them, and has no s). Where the down-projection has a bias, its entries S are trained too, as in
the released code (Transformers' trainers let no weight decay act on biases).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import RowSelection
from keeptune.core.options import Range
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.selections import quota, voted
from keeptune.methods.base import SCALING, Method, Size, dropout_field
from keeptune.methods.lora import draw_start
from keeptune.statistics.collect import StatsView
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution
from keeptune.statistics.request import Request

Selection = Literal["layer-balanced", "global-low", "global-high"]


class Selected(NamedTuple):
    """The rows S_l of one down-projection, ascending, and the share of texts that named each node, ``(D,)``."""

    rows: tuple[int, ...]
    votes: Tensor


def select(attributions: Attributions, q: float, selection: str) -> dict[str, Selected]:
    """Selects rows of all down-projections (eqs. 6-9), or those of the controls, ``layer-high`` among them.

    Laws: ``layer-balanced`` gives each the same floor(q D / 100), the others floor(q L D / 100) in all; no row twice;
    neither the order of texts nor a positive affine map of a text's scores in a block (of all blocks together, for the
    others) changes anything; of equal counts the lowest block and row come first.
    """
    whole = selection.startswith("global")
    k = quota(q, attributions.nodes * (len(attributions.modules) if whole else 1))
    rows, counts = voted(attributions.chunks(), k, whole=whole, highest=selection.endswith("high"))
    votes = counts.float() / attributions.samples
    return {name: Selected(own, share) for name, own, share in zip(attributions.modules, rows, votes, strict=True)}


@dataclass(frozen=True)
class Loki(Method):
    """LoKI, and LoKI* with a rank.

    Args:
        q: Per cent of the nodes that are trained.
        rank: None trains the rows themselves (eq. 10); r a LoRA of rank r within them, LoKI* (eq. 11).
        selection: ``"layer-balanced"``, or ``"global-low"`` and ``"global-high"``, the paper's controls.
        attribution: What is measured: options of the knowledge attribution; the defaults are the first release's.
        rate: ``"fixed"`` trains with ``train.learning_rate``; ``"by-q"`` multiplies it by ``(10 / q)^0.83``, which is
            1 at q = 10 and the paper's 0.4 at q = 30; the rates in between are in an appendix that is not public.
        alpha: Scale numerator of LoKI*; None is 2 r, the usual choice.
        dropout: Dropout before A, during training.
        seed: Seed of A of LoKI*; the recipe sets the training seed unless its method section has one.

    Raises:
        PlanError: An option is out of range, or ``alpha`` is set without a rank.
    """

    name = "loki"
    paper = "Wang et al., LoKI, AAAI 2026"
    strength_option = ("q", "divided")
    rows_of_downs = True
    ranges = {
        **SCALING,
        "q": Range(above=0, most=100, advice="It is per cent of the nodes; the paper takes 5 to 30."),
        "rank": Range(least=1, advice="Leave it out to train whole rows."),
    }

    q: float = 10.0
    rank: int | None = None
    selection: Selection = "layer-balanced"
    attribution: NeuronAttribution = NeuronAttribution()
    rate: Literal["fixed", "by-q"] = "fixed"
    alpha: float | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        scaled = self.rank is not None or self.alpha is None
        advice = "Leave it out, or set a rank (LoKI*)."
        self.need(scaled, "alpha", "none without a rank: whole rows are trained as they are", advice)

    @property
    def statistics(self) -> frozenset[Request]:
        """The attribution of every node; all targets share it."""
        return frozenset({self.attribution})

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> Selected | str:
        """Returns the target's rows (eqs. 6-9); of what is no down-projection, the name of one."""
        rows = self._select(stats)
        return rows.get(target.name, next(iter(rows)))

    def allocate(self, scores: Mapping[Target, Selected | str]) -> Mapping[Target, Decision]:
        """Confines each down-projection to its rows, and leaves other targets alone."""
        downs = {target: selected for target, selected in scores.items() if isinstance(selected, Selected)}
        if not downs:
            raise PlanError(
                f"method {self.name}",
                got=f"the targets {', '.join(sorted({target.role for target in scores}))}",
                wanted=f"the down-projection of an MLP, as {next(iter(scores.values()))}",
                next_step="Add its role to `targets`, or leave `targets` and `layers` out.",
            )
        if not any(selected.rows for selected in downs.values()):
            nodes = next(iter(downs)).out_features
            raise PlanError(
                "method.q",
                got=f"{self.q:g} per cent of {nodes} nodes, which leaves no row to train",
                wanted=f"{100 / nodes:.2g} or more",
                next_step="Raise it.",
            )
        alone = dict.fromkeys(scores, Decision(0))
        return alone | {target: self._decide(target, selected.rows) for target, selected in downs.items()}

    def _decide(self, target: Target, rows: tuple[int, ...]) -> Decision:
        if self.rank is None or not rows:
            return Decision(len(rows), rows)
        most = min(len(rows), target.in_features)
        # A block that gets few rows of all (global selections) has no room for more ranks than rows.
        if self.rank > most and self.selection == "layer-balanced":
            raise PlanError(
                f"method {self.name}, target {target.name}",
                got=f"rank {self.rank}",
                wanted=f"1 to {most}: q = {self.q:g} per cent of {target.out_features} nodes is {len(rows)} rows",
                next_step=f"Lower `method.rank`, raise `method.q`, or leave the role {target.role} out of `targets`.",
            )
        return Decision(min(self.rank, most), rows)

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Starts with the rows of W as they are (eqs. 10, 11)."""
        rows, r = decision.rows or (), decision.rank
        weight_shape = (target.out_features, target.in_features)
        factors: frozenset[str] = frozenset({"A"} if self.rank is None else {"A", "B"})
        return self.planned(
            target,
            decision,
            RowSelection(rows, weight_shape) if self.rank is None else draw_start(target, r, self.seed),
            1.0 if self.rank is None else 2.0 if self.alpha is None else self.alpha / r,
            trainable=factors | ({"bias"} if target.bias else frozenset()),
            vectors={"bias": torch.zeros(target.out_features)} if target.bias else {},
            evidence={"votes": self._select(stats)[target.name].votes},
        )

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts the rows of a down-projection, or the factors within them, and the entries of its bias."""
        if target.name not in downs:
            return Size(0, 0)
        m, n = target.out_features, target.in_features
        rows = int(self.q * m / 100)
        bias, held = (rows, m - rows) if target.bias else (0, 0)
        if self.rank is None:
            return Size(rows, rows * n + bias, frozen=rows * m + held, implied=rows * (n + m))
        r = min(self.rank, rows)
        return Size(r, r * (rows + n) + bias, frozen=(m - rows) * r + held)

    def peft(self) -> Mapping[str, Any]:
        """Returns the dropout."""
        return dropout_field(self.dropout)

    def training(self) -> Mapping[str, Any]:
        """Returns another learning rate where it follows q."""
        factor = (10 / self.q) ** (math.log(0.4) / math.log(1 / 3))
        return {"learning_rate_factor": factor} if self.rate == "by-q" else {}

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Returns how many rows there are, what got none or fewer ranks, and what is left alone."""
        downs = {target: decision for target, decision in decisions.items() if decision.rows is not None}
        rows = [len(decision.rows or ()) for decision in downs.values()]
        notes = [f"{sum(rows)} of {sum(t.out_features for t in downs)} rows, {min(rows)} to {max(rows)} a block"]
        fewer = [t.name for t, d in downs.items() if self.rank is not None and 0 < d.rank < self.rank]
        if fewer:
            notes.append(f"{', '.join(fewer)}: fewer rows than rank {self.rank}, which is lowered to their number")
        others = sorted({target.role for target in decisions if target not in downs})
        if others:
            notes.append(f"{', '.join(others)}: left alone, no down-projection")
        return notes

    def _select(self, stats: StatsView) -> dict[str, Selected]:
        return stats.derive(self.attribution, select, self.q, self.selection)
