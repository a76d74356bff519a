"""The stored attributions: text by text, resumable, independent of order and shards, read a few at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import calibration, llama
from tests.reference.attribution_reference import attribution
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.head import body_fingerprint
from keeptune.model.runner import ResidentRunner
from keeptune.stats.attribution import Attributions, NeuronAttribution, layer_profile
from keeptune.stats.collect import StatsView, collect
from keeptune.stats.store import StatStore

REQUEST = NeuronAttribution()


def gathered(model: Any, data: Calibration, folder: Path, request: NeuronAttribution = REQUEST) -> StatsView:
    targets = find_targets(model, ["down_proj"])
    wanted = {target.name: frozenset([request]) for target in targets}
    key = body_fingerprint(model)
    found = collect(
        ResidentRunner(model), targets, wanted, {"knowledge": data}, StatStore(folder), model_fingerprint=key
    )
    return found.view(targets[0])


def values(view: StatsView, request: NeuronAttribution = REQUEST, size: int = 3) -> Tensor:
    return torch.cat(list(view.attributions(request).chunks(size)))


def test_functions_of_a_statistic_get_attributions(tmp_path: Path) -> None:
    model, data = llama(), calibration()
    view = gathered(model, data, tmp_path)
    found = view.derive(REQUEST, lambda given: given)
    assert isinstance(found, Attributions)
    assert (found.layers, found.nodes, found.samples) == ((0, 1), 32, len(data.sequences))
    assert [tuple(chunk.shape) for chunk in view.attributions(REQUEST).chunks(4)] == [
        (4, 2, 32),
        (4, 2, 32),
        (2, 2, 32),
    ]
    wanted = torch.stack([attribution(model, ids) for ids in sorted(data.sequences)])
    torch.testing.assert_close(values(view), wanted, rtol=0, atol=1e-6)
    assert values(view).dtype == torch.float32


def test_the_profile_is_the_mean_size_of_each_layer_relative_to_the_largest() -> None:
    values = torch.tensor([[[1.0, -2.0], [3.0, 3.0]], [[1.0, 0.0], [-6.0, 0.0]]])  # two texts, two layers, two nodes
    assert layer_profile(Attributions.of(values)).tolist() == pytest.approx([4 / 12, 1.0])
    with pytest.raises(StatisticsError, match="no attribution above zero"):
        layer_profile(Attributions.of(torch.zeros(1, 2, 2)))
