from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS
from tests.plan_differences import differences

from keeptune.core.errors import ArtefactError, PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.core.weights import read_weight


def target(name: str = "model.layers.0.mlp.up_proj", m: int = 6, n: int = 5) -> Target:
    return Target(name=name, layer=0, role="up_proj", out_features=m, in_features=n, input_group=name)


def target_plan(seed: int = 0, rank: int = 2, name: str = "model.layers.0.mlp.up_proj", **extra: Any) -> TargetPlan:
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {
        "target": target(name),
        "decision": Decision(rank),
        "init": LowRank(torch.randn(6, rank, generator=generator), torch.randn(rank, 5, generator=generator)),
        "scale": 0.5,
        "trainable": frozenset({"A", "B"}),
        "evidence": {"spectrum": torch.randn(rank, generator=generator)},
    }
    return TargetPlan(**fields | extra)


def plan(*targets: TargetPlan, **extra: Any) -> Plan:
    fields: dict[str, Any] = {"method": "m", "options": {"rank": 2, "alpha": None}, "provenance": {"model": "abc"}}
    return Plan(targets=targets or (target_plan(),), **fields | extra)


CHANGES: dict[str, Callable[[], Plan]] = {
    "method": lambda: plan(method="other"),
    "options": lambda: plan(options={"rank": 3, "alpha": None}),
    "scope": lambda: plan(scope="all"),
    "peft": lambda: plan(peft={"lora_dropout": 0.1}),
    "provenance": lambda: plan(provenance={"model": "abd"}),
    "factors": lambda: plan(target_plan(seed=1)),
    "scale": lambda: plan(target_plan(scale=0.25)),
    "trainable": lambda: plan(target_plan(trainable=frozenset({"B"}))),
    "rows": lambda: plan(target_plan(decision=Decision(2, rows=(0, 3)))),
    "rank": lambda: plan(target_plan(rank=3)),
    "training": lambda: plan(training={"optimizer": "lora-fa"}),
    "vectors": lambda: plan(target_plan(vectors={"magnitude": torch.ones(6)})),
    "added": lambda: plan(target_plan(added=True)),
    "name": lambda: plan(target_plan(name="model.layers.1.mlp.up_proj")),
    "more": lambda: plan(target_plan(), target_plan(name="model.layers.1.mlp.up_proj")),
}


def test_equal_plans_have_equal_keys() -> None:
    assert plan().key == plan().key


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_everything_that_training_starts_from(change: str) -> None:
    assert CHANGES[change]().key != plan().key


@pytest.mark.parametrize("change", CHANGES)
def test_save_and_load_is_the_identity(tmp_path: Path, change: str) -> None:
    made = CHANGES[change]()
    made.save(tmp_path / "plan")
    found = Plan.load(tmp_path / "plan")
    assert found.key == made.key
    assert differences(found, made) == []
    for a, b in zip(found.targets, made.targets, strict=True):
        assert (a.target, a.decision, a.scale, a.trainable) == (b.target, b.decision, b.scale, b.trainable)
        assert a.added == b.added
        assert a.evidence.keys() == b.evidence.keys()
        assert all(torch.equal(a.evidence[name], b.evidence[name]) for name in b.evidence)
        assert a.vectors.keys() == b.vectors.keys()
        assert all(torch.equal(a.vectors[name], b.vectors[name]) for name in b.vectors)
    assert (found.scope, found.peft, found.training) == (made.scope, made.peft, made.training)


@pytest.mark.parametrize("file", ["factors.safetensors", "evidence.safetensors", "plan.json"])
@pytest.mark.parametrize("damage", ["cut", "remove", "flip"])
def test_a_damaged_plan_is_refused(tmp_path: Path, file: str, damage: str) -> None:
    plan().save(tmp_path / "plan")
    path = tmp_path / "plan" / file
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"\x00" + data[1:])
    with pytest.raises(ArtefactError):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    "record", [[], {"format": 0}, {"format": 1}, {"format": 1, "files": {}}, "text"], ids=lambda value: str(value)
)
def test_json_that_is_no_plan_is_refused(tmp_path: Path, record: Any) -> None:
    plan().save(tmp_path / "plan")
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ArtefactError):
        Plan.load(tmp_path / "plan")


