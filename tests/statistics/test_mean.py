from __future__ import annotations

import pytest
import torch
from tests.models import relative

from keeptune.core.errors import StatisticsError
from keeptune.statistics.input_mean import MeanAccumulator

ROWS = torch.randn(57, 6, generator=torch.Generator().manual_seed(0)) + 3
CPU = torch.device("cpu")


@pytest.mark.parametrize("batch", [1, 10, 57])
def test_the_mean_does_not_depend_on_how_rows_are_split(batch: int) -> None:
    parts = [MeanAccumulator(6, CPU), MeanAccumulator(6, CPU)]
    for index, rows in enumerate(ROWS.split(batch)):
        parts[index % 2].add(rows)
    parts[0].merge(parts[1])
    assert relative(parts[0].result("up"), ROWS.double().mean(0)) < 1e-7


def test_no_token_is_refused_with_the_module() -> None:
    with pytest.raises(StatisticsError, match="up: got no tokens"):
        MeanAccumulator(6, CPU).result("up")


def test_what_is_not_finite_is_refused_with_the_module() -> None:
    total = MeanAccumulator(2, CPU)
    total.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(StatisticsError, match="up: got NaN"):
        total.result("up")
