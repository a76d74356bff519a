"""A difference of plans is told whole but short, however many targets differ."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.plan_differences import differences
from keeptune.core.target import Target
from keeptune.report.tables.plan_diff import print_diff


def target(layer: int, role: str, rank: int = 2, seed: int = 0, **changes: Any) -> TargetPlan:
    name = f"model.layers.{layer}.{role}"
    where = Target(name, layer=layer, role=role, out_features=5, in_features=4, input_group=name)
    draw = torch.Generator().manual_seed(seed)
    start = LowRank(B=torch.randn(5, rank, generator=draw), A=torch.randn(rank, 4, generator=draw))
    made = TargetPlan(where, Decision(rank), start, scale=1.0, trainable=frozenset({"A", "B"}))
    return replace(made, **changes)


def plan(*targets: TargetPlan, method: str = "lora", **options: Any) -> Plan:
    return Plan(method, options, targets)


def told(first: Plan, second: Plan) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    differ = print_diff(first, second, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert differ is bool(text) is bool(differences(first, second))
    return [" ".join(line.split()) for line in text.splitlines() if line.strip() and "──" not in line]


def test_equal_plans() -> None:
    assert told(plan(target(0, "q")), plan(target(0, "q"))) == []


def test_ranks_stand_side_by_side() -> None:
    one = plan(target(0, "q", 3), target(0, "v"), target(1, "q"), rank=3, alpha=None)
    two = plan(target(0, "q", 2), target(0, "v"), target(1, "v", 4), rank=2, alpha=None)
    assert told(one, two) == [
        "method.rank: 3 | 2",
        "ranks that differ: 3 of 4 targets",
        "layer q v",
        "0 3 | 2 2",
        "1 2 | – – | 4",
    ]


def test_many_changed_starts_are_one_line() -> None:
    one = plan(*(target(layer, "q", seed=1) for layer in range(40)), target(0, "v"))
    two = plan(*(target(layer, "q", seed=2) for layer in range(40)), target(0, "v"))
    (line,) = told(one, two)
    mine, theirs = one.targets[0].init.dense(), two.targets[0].init.dense()
    size = float((mine - theirs).norm() / theirs.norm())
    assert line == f"changed starts: 40 targets of the same rank, relative difference {size:.1e}"


def test_scale_and_training_are_counted() -> None:
    two = plan(target(0, "q", scale=2.0, trainable=frozenset({"B"})), target(1, "q", scale=2.0))
    assert told(plan(target(0, "q"), target(1, "q")), two) == [
        "scale 1 | 2: at 2 targets",
        "trains A B | B: at 1 target",
    ]


def test_the_same_change_from_other_factors() -> None:
    start = target(0, "q").init
    zero = LowRank(B=torch.zeros(5, 2), A=start.A)
    other = LowRank(B=torch.zeros(5, 2), A=start.A + 1)
    (line,) = told(plan(target(0, "q", init=zero)), plan(target(0, "q", init=other)))
    assert line == "changed starts: 1 target of the same rank, with other factors of the same change"


def test_another_method_and_other_vectors() -> None:
    taken = [target(layer, "q", vectors={"bias": torch.ones(5)}) for layer in range(8)]
    lines = told(plan(*taken, method="pissa"), plan(*(target(layer, "q") for layer in range(8))))
    assert lines[0] == "method: pissa | lora"
    assert "model.layers.0.q: same factors, another start of bias" in lines[1]
    assert lines[-1] == "and 2 more targets differ"
    assert len(lines) == 1 + 6 + 1
