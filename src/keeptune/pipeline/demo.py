"""keeptune demo: plain LoRA, LoRA-Null v1 and v2 and full fine-tuning on atlas, side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe

__all__ = ["METHODS", "demo", "demo_recipe"]

_log = logging.getLogger(__name__)

# One rule for every method: the lowest learning rate of the sweep at which it learns the task to 0.8.
# A lower rate always forgets less, so no method is shown at a rate that makes it look bad.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"name": "full"}, 2e-4),
    "lora": ({"name": "lora", "rank": 8, "alpha": 16}, 1e-3),
    "lora-null-v1": ({"name": "lora-null", "rank": 8, "variant": "v1"}, 2e-3),
    "lora-null-v2": ({"name": "lora-null", "rank": 8, "variant": "v2"}, 3.2e-2),
}
STEPS = 120


def demo_recipe(
    method: dict[str, Any], learning_rate: float, output: Path, *, seed: int, store: Path, steps: int = STEPS
) -> dict[str, Any]:
    """Write the recipe of one demo run.

    Args:
        method: The recipe's ``method`` section.
        learning_rate: Peak learning rate; it falls linearly to zero.
        output: The run folder.
        seed: Training seed.
        store: The store of statistics.
        steps: Optimiser steps.

    Returns:
        A recipe as a YAML file would hold it.
    """
    question = {"prompt": "{question}\nAnswer:", "answer": "{answer}", "metric": "exact_match"}
    topic = {"prompt": "{text}\nTopic:", "answer": "{topic}", "metric": "exact_match"}
    return {
        "model": "atlas",
        "method": method,
        "knowledge": {"file": "atlas:calibration.jsonl", "text": "{question}\nAnswer: {answer}", "examples": 256},
        "task": {"train": "atlas:topics.train.jsonl", "prompt": "{text}\nTopic:", "completion": " {topic}"},
        "train": {
            "learning_rate": learning_rate,
            "max_steps": steps,
            "per_device_train_batch_size": 32,
            "seed": seed,
        },
        "evaluate": [
            {"name": "facts", "role": "knowledge", "file": "atlas:facts.jsonl", "max_new_tokens": 16, **question},
            {"name": "topics", "role": "task", "file": "atlas:topics.test.jsonl", "max_new_tokens": 16, **topic},
        ],
        "output": str(output),
        "store": str(store),
        "device": "cpu",
    }


def demo(output: Path, *, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run every method with every seed and join the results.

    Args:
        output: Where; one folder per method and seed, and the joint report. Started again, it goes on.
        seeds: Training seeds.

    Returns:
        The report.
    """
    runs = []
    for seed in seeds:
        for name, (method, learning_rate) in METHODS.items():
            folder = output / f"{name}-seed{seed}"
            _log.info("demo: %s, seed %d", name, seed)
            values = demo_recipe(method, learning_rate, folder, seed=seed, store=output / "store")
            run(make_recipe(values, folder=Path(), where=f"demo {name}"))
            runs.append(folder)
    return write_report(runs, output)
