"""Benchmarks while training: when, what is logged, what is kept, and that training itself is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.support import EXAMPLES, TOKENIZER, arguments, largest_gap, planned, tuned
from trl import SFTConfig

from keeptune.adapter.install import trained_state
from keeptune.core.errors import TrainError
from keeptune.methods.lora import Lora
from keeptune.penalties.l2 import L2
from keeptune.training.evaluations import Evaluations
from keeptune.training.trainer import Beside, train

ROWS = [
    {"step": 0, "eval_forgetting": 0.0, "eval_learned": 0.9},
    {"step": 1, "loss": 3.0},
    {"step": 2, "eval_forgetting": 0.01, "eval_learned": 0.5},
    {"step": 4, "eval_forgetting": 0.02, "eval_learned": 0.5},
    {"step": 6, "eval_forgetting": 0.03, "eval_learned": 0.7},
    {"step": 8, "eval_forgetting": 0.01, "eval_learned": 0.9},
]


@pytest.mark.parametrize(
    ("limit", "step"),
    [(None, None), (0.005, None), (0.01, 2), (0.02, 2), (0.03, 8)],
    ids=["no limit", "none within", "one", "of equals that which forgets less", "most learned"],
)
def test_the_best_learned_most_before_too_much_was_lost(limit: float | None, step: int | None) -> None:
    best = Evaluations(dict, limit).best(ROWS)
    assert (None if best is None else best["step"]) == step


def test_of_nothing_learned_the_last_is_the_best() -> None:
    rows = [{key: value for key, value in row.items() if key != "eval_learned"} for row in ROWS]
    best = Evaluations(dict, 0.03).best(rows)
    assert best is not None and best["step"] == 8


def _trained(folder: Path, evaluations: Evaluations | None, **extra: Any) -> tuple[list[Any], dict[str, Any]]:
    plan = planned(Lora(rank=2, dropout=0.1), [L2(strength=1.0)], store=folder / "store")
    model = tuned(plan)
    if evaluations is not None:
        extra |= {"eval_strategy": "steps", "eval_steps": 2}
    own = {"bf16": False, "activation_checkpointing": False, "max_steps": 6, "seed": 1} | extra
    rows = train(
        model, plan, TOKENIZER, EXAMPLES, SFTConfig(**arguments(folder, **own)), beside=Beside(None, evaluations)
    )
    return rows, trained_state(model, plan)


def _script(*forgotten: float) -> Any:
    left = list(forgotten)
    return lambda: {
        "eval_facts": float(torch.rand(1)),
        "eval_forgetting": left.pop(0),
        "eval_learned": 1.0 - len(left) / 10,
    }


def test_training_is_the_same_with_evaluations_and_ends_as_it_was_where_too_much_was_lost(tmp_path: Path) -> None:
    plain, last = _trained(tmp_path / "plain", None)
    watched, same = _trained(tmp_path / "watched", Evaluations(_script(0.0, 0.0, 0.0)))
    losses = [row for row in watched if "loss" in row]
    assert [row["loss"] for row in losses] == [row["loss"] for row in plain]
    assert [row["step"] for row in watched if "eval_facts" in row] == [2, 4, 6]
    assert largest_gap(last, same) == 0

    _, early = _trained(tmp_path / "early", None, max_steps=2)
    stopped, kept = _trained(tmp_path / "stopped", Evaluations(_script(0.01, 0.05), 0.02))
    assert [row["step"] for row in stopped if "loss" in row] == [1, 2, 3, 4], "it stops where too much is lost"
    assert largest_gap(early, kept) == 0 and largest_gap(last, kept) > 0
    assert [row["eval_forgetting"] for row in stopped if "eval_forgetting" in row] == [0.01, 0.05]


@pytest.mark.parametrize(
    ("script", "told"),
    [((0.5,), r"0\.5 lost at step 2, wanted an evaluation at which at most 0\.02"), ((), "scores 0")],
)
def test_where_nothing_is_within_the_limit_it_is_said(script: Any, told: str, tmp_path: Path) -> None:
    score = _script(*script) if script else lambda: {"eval_facts": 0.0}
    with pytest.raises(TrainError, match=told):
        _trained(tmp_path, Evaluations(score, 0.02))
