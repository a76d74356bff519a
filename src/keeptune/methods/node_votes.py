"""Which nodes matter least, by a vote of the texts: (6) to (9) of loki.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from keeptune.linalg.selections import quota, voted
from keeptune.statistics.neuron_attribution import Attributions

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
    """Selects rows of all down-projections (eqs. 6-9).

    Laws: ``layer-balanced`` gives each the same floor(q D / 100), the others floor(q L D / 100) in all; no row twice;
    neither the order of texts nor a positive affine map of a text's scores in a block (of all blocks together, for the
    others) changes anything; of equal counts the lowest block and row come first.
    """
    whole = selection != "layer-balanced"
    k = quota(q, attributions.nodes * (len(attributions.modules) if whole else 1))
    rows, counts = voted(attributions.chunks(), k, whole=whole, highest=selection == "global-high")
    votes = counts.float() / attributions.samples
    return {name: Selected(own, share) for name, own, share in zip(attributions.modules, rows, votes, strict=True)}
