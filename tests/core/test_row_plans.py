"""A plan of whole rows (LoKI) holds and stores the rows, not the factors that they imply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.plan_differences import differences

from keeptune.core.artefact import read_json
from keeptune.core.low_rank import LowRank, RowSelection
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target

ROWS, SHAPE = (0, 3, 4), (6, 5)


def dense(rows: tuple[int, ...], shape: tuple[int, int]) -> LowRank:
    """Eq. 10 of LoKI, as plans were stored before."""
    B = torch.zeros(shape[0], len(rows))
    for j, row in enumerate(rows):
        B[row, j] = 1.0
    return LowRank(B, torch.zeros(len(rows), shape[1]))


def plan(init: LowRank, layers: int = 1, **parts: torch.Tensor) -> Plan:
    m, n = init.shape
    rows = init.rows if isinstance(init, RowSelection) else ROWS
    targets = tuple(
        TargetPlan(
            Target(f"layers.{layer}.down", layer, "down", m, n, input_group="down", bias="bias" in parts),
            Decision(len(rows), rows),
            init,
            1.0,
            frozenset({"A", *parts}),
            {"votes": torch.arange(m).float()},
            vectors=parts,
        )
        for layer in range(layers)
    )
    return Plan("loki", {"q": 30.0}, targets)


def test_a_selection_is_its_factors() -> None:
    found, wanted = RowSelection(ROWS, SHAPE), dense(ROWS, SHAPE)
    assert torch.equal(found.B, wanted.B)
    assert torch.equal(found.A, wanted.A)
    assert (found.rank, found.shape, found.is_zero) == (wanted.rank, wanted.shape, wanted.is_zero)
    assert torch.equal(found.dense(), wanted.dense())
    other = LowRank(torch.ones(6, 2), torch.ones(2, 5))
    for ours, theirs in ((found.plus(other), wanted.plus(other)), (other.minus(found), other.minus(wanted))):
        assert torch.equal(ours.dense(), theirs.dense())
    assert torch.equal(found.scaled(2.0).B, wanted.scaled(2.0).B)


@pytest.mark.parametrize("parts", [{}, {"bias": torch.zeros(6)}], ids=["", "bias"])
def test_load_after_save_is_the_identity(parts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    made = plan(RowSelection(ROWS, SHAPE), **parts)
    made.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    (t,) = loaded.targets
    assert isinstance(t.init, RowSelection)
    assert (t.init.rows, t.init.shape) == (ROWS, SHAPE)
    assert loaded.key == made.key
    assert differences(loaded, made) == []
    assert set(t.vectors) == set(parts)


def test_keys_and_plans_of_before_hold(tmp_path: Path) -> None:
    made, before = plan(RowSelection(ROWS, SHAPE)), plan(dense(ROWS, SHAPE))
    assert made.key == before.key
    before.save(tmp_path / "before")
    assert read_json(tmp_path / "before" / "plan.json")["format"] == 1
    loaded = Plan.load(tmp_path / "before")
    assert loaded.key == made.key
    assert differences(loaded, made) == []
    made.save(tmp_path / "now")
    assert read_json(tmp_path / "now" / "plan.json")["format"] == 2
    other = plan(RowSelection((0, 3, 5), SHAPE))
    assert other.key != made.key
    assert differences(other, made)


def test_the_plan_of_an_8b_model_is_small(tmp_path: Path) -> None:
    """Llama-3.1-8B's down-projections at q = 30: 2.9 GB of factors, of which nothing is held or stored."""
    layers, shape, rows = 32, (4096, 14336), tuple(range(0, 3 * 1228, 3))
    made = plan(RowSelection(rows, shape), layers)
    assert made.targets[0].init.A.untyped_storage().nbytes() == 4
    made.save(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    factors = layers * 4 * len(rows) * sum(shape)
    assert factors > 2.8e9
    assert size < 2e6
    assert (tmp_path / "factors.safetensors").stat().st_size < 1000
