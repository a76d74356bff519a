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
(``linalg/voting.py``). ``global-low`` and ``global-high`` rank the nodes of all blocks together (Table 5): T of each
text, then the T named most often, so that a block may get many rows or none.

(10) is exactly a LoRA with B = the columns of the identity that S names, frozen, A = 0 and scale 1: of rank |S_l|, with
``W_S + A`` for the trained rows. Weight decay therefore pulls W_S towards where it started; in the released code, which
trains W_S itself, it pulls towards zero. (11) is a LoRA of rank r of which B is zero outside S and stays so (A and B as
in LoRA; the paper swaps them, and has no s). Where the down-projection has a bias, its entries S are trained too, as in
the released code (Transformers' trainers let no weight decay act on biases).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Factor, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.voting import quota, voted
from keeptune.methods.base import check_scaling, dropout_field
from keeptune.methods.lora import draw_start, scale_of
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution
from keeptune.statistics.request import Request

__all__ = ["Loki", "Selected", "Selection", "select"]

Selection = Literal["layer-balanced", "global-low", "global-high"]


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """The rows that were selected of one down-projection.

    Args:
        rows: S_l, ascending.
        votes: Share of the texts that named each node, c_l,i / N, ``(D,)``.
    """

    rows: tuple[int, ...]
    votes: Tensor


def select(attributions: Attributions, q: float, selection: Selection) -> dict[str, Selected]:
    """Select rows of all down-projections (eqs. 6-9).

    Laws: ``layer-balanced`` gives each the same floor(q D / 100), the others floor(q L D / 100) in all; no row twice;
    neither the order of texts nor a positive affine map of a text's scores in a block (of all blocks together, for the
    others) changes anything; of equal counts the lowest block and row come first.

    Args:
        attributions: Of every text.
        q: Per cent.
        selection: The lowest of each block, or the lowest or the highest of all blocks together.

    Returns:
        Name of the down-projection to its rows.
    """
    whole = selection != "layer-balanced"
    k = quota(q, attributions.nodes * (len(attributions.modules) if whole else 1))
    rows, counts = voted(attributions.chunks(), k, whole=whole, highest=selection == "global-high")
    votes = counts.float() / attributions.samples
    return {name: Selected(*found) for name, *found in zip(attributions.modules, rows, votes, strict=True)}


@dataclass(frozen=True)
class Loki:
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
        seed: Seed of A of LoKI*; the recipe gives the training seed unless told otherwise.

    Raises:
        PlanError: An option is out of range.
    """

    name: ClassVar[str] = "loki"
    paper: ClassVar[str] = "Wang et al., LoKI, AAAI 2026"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = Strength(("q",), "divided")

    q: float = 10.0
    rank: int | None = None
    selection: Selection = "layer-balanced"
    attribution: NeuronAttribution = NeuronAttribution()
    rate: Literal["fixed", "by-q"] = "fixed"
    alpha: float | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range.
        """
        check_scaling(self.alpha, self.dropout)
        if not 0 < self.q <= 100:
            raise PlanError(
                "method.q",
                got=f"{self.q}",
                wanted="above 0 and at most 100: per cent of the nodes",
                next_step="The paper takes 5 to 30.",
            )
        if self.rank is not None and self.rank < 1:
            raise PlanError(
                "method.rank", got=f"{self.rank}", wanted="1 or more", next_step="Leave it out to train whole rows."
            )
        if self.rank is None and self.alpha is not None:
            raise PlanError(
                "method.alpha",
                got=f"{self.alpha} without a rank",
                wanted="none: whole rows are trained as they are",
                next_step="Leave it out, or give a rank (LoKI*).",
            )

    def requests(self, target: Target) -> frozenset[Request]:
        """Need the attribution of every node; all targets share it."""
        return frozenset({self.attribution})

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> Selected | str:
        """Find the target's rows (eqs. 6-9); of what is no down-projection, name one that is."""
        found = self._select(stats)
        return found.get(target.name, next(iter(found)))

    def allocate(self, scores: Mapping[Target, Selected | str]) -> Mapping[Target, Decision]:
        """Confine each down-projection to its rows, and leave other targets alone."""
        downs = {target: found for target, found in scores.items() if isinstance(found, Selected)}
        if not downs:
            raise PlanError(
                f"method {self.name}",
                got=f"the targets {', '.join(sorted({target.role for target in scores}))}",
                wanted=f"the down-projection of an MLP, as {next(iter(scores.values()))}",
                next_step="Add its role to `targets`, or leave `targets` and `layers` out.",
            )
        if not any(found.rows for found in downs.values()):
            nodes = next(iter(downs)).out_features
            raise PlanError(
                "method.q",
                got=f"{self.q:g} per cent of {nodes} nodes, which leaves no row to train",
                wanted=f"{100 / nodes:.2g} or more",
                next_step="Raise it.",
            )
        decisions = {target: self._decide(target, found.rows) for target, found in downs.items()}
        return {target: decisions.get(target, Decision(0)) for target in scores}

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
        """Start with the rows of W as they are (eqs. 10, 11)."""
        rows, trained = decision.rows or (), self.rank is None
        init = _one_hot(target, rows) if trained else draw_start(target, decision.rank, self.seed)
        factors: frozenset[Factor] = frozenset({"A"} if trained else {"A", "B"})
        return TargetPlan(
            target=target,
            decision=decision,
            init=init,
            scale=1.0 if trained else scale_of(decision.rank, self.alpha),
            trainable=factors | ({"bias"} if target.bias else frozenset()),
            vectors={"bias": torch.zeros(target.out_features)} if target.bias else {},
            evidence={"votes": self._select(stats)[target.name].votes},
        )

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)

    def training(self) -> Mapping[str, Any]:
        """Ask for another learning rate where it is to follow q."""
        factor = (10 / self.q) ** (math.log(0.4) / math.log(1 / 3))
        return {"learning_rate_factor": factor} if self.rate == "by-q" else {}

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Say how many rows there are, what got none or fewer ranks, and what is left alone."""
        downs = {target: decision for target, decision in decisions.items() if decision.rows is not None}
        rows = [len(decision.rows or ()) for decision in downs.values()]
        said = [f"{sum(rows)} of {sum(t.out_features for t in downs)} rows, {min(rows)} to {max(rows)} a block"]
        fewer = [t.name for t, d in downs.items() if self.rank is not None and 0 < d.rank < self.rank]
        if fewer:
            said.append(f"{', '.join(fewer)}: fewer rows than rank {self.rank}, which is lowered to their number")
        others = sorted({target.role for target in decisions if target not in downs})
        if others:
            said.append(f"{', '.join(others)}: left alone, no down-projection")
        return said

    def _select(self, stats: StatsView) -> dict[str, Selected]:
        return stats.derive(self.attribution, select, self.q, self.selection)


def _one_hot(target: Target, rows: tuple[int, ...]) -> LowRank:
    """Make ``B = I[:, S]`` and ``A = 0``, for which ``B A`` puts row j of A into row S_j (eq. 10)."""
    B = torch.zeros(target.out_features, len(rows))
    B[list(rows), range(len(rows))] = 1.0
    return LowRank(B=B, A=torch.zeros(len(rows), target.in_features))
