"""Curves behind a plan's decisions are whole where they are short, and bounded where they are long."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from keeptune.core.artefact import canonical_json
from keeptune.core.evidence import POINTS, bounded
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target


def test_short_curves_are_whole() -> None:
    values = torch.rand(256)
    assert bounded({"a": values, "b": torch.tensor([0.1])}) == {"a": values.tolist(), "b": [torch.tensor(0.1).item()]}


@pytest.mark.parametrize("size", [257, 1000, 28672])
@pytest.mark.parametrize("falling", [False, True])
def test_a_long_curve_has_points_of_itself(size: int, falling: bool) -> None:
    values = torch.rand(size).sort(descending=falling).values
    kept = bounded({"a": values})["a"]
    assert kept["size"] == size
    assert kept["at"] == sorted(set(kept["at"]))
    assert len(kept["at"]) == len(kept["values"]) <= POINTS
    assert {*range(48), *range(size - 16, size)} <= set(kept["at"])
    assert torch.equal(torch.tensor(kept["values"]), values[kept["at"]]), "the same float32, in fewer digits"
    assert max(b - a for a, b in pairwise(kept["at"])) <= size / 50


def test_what_is_taken_of_a_spectrum_is_among_the_points() -> None:
    spectrum = torch.rand(4096).sort(descending=True).values
    chosen = [3, 1000, 2001, 2002, 4095]
    kept = bounded({"spectrum": spectrum, "singular_values": spectrum[chosen]})
    assert set(chosen) <= set(kept["spectrum"]["at"])
    assert not {1001, 2003} & set(kept["spectrum"]["at"])


@pytest.mark.parametrize("size", [257, 4096, 8193])
def test_what_is_not_sorted_is_averaged(size: int) -> None:
    values = torch.randint(0, 9, (size,), generator=torch.Generator().manual_seed(0)).float()
    kept = bounded({"votes": values})["votes"]
    edges = [*kept["at"], size]
    for (start, stop), mean in zip(pairwise(edges), kept["means"], strict=True):
        assert mean == pytest.approx(float(values[start:stop].double().mean()))
    assert (len(kept["at"]), kept["at"][0]) == (POINTS, 0)


def test_the_report_of_a_7b_model_is_small() -> None:
    """224 targets of Llama-2-7B's shapes with whole spectra: 1.9 MB for FARSS of rank 16, 24 MB before."""
    shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    init = LowRank(torch.zeros(1, 1), torch.zeros(1, 1))
    spectrum = torch.rand(4096).sort(descending=True).values
    evidence = {"spectrum": spectrum, "singular_values": spectrum[:16], "direction_score": torch.rand(16)}
    targets = tuple(
        TargetPlan(
            Target(f"model.layers.{layer}.{role}", layer, role, *shape, input_group=role),
            Decision(16),
            init,
            1.0,
            frozenset({"A", "B"}),
            evidence,
        )
        for layer in range(32)
        for role, shape in shapes.items()
    )
    summary = Plan("farss", {}, targets).summary()
    size = len(json.dumps(json.loads(canonical_json(summary)), indent=2))
    assert size < 2.5e6
    whole = [row | {"evidence": {name: value.tolist() for name, value in evidence.items()}} for row in summary]
    assert len(json.dumps(whole, indent=2)) > 10 * size
