"""KVA: against one run per point and against Captum, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import Factory, calibration, deep, gpt2, llama, qwen2
from tests.reference.attribution_reference import attribution

from keeptune.model.attribution import Attributor, Integral

every_model = pytest.mark.parametrize("make", [llama, qwen2, gpt2])


def small(lengths: tuple[int, ...] = (9, 7, 12)) -> Any:
    return calibration(3, lengths)


def rows(batch: Any) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("side", ["right", "left"])
@every_model
def test_it_is_one_run_per_point(make: Factory, side: str, positions: Any) -> None:
    model = deep(make)
    (batch,) = small().batches(padding_side=side)
    integral = Integral(positions=positions)
    found = Attributor(model, integral).attribute(batch)
    for ids, value in zip(rows(batch), found, strict=True):
        wanted = attribution(model, ids, positions=positions)
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
