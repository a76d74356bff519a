"""The learning rates of the demo: a sweep of every method on atlas, as a table and a picture in docs/.

Run it: `make study` (about ten minutes on two cores). Killed and started again, it goes on.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from keeptune.core.artefact import write_bytes
from keeptune.pipeline.demo import METHODS, demo_recipe
from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe
from keeptune.report.figures.drawing import png

RATES = {
    "full": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    "lora": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "lora-null-v1": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "lora-null-v2": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
}
LOOKS: dict[str, tuple[str, str, tuple[int, int], str]] = {  # colour, marker, where the rate is written
    "full": ("#0072b2", "o", (7, 4), "left"),
    "lora": ("#d55e00", "s", (-7, -11), "right"),
    "lora-null-v1": ("#009e73", "^", (6, 3), "left"),
    "lora-null-v2": ("#a0408a", "D", (-6, -13), "right"),
}
Point = dict[str, Any]


def sweep(output: Path) -> dict[str, list[Point]]:
    """Run every method at every rate.

    Args:
        output: Where runs go.

    Returns:
        Method to one point per rate: ``rate``, ``facts``, ``before``, ``low``, ``high``, ``topics``.
    """
    found: dict[str, list[Point]] = {}
    for name, rates in RATES.items():
        for rate in rates:
            recipe = demo_recipe(METHODS[name][0], rate, output / f"{name}-{rate:g}", seed=0, store=output / "store")
            report = run(make_recipe(recipe, folder=Path(), where=f"sweep {name}"))
            facts, topics = report["methods"][0]["benchmarks"]
            low, high = facts["interval"]
            point = {"rate": rate, "before": facts["before"], "facts": facts["after"], "topics": topics["after"]}
            found.setdefault(name, []).append(point | {"low": low, "high": high})
            print(name, point, flush=True)
    return found


def table(found: dict[str, list[Point]]) -> str:
    """Write the points as a Markdown table.

    Args:
        found: From :func:`sweep`.

    Returns:
        The table.
    """
    lines = [
        "| method | learning rate | facts before | facts after | lost, points | topics after |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, points in found.items():
        for p in points:
            lost = f"{100 * (p['before'] - p['facts']):.1f} [{-100 * p['high']:.1f}, {-100 * p['low']:.1f}]"
            numbers = f"{p['before']:.3f} | {p['facts']:.3f} | {lost.replace('-0.0', '0.0')} | {p['topics']:.3f}"
            lines.append(f"| {name} | {p['rate']:g} | {numbers} |")
    return "\n".join(lines) + "\n"


def picture(found: dict[str, list[Point]]) -> Figure:
    """Draw what was kept against what was learned, one line per method through its learning rates.

    Args:
        found: From :func:`sweep`.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, points in found.items():
        colour, marker, offset, side = LOOKS[name]
        x = [p["topics"] for p in points]
        y = [100 * p["facts"] / p["before"] for p in points]
        bars = [[100 * (p["facts"] - p["before"] - p["low"]) / p["before"] for p in points]]
        bars.append([100 * (p["high"] - p["facts"] + p["before"]) / p["before"] for p in points])
        axes.errorbar(
            x, y, yerr=bars, color=colour, marker=marker, markersize=7, linewidth=1.6, elinewidth=0.8, label=name
        )
        for p, at_x, at_y in zip(points, x, y, strict=True):
            rate = f"{p['rate']:.1e}".replace(".0e", "e").replace("e-0", "e-")
            style = {"textcoords": "offset points", "fontsize": 7, "color": colour, "ha": side}
            axes.annotate(rate, (at_x, at_y), offset, **style)
    axes.axhline(100, color="#999999", linewidth=0.8, linestyle="--")
    axes.set(xlabel="learned: topics (accuracy after training)", ylabel="kept: facts (% of the base)", ylim=(0, 105))
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", title="small numbers: learning rates")
    return figure


def main(output: Path, docs: Path) -> None:
    """Run the sweep, write the page and the picture."""
    found = sweep(output)
    png(picture(found), docs / "results" / "sweep.png")
    text = (
        "# Learning rates of the demo\n\n"
        "Made by `make study`: rank 8, 120 steps of 32 examples, linear decay, seed 0; 95% paired bootstrap intervals "
        "over items. Up and to the right is better.\n\n![Kept against learned, by learning rate](sweep.png)\n\n"
    )
    write_bytes(docs / "results" / "demo-sweep.md", (text + table(found)).encode())


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sweep"), Path(__file__).parents[1] / "docs")
