"""The learning rates of the demo: a sweep of every method on atlas, as a table in docs/demo-sweep.md.

Run it: `make study` (about fifteen minutes on two cores). Killed and started again, it goes on.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from keeptune.core.artefact import write_bytes
from keeptune.demo import METHODS, demo_recipe
from keeptune.recipe import make_recipe
from keeptune.run import run

RATES = {
    "full": (2e-4, 5e-4, 1e-3, 2e-3),
    "lora": (5e-4, 1e-3, 2e-3, 4e-3),
    "lora-null-v1": (5e-4, 1e-3, 2e-3, 4e-3),
    "lora-null-v2": (1e-3, 2e-3, 4e-3, 8e-3),
}


def main(output: Path, page: Path) -> None:
    """Run the sweep and write the table."""
    lines = [
        "| method | learning rate | facts before | facts after | lost (points) | topics after |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rates in RATES.items():
        for rate in rates:
            recipe = demo_recipe(METHODS[name][0], rate, output / f"{name}-{rate:g}", seed=0, store=output / "store")
            report = run(make_recipe(recipe, folder=Path(), where=f"sweep {name}"))
            facts, topics = report["methods"][0]["benchmarks"]
            low, high = (-100 * end for end in reversed(facts["interval"]))
            lost = 100 * (facts["before"] - facts["after"])
            lines.append(
                f"| {name} | {rate:g} | {facts['before']:.3f} | {facts['after']:.3f} "
                f"| {lost:.1f} [{low:.1f}, {high:.1f}] | {topics['after']:.3f} |"
            )
            print(lines[-1], flush=True)
    text = (
        "# Learning rates of the demo\n\n"
        "Made by `make study`: rank 8, 120 steps of 32 examples, seed 0; 95% paired bootstrap intervals over items.\n\n"
    )
    write_bytes(page, (text + "\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sweep"), Path(__file__).parents[1] / "docs" / "demo-sweep.md")