def test_saving_over_a_plan_replaces_it(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan")
    CHANGES["factors"]().save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").key == CHANGES["factors"]().key


def test_a_target_is_found_by_name_and_an_unknown_one_is_a_key_error() -> None:
    made = CHANGES["more"]()
    assert made["model.layers.1.mlp.up_proj"] is made.targets[1]
    with pytest.raises(KeyError):
        made["model.layers.2.mlp.up_proj"]


def test_an_adapter_plan_without_targets_is_refused_and_full_tuning_needs_none() -> None:
    with pytest.raises(PlanError, match="no target with a rank above 0"):
        Plan(method="m", options={}, targets=())
    assert Plan(method="m", options={}, targets=(), scope="all").targets == ()


def test_anchored_unless_the_start_is_zero() -> None:
    assert target_plan().anchored
    assert not target_plan(init=LowRank(torch.zeros(6, 2), torch.ones(2, 5))).anchored
    assert not target_plan(added=True).anchored


def test_trained_parameters_count_the_trained_factors() -> None:
    counts = [target_plan(trainable=frozenset(names)).trained_parameters for names in ("AB", "A", "B", "")]
    assert counts == [2 * 5 + 6 * 2, 2 * 5, 6 * 2, 0]


def test_a_summary_row_tells_all_that_was_decided() -> None:
    made = plan(target_plan(evidence={"spectrum": torch.tensor([2.0, 1.0])}))
    assert made.summary() == [
        {
            "target": "model.layers.0.mlp.up_proj",
            "layer": 0,
            "role": "up_proj",
            "shape": [6, 5],
            "rank": 2,
            "scale": 0.5,
            "trains": ["A", "B"],
            "trained_parameters": 22,
            "evidence": {"spectrum": [2.0, 1.0]},
        }
    ]


# diff


def test_equal_plans_do_not_differ() -> None:
    assert differences(plan(), plan()) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("method", "method: m "),
        ("options", "'rank': 2"),
        ("scale", "scale 0.5 | 0.25"),
        ("rank", "rank 2 | 3"),
        ("trainable", "trains A B | B"),
        ("factors", "starting change differs by"),
        ("vectors", "same factors, another start of magnitude"),
        ("training", "training: {} | {'optimizer': 'lora-fa'}"),
        ("more", "model.layers.1.mlp.up_proj: only in the second plan"),
    ],
)
def test_a_difference_is_one_line_that_names_it(change: str, told: str) -> None:
    (line,) = differences(plan(), CHANGES[change]())
    assert told in line


def test_a_difference_is_told_from_either_side() -> None:
    (line,) = differences(CHANGES["more"](), plan())
    assert line == "model.layers.1.mlp.up_proj: only in the first plan"


def test_the_size_of_a_difference_in_the_start_is_relative() -> None:
    start = target_plan()
    moved = dataclasses.replace(start, init=LowRank(start.init.B * 1.25, start.init.A))
    (line,) = differences(plan(moved), plan(start))
    assert "2.50e-01" in line


def test_plans_of_models_of_other_sizes_differ_instead_of_failing() -> None:
    wider = target_plan(target=target(n=7), init=LowRank(torch.ones(6, 2), torch.ones(2, 7)))
    (line,) = differences(plan(), plan(wider))
    assert "6 x 5 | 6 x 7" in line


# read_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "transposed"), [("llama", False), ("gpt2", True)])
def test_read_weight_gives_a_float32_copy_in_the_layout_of_the_equations(
    architecture: str, transposed: bool, dtype: torch.dtype
) -> None:
    model = MODELS[architecture](dtype=dtype)
    name = "model.layers.0.mlp.up_proj" if architecture == "llama" else "transformer.h.0.mlp.c_fc"
    stored = model.get_submodule(name).weight
    wanted = Target(name, 0, "up", 48, 32, name, transposed=transposed)
    found = read_weight(model, wanted)
    assert found.shape == (48, 32)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, (stored.T if transposed else stored).float())
    assert not found.requires_grad
    kept = stored.detach().clone()
    found.zero_()
    assert torch.equal(stored, kept)
