"""A made-up sequence of three stages, with the measures computed by hand."""

from __future__ import annotations

from typing import Any


def made_up(names: tuple[str, str, str] = ("sums", "cities", "formats")) -> dict[str, Any]:
    """Make ``sequence.json``: R = [[.8, .1, 0], [.9, .7, .2], [.6, .75, 1]] on the tasks."""
    benchmarks = [
        {"name": "facts", "role": "knowledge", "metric": "exact_match", "n": 360, "stage": None},
        {"name": "wiki", "role": "knowledge", "metric": "cross_entropy", "n": 50, "stage": None},
        *({"name": f"{name} test", "role": "task", "metric": "exact_match", "n": 80, "stage": name} for name in names),
    ]
    tasks = [[0.05, 0.05, 0.0], [0.8, 0.1, 0.0], [0.9, 0.7, 0.2], [0.6, 0.75, 1.0]]
    scores = [[0.95 - 0.1 * i, 2.4 + 0.05 * i, *row] for i, row in enumerate(tasks)]
    intervals: list[list[list[float] | None]] = [[None] * 5]
    intervals += [[[s - b - 0.03, s - b + 0.03] for s, b in zip(row, scores[0], strict=True)] for row in scores[1:]]
    return {
        "base": "/models/tiny",
        "version": "0.1.0",
        "created": "2026-01-01",
        "stages": [
            {
                "name": name,
                "method": method,
                "options": {"rank": 8, "seed": None},
                "seed": 0,
                "folder": f"/runs/stages/{place + 1}",
                "adapter": f"/runs/after/{place + 1}/adapter",
                "rank": 8 * (place + 1),
                "gap": 1e-6,
                "relative_gap": 1e-7,
                "note": "",
                "trained_parameters": 109056,
                "seconds": 21.5,
                "loss": [{"step": step, "loss": 3 / (1 + step)} for step in range(12)],
            }
            for place, (name, method) in enumerate(zip(names, ("lora", "keep", "lora-null"), strict=True))
        ],
        "benchmarks": benchmarks,
        "scores": scores,
        "intervals": intervals,
        "average_accuracy": (0.6 + 0.75 + 1) / 3,
        "backward_transfer": ((0.6 - 0.8) + (0.75 - 0.7)) / 2,
        "forward_transfer": ((0.1 - 0.05) + (0.2 - 0.0)) / 2,
        "forgetting": ((0.9 - 0.6) + (0.7 - 0.75)) / 2,
        "forgetting_of_each": dict(zip(names, (0.3, -0.05), strict=False)),
        "course": [
            {"average_accuracy": 0.8, "forgetting": None},
            {"average_accuracy": 0.8, "forgetting": -0.1},
            {"average_accuracy": 0.7833, "forgetting": 0.125},
        ],
        "why": "",
        "adapter": "/runs/adapter",
        "export": {"serve": "vllm serve /models/tiny"},
        "final": None,
        "recipes": {name: {"model": "tiny", "method": {"name": "lora"}} for name in names},
    }
