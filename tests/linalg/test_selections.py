from __future__ import annotations

import pytest
import torch
from tests.reference import loki_reference as reference
from torch import Tensor

from keeptune.linalg.selections import count_votes, lowest, most_voted, quota

SELECTIONS = {
    "layer-balanced": {"whole": False, "highest": False},
    "global-low": {"whole": True, "highest": False},
    "global-high": {"whole": True, "highest": True},
}
every_selection = pytest.mark.parametrize("selection", SELECTIONS)


def scores(samples: int = 23, layers: int = 3, nodes: int = 20, seed: int = 0, levels: int | None = None) -> Tensor:
    """Random scores, of which many are equal where there are few levels."""
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (samples, layers, nodes), generator=generator).float()
    scale = torch.tensor([1.0, 3.0, 0.2])[:layers, None]  # else all layers would be alike
    return torch.randn(samples, layers, nodes, generator=generator) * scale


def rows(found: Tensor, q: float, selection: str, chunk: int = 7) -> list[list[int]]:
    whole, highest = SELECTIONS[selection]["whole"], SELECTIONS[selection]["highest"]
    k = quota(q, found[0].numel() if whole else found.shape[2])
    counts = count_votes(found.split(chunk), k, whole=whole, highest=highest)
    return [list(row) for row in most_voted(counts, k, whole=whole)]


@pytest.mark.parametrize("nodes", [1, 7, 32, 100, 1000, 4096, 14336])
def test_a_quota_is_rounded_down_exactly(nodes: int) -> None:
    for tenth in range(0, 1001):
        q = tenth / 10
        assert quota(q, nodes) == reference.quota(str(q), nodes) == tenth * nodes // 1000


def test_a_float_quota_would_lose_one() -> None:
    """The departure from the released code is a real one."""
    lost = [q for q in range(1, 100) if int(q / 100 * 100) != q]
    assert lost == [29, 57, 58]
    assert [quota(q, 100) for q in lost] == lost


def test_the_layers_shares_never_exceed_the_slots_of_all() -> None:
    """Eq. 6: floor(T / L) with T = q L D / 100 is floor(q D / 100)."""
    for q in (0.1, 3, 7.5, 10, 33.3, 99.9):
        for layers, nodes in ((3, 10), (7, 33), (32, 4096)):
            slots = quota(q, layers * nodes)
            assert quota(q, nodes) == slots // layers
            assert layers * quota(q, nodes) <= slots


@pytest.mark.parametrize("k", [0, 1, 5, 20])
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_the_lowest_are_marked_and_of_equal_ones_the_first(k: int, levels: int | None) -> None:
    found = scores(levels=levels)
    marked = lowest(found, k)
    assert bool((marked.sum(-1) == k).all())
    order = found.sort(dim=-1, stable=True).indices[..., :k]
    assert torch.equal(marked, torch.zeros_like(marked).scatter_(-1, order, value=True))


@every_selection
@pytest.mark.parametrize("q", ["0", "1.5", "10", "29", "50", "100"])
@pytest.mark.parametrize("levels", [None, 4])
def test_the_selection_is_that_of_the_paper(selection: str, q: str, levels: int | None) -> None:
    found = scores(levels=levels)
    assert rows(found, float(q), selection) == reference.selected(found, q, selection)


def test_the_most_voted_come_first_and_not_the_least() -> None:
    """The arrows of eqs. 7 and 9 point the other way; the text is right."""
    found = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[0.0, 2.0, 1.0, 3.0]], [[9.0, 1.0, 2.0, 3.0]]])
    assert rows(found, 25, "layer-balanced") == [[0]]
    assert rows(found, 25, "global-high") == [[3]]


@every_selection
@pytest.mark.parametrize("q", [5, 10, 47.5])
def test_quotas_are_met_without_duplicates(selection: str, q: float) -> None:
    found = rows(scores(), q, selection)
    assert all(len(set(row)) == len(row) and row == sorted(row) for row in found)
    if selection == "layer-balanced":
        assert {len(row) for row in found} == {quota(q, 20)}
    else:
        assert sum(map(len, found)) == quota(q, 60)
        assert len({len(row) for row in found}) > 1  # or the two would be the same


@every_selection
def test_neither_order_nor_chunks_of_samples_matter(selection: str) -> None:
    found = scores(levels=5)
    wanted = rows(found, 20, selection, chunk=23)
    turned = found[torch.randperm(23, generator=torch.Generator().manual_seed(1))]
    for chunk in (1, 4, 22):
        assert rows(turned, 20, selection, chunk) == wanted
    assert rows(found[:11], 20, selection) != wanted  # samples do matter


@every_selection
def test_positive_affine_maps_change_nothing(selection: str) -> None:
    found = scores().double()
    generator = torch.Generator().manual_seed(2)
    shape = (23, 3, 1) if selection == "layer-balanced" else (23, 1, 1)
    factor = torch.rand(shape, generator=generator, dtype=torch.float64) * 5 + 0.1
    shift = torch.randn(shape, generator=generator, dtype=torch.float64)
    wanted = rows(found, 20, selection)
    assert rows(factor * found + shift, 20, selection) == wanted
    assert rows(-found, 20, selection) != wanted
    if selection != "layer-balanced":
        by_layer = torch.tensor([9.0, 1.0, 1.0]).view(3, 1)
        assert rows(found * by_layer, 20, selection) != wanted


@every_selection
def test_a_min_max_normalisation_changes_nothing(selection: str) -> None:
    found = scores().double()
    dims = (2,) if selection == "layer-balanced" else (1, 2)
    low, high = found.amin(dims, keepdim=True), found.amax(dims, keepdim=True)
    assert rows((found - low) / (high - low), 20, selection) == rows(found, 20, selection)


def test_chunks_are_taken_one_at_a_time() -> None:
    """All samples are never held: a chunk is asked for when the one before is counted."""
    asked: list[int] = []

    def chunks():  # type: ignore[no-untyped-def]
        for number, chunk in enumerate(scores().split(5)):
            asked.append(number)
            yield chunk
            chunk.fill_(torch.nan)

    assert int(count_votes(chunks(), 4).sum()) == 23 * 3 * 4
    assert asked == [0, 1, 2, 3, 4]


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="got k 21, wanted 0 to 20"):
        lowest(scores(), 21)
    with pytest.raises(ValueError, match="NaN"):
        count_votes([scores().fill_(torch.nan)], 2)
    with pytest.raises(ValueError, match="no sample"):
        count_votes([], 2)
