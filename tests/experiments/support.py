"""Rows and points as a comparison has them, in as few words as tests can bear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keeptune.experiments.front import Place, Point
from keeptune.experiments.plan_runs import RunSpec
from keeptune.recipe.schema import Recipe


def benchmark(name: str, role: str, before: Any, after: Any, metric: str = "exact_match") -> dict[str, Any]:
    """A benchmark of a row."""
    n = 100
    return {
        "name": name,
        "role": role,
        "metric": metric,
        "n": n,
        "before": before,
        "after": after,
        "interval": [-0.15, 0.1],
    }


def row(label: str = "lora", rate: float = 1e-3, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A finished run that learned 0.6 and forgot 0.1."""
    return {
        "name": f"{label}-lr{rate}-seed{seed}",
        "label": label,
        "method": label.split(",", maxsplit=1)[0],
        "settings": {"train.learning_rate": rate},
        "learning_rate": rate,
        "strength": None,
        "variant": None,
        "of": None,
        "seed": seed,
        "status": "done",
        "message": "",
        "folder": "",
        "seconds": {"plan": 0.5, "train": 2.0, "evaluate": 1.0},
        "trained_parameters": 10,
        "benchmarks": [benchmark("task", "task", 0.2, 0.6), benchmark("facts", "knowledge", 0.8, 0.7)],
        "learned": 0.6,
        "forgotten": 0.1,
    } | more


def point(name: str, *places: Place, label: str = "lora", seeds: tuple[int, ...] | None = None) -> Point:
    """A point with the places of seeds 0, 1, ..., unless told."""
    numbered = zip(range(len(places)) if seeds is None else seeds, places, strict=True)
    return Point(name, tuple(row(label, seed=seed, learned=l, forgotten=f) for seed, (l, f) in numbered))  # noqa: E741


def spec(folder: Path, **more: Any) -> RunSpec:
    """A run of plain LoRA with seed 0, whose folder this is."""
    given: dict[str, Any] = {"name": "lora-lr0.001-seed0", "label": "lora", "method": "lora", "learning_rate": 1e-3}
    given |= {"settings": {"train.learning_rate": 1e-3}, "strength": None, "seed": 0}
    return RunSpec(**given | more, recipe=Recipe.model_construct(output=folder))
