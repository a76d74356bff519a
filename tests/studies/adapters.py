"""Stock adapters with drawn factors, and what they change: for the tests of studies and of repair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.models import Saved
from torch import Tensor

from keeptune.core.errors import KeeptuneError
from keeptune.core.weights import read_weight
from keeptune.model.blocks import find_targets

LORA_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 5},
    "patterns": {"r": 3, "rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 7}},
    "rslora": {"r": 3, "use_rslora": True},
}


def drawn_adapter(base: Saved, folder: Path, config: Any, seed: int = 0) -> Path:
    """Save a stock adapter with every factor drawn, as if it had been trained."""
    wrapped = get_peft_model(base.load(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_changes(base: Saved, adapter: Path | str) -> dict[str, Tensor]:
    """What loading and merging by PEFT adds to each weight of a fresh base."""
    fresh, merged = base.load(), PeftModel.from_pretrained(base.load(), str(adapter)).merge_and_unload()
    targets = find_targets(fresh)
    return {t.name: read_weight(merged, t).double() - read_weight(fresh, t).double() for t in targets}


def refused(call: Callable[[], Any], kind: type[KeeptuneError], *marks: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    for mark in marks:
        assert mark in str(raised.value)
