"""Overlap: symmetric, 1 with itself, 0 without a common row, and at random what it says chance gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keeptune.linalg.selections import Overlap, overlap_of, overlaps

NODES = 12
ROWS = st.frozensets(st.integers(0, NODES - 1)).map(sorted)
PAIRS = st.lists(st.tuples(ROWS, ROWS), min_size=1, max_size=4)


@given(PAIRS)
def test_symmetric_and_between_none_and_all(pairs: list[tuple[list[int], list[int]]]) -> None:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    there, back = overlaps(first, second, NODES), overlaps(second, first, NODES)
    for one, other, (a, b) in zip(there, back, pairs, strict=True):
        assert (one.share, one.chance, one.common) == (other.share, other.chance, other.common)
        assert one.common == len(set(a) & set(b))
        assert (one.share is None) == (not a and not b)
        assert one.share is None or 0 <= one.share <= 1


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_a_selection_with_itself_is_one(rows: list[list[int]]) -> None:
    whole = overlap_of(overlaps(rows, rows, NODES))
    assert whole.share == (1 if any(rows) else None)


def test_without_a_common_row_it_is_zero() -> None:
    (found,) = overlaps([[0, 1]], [[2, 3]], NODES)
    assert found.share == 0
    assert found.chance == pytest.approx(2 / NODES)


def test_of_equal_sizes_it_is_the_share_of_common_rows() -> None:
    found = overlap_of(overlaps([[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 9], [8, 9, 10, 11]], NODES))
    assert found == Overlap(8, 8, 3, pytest.approx(2 * 16 / NODES))
    assert found.share == 3 / 8
    assert found.chance == pytest.approx(4 / NODES)


def test_of_other_sizes_both_count() -> None:
    (found,) = overlaps([[0, 1, 2]], [[0]], NODES)
    assert found.share == 0.5
    (every,) = overlaps([range(NODES)], [[0, 5]], NODES)
    assert every.chance == every.share


def test_chance_is_the_mean_over_random_selections() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 3), (5, 2))

    def drawn(which: int) -> list[list[int]]:
        return [torch.randperm(NODES, generator=generator)[: size[which]].tolist() for size in sizes]

    found = [overlap_of(overlaps(drawn(0), drawn(1), NODES)) for _ in range(2000)]
    mean = sum(one.share or 0 for one in found) / len(found)
    assert mean == pytest.approx(found[0].chance, abs=0.01)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 layers"):
        overlaps([[0], [1]], [[0]], NODES)
    with pytest.raises(ValueError, match="row 12"):
        overlaps([[0]], [[12]], NODES)
