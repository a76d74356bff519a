"""Changes of a model: read, added and written back without a loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.models import gpt2, llama, logits, relative, tokens
from transformers import PreTrainedModel

from keeptune.adapter.install import install
from keeptune.adapter.probe import gap_to
from keeptune.core.errors import ExportError
from keeptune.core.low_rank import LowRank
from keeptune.experiments.sequence.joined_changes import add_changes, joined, plan_of, read_changes
from keeptune.model.blocks import find_targets


def change(m: int, r: int, n: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))


def test_joined_is_the_sum_at_each_target() -> None:
    earlier = {"a": change(4, 2, 3, 0), "b": change(5, 1, 3, 1)}
    later = {"c": change(2, 1, 2, 2), "a": change(4, 3, 3, 3)}
    found = joined(earlier, later)
    torch.testing.assert_close(found["a"].dense(), earlier["a"].dense() + later["a"].dense())
    assert found["a"].rank == 5
    assert found["b"] is earlier["b"]
    assert found["c"] is later["c"]


def test_reading_leaves_out_what_only_pads(tmp_path: Path) -> None:
    x = change(4, 3, 5, 0)
    padded, nothing = x.padded(8), LowRank(torch.zeros(4, 8), torch.randn(8, 5))
    tensors = {}
    for name, one in {"q": padded, "k": nothing}.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": one.A, f"base_model.model.{name}.lora_B.weight": one.B}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    found = read_changes(tmp_path)
    assert list(found) == ["q"]
    assert torch.equal(found["q"].B, x.B)
    assert torch.equal(found["q"].A, x.A)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_weights_with_a_change_and_the_installed_change_are_one_model(build: Callable[[], PreTrainedModel]) -> None:
    model, probe = build(), tokens()
    targets = find_targets(model)
    changes = {t.name: change(t.out_features, 2, t.in_features, i).scaled(0.05) for i, t in enumerate(targets[:5])}
    before = logits(model, probe)
    installed = install(build(), plan_of(build(), changes, {}, {}))
    found = logits(add_changes(model, changes), probe)
    assert relative(logits(installed, probe), found) < 1e-5
    assert relative(found, before) > 1e-2


def test_a_gap_that_is_too_large_or_no_number_is_refused() -> None:
    wanted = torch.tensor([1.0, -4.0])
    gap = gap_to(torch.tensor([1.5, -4.0]), wanted, torch.float32, 0.2, "here")
    assert (gap.gap, gap.relative) == (0.5, 0.125)
    for found, bound in (([1.5, -4.0], None), ([float("nan"), -4.0], 0.5)):
        with pytest.raises(ExportError, match="here: got logits that differ"):
            gap_to(torch.tensor(found), wanted, torch.float32, bound, "here")
    gap_to(torch.tensor([1.2, -4.0]), wanted, torch.bfloat16, None, "here")
