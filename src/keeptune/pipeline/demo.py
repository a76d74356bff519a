"""keeptune demo: plain LoRA, LoRA with 30% replay, LoRA with KL to the base, and keep, on atlas at their defaults.

All four train 120 steps at one learning rate: the lowest of the sweep 2.5e-4, 5e-4, 1e-3, 2e-3 at which plain LoRA
learns the task to 0.8. A lower rate forgets less, so that plain LoRA is not shown at a rate that makes it look bad.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe

_log = logging.getLogger(__name__)

LEARNING_RATE = 1e-3
STEPS = 120
_LORA = {"name": "lora", "rank": 8, "alpha": 16}
WAYS: dict[str, dict[str, Any]] = {  # what each adds to the recipe
    "lora": {"method": _LORA},
    "replay": {"method": _LORA, "replay": 0.3},
    "kl": {"method": _LORA, "penalties": ["kl"]},
    "keep": {"method": {"name": "keep"}},
}


def demo_recipe(
    method: Mapping[str, Any], learning_rate: float, output: Path, *, seed: int, store: Path, steps: int = STEPS
) -> dict[str, Any]:
    """Returns the recipe of one run of the demo, as a YAML file would hold it."""
    values: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("demo.yaml").read_text("utf-8"))
    values["train"] |= {"learning_rate": learning_rate, "max_steps": steps, "seed": seed}
    return values | {"method": dict(method), "output": str(output), "store": str(store)}


def demo(output: Path, *, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Runs each of the four with every seed and joins the results.

    Args:
        output: The folder of the joint report, with a folder in it per run; a killed demo goes on where it stopped.
        seeds: Training seeds.

    Returns:
        The report.
    """
    runs = []
    for seed in seeds:
        for name, way in WAYS.items():
            folder = output / f"{name}-seed{seed}"
            _log.info("demo: %s, seed %d", name, seed)
            values = demo_recipe(way["method"], LEARNING_RATE, folder, seed=seed, store=output / "store") | way
            run(make_recipe(values, folder=Path(), where=f"demo {name}"))
            runs.append(folder)
    return write_report(runs, output)
