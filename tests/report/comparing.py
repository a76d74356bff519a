"""A made-up comparison: thirty settings of three seeds, through the code that makes the records of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from keeptune.experiments.axes import axes_of
from keeptune.experiments.comparison_record import trade_off_of, with_axes

BENCHMARKS = [
    {"name": "facts", "role": "knowledge", "metric": "exact_match", "n": 360},
    {"name": "topics", "role": "task", "metric": "exact_match", "n": 300},
]
# What each label forgets for what it learns, and its strengths.
LABELS: dict[str, tuple[float, Sequence[float | None]]] = {
    "lora": (0.5, [None]),
    "lora + replay": (0.2, [0.05, 0.1]),
    "keep": (0.05, [0.3, 1.0, 3.0]),
    "lalora": (0.3, [0.3, 1.0, 3.0]),
}
RATES = (5e-4, 1e-3, 2e-3)
SCALES = (0.5, 0.75, 0.9)


def made_up(seeds: int = 3, names: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make ``runs.json`` and ``front.json``."""
    draw = numpy.random.default_rng(5)
    called = dict(zip(LABELS, names or LABELS, strict=False))
    rows: list[dict[str, Any]] = []
    for label, (cost, strengths) in LABELS.items():
        for rate in RATES:
            for strength in strengths:
                for seed in range(seeds):
                    learned = (
                        0.6 + 0.12 * numpy.log2(rate / 5e-4) - 0.02 * (strength or 0) + 0.01 * draw.standard_normal()
                    )
                    kept = 0.95 - cost * (learned - 0.4) + 0.01 * draw.standard_normal()
                    settings = {"train.learning_rate": rate} | ({"method.nats": 1e-3} if label == "keep" else {})
                    name = f"{label.replace(' ', '')}-lr{rate:g}" + ("" if strength is None else f"-x{strength:g}")
                    rows.append(
                        row(f"{name}-seed{seed}", called.get(label, label), rate, strength, seed, kept, learned)
                    )
                    rows[-1]["settings"] = settings
                    for scale in SCALES if label == "lora" and rate == 1e-3 else ():
                        variant = row(
                            f"{name}-seed{seed}/scale{scale:g}",
                            f"{called['lora']}, scaled",
                            *(rate, strength, seed, 0.95 - scale * (0.95 - kept), scale * learned),
                        )
                        rows.append(variant | {"variant": {"scale": scale}, "of": called["lora"]})
    rows[4] |= {"status": "failed", "message": "OutOfMemoryError: <b>too large</b>", "benchmarks": []}
    rows[7] |= {"status": "missing", "message": "", "benchmarks": []}
    axes = axes_of(BENCHMARKS, None, None)
    placed = with_axes(rows, axes)
    front = trade_off_of(placed, axes, 0.7, called["lora"])
    cells = {
        "base": "/models/tiny",
        "version": "0.1.0",
        "created": "2026-01-01",
        "command": "keeptune compare recipe.yaml",
        "recipe": {"model": "tiny", "compare": {"methods": list(called.values())}},
        "benchmarks": BENCHMARKS,
        "runs": placed,
    }
    return cells, front


def row(
    name: str, label: str, rate: float, strength: float | None, seed: int, kept: float, learned: float
) -> dict[str, Any]:
    """Make one cell."""
    scores = [(0.95, kept), (0.05, learned)]
    return {
        "name": name,
        "label": label,
        "method": label.split(",")[0],
        "settings": {},
        "learning_rate": rate,
        "strength": strength,
        "variant": None,
        "of": None,
        "seed": seed,
        "status": "done",
        "message": "",
        "folder": f"/runs/{name}",
        "seconds": {"plan": 1.0, "train": 20.0, "evaluate": 4.0},
        "trained_parameters": 109056,
        **dict.fromkeys(("x", "K", "T", "KT")),
        "benchmarks": [
            benchmark | {"before": before, "after": after, "interval": [after - before - 0.03, after - before + 0.03]}
            for benchmark, (before, after) in zip(BENCHMARKS, scores, strict=True)
        ],
    }
