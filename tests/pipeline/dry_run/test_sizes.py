"""What is counted before a plan is what the plan trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.models import MODELS, Bench

from keeptune.core.low_rank import RowSelection
from keeptune.methods.base import methods
from keeptune.model.blocks import down_projections

OPTIONS: dict[str, dict[str, Any]] = {"farss": {"boundary": 1, "r_min": 2, "r_avg": 2, "r_max": 2}, "loki": {"q": 20}}
OPTIONS["oplora"] = {"k": 2}
KINDS = [(name, OPTIONS.get(name, {})) for name in methods() if name != "full"]
KINDS += [("loki", {"q": 20, "rank": 2}), ("lora-null", {"variant": "v2"}), ("farss", {"variant": "all-high"})]


@pytest.mark.parametrize(("name", "options"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_count_is_that_of_the_plan(name: str, options: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    model = MODELS[architecture]()
    cls = methods()[name]
    known = set(cls.__dataclass_fields__)
    method = cls(**({"rank": 3} if "rank" in known and name != "loki" else {}), **options)
    plan = Bench(model, tmp_path).plan(method)
    downs = {target.name for target in down_projections(model)}
    sizes = {target.name: method.size(target, downs) for target in Bench(model, tmp_path).targets()}
    planned = {
        t.target.name: sum(t.start[factor].numel() for factor in t.trainable if factor in t.start) - t.held_back
        for t in plan.targets
    }
    assert {name: size.trained for name, size in sizes.items() if size.trained} == planned
    for t in plan.targets:
        size = sizes[t.target.name]
        assert size.rank == t.decision.rank
        assert method.anchored == t.anchored
        assert size.kept == sum(value.numel() for value in t.kept.values())
        held = {factor: t.start[factor].numel() for factor in ("A", "B")}
        assert size.frozen == sum(held[f] for f in held if f not in t.trainable) + t.held_back
        assert size.implied == (sum(held.values()) if isinstance(t.init, RowSelection) else 0)
