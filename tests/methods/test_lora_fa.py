from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import MODELS, Bench

from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA


def made(folder: Path, method: Lora | LoraFA) -> Plan:
    return Bench(MODELS["llama"](), folder).plan(method)


def test_only_B_is_trained(tmp_path: Path) -> None:
    assert {t.trainable for t in made(tmp_path, LoraFA(rank=4)).targets} == {frozenset({"B"})}


@pytest.mark.parametrize("options", [{}, {"alpha": 6.0}, {"use_rslora": True}, {"seed": 5}], ids=str)
def test_it_starts_where_lora_starts(tmp_path: Path, options: dict[str, float]) -> None:
    plain = made(tmp_path, Lora(rank=4, **options))  # type: ignore[arg-type]
    for target_plan in made(tmp_path, LoraFA(rank=4, **options)).targets:  # type: ignore[arg-type]
        other = plain[target_plan.target.name]
        assert torch.equal(target_plan.init.A, other.init.A)
        assert not target_plan.init.B.any()
        assert target_plan.scale == other.scale


@pytest.mark.parametrize(("options", "where"), [({"alpha": 0.0}, "method.alpha"), ({"dropout": 1.0}, "method.dropout")])
def test_options_that_make_no_sense_are_refused(options: dict[str, float], where: str) -> None:
    with pytest.raises(PlanError, match=where):
        LoraFA(**options)  # type: ignore[arg-type]
