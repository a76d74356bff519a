"""Every penalty on atlas, each at a strength found by one rule, three seeds: docs/results/all-penalties.md.

Run it: `make study`, or `python studies/penalties.py [folder]` (about half an hour on two cores). Killed and started
again, it goes on.

LoRA of rank 8 at one learning rate, at which it learns the task to 0.9 without any penalty. The rule, the same for
all: the largest strength of a grid of factors of about three at which the task is still learned to 0.8 with seed 0. A
larger strength keeps more, so that no penalty is shown at a strength that makes it look bad.
"""

from __future__ import annotations

import logging
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cells import each, run_once, spread
from drawing import png
from pictures import tradeoff

from keeptune.core.artefact import read_json, write_bytes, write_json
from keeptune.pipeline.demo import demo_recipe
from keeptune.pipeline.reporting import write_report

RATE = 2e-3
WANTED = 0.8
SEEDS = (0, 1, 2)
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)
LORA = {"name": "lora", "rank": 8, "alpha": 16}
# Answers are known apart from questions, as tracing needs it.
ANSWERS = {"file": "atlas:calibration.jsonl", "prompt": "{question}\nAnswer:", "completion": " {answer}"}


@dataclass(frozen=True)
class Entry:
    """A penalty and the strength its search starts from.

    Args:
        penalty: The recipe's ``penalties`` entry, without a strength; empty for none.
        start: First strength tried; None where there is nothing to try.
        changes: Other keys of the recipe.
        share: Where the strength is written, for what is no penalty.
    """

    penalty: dict[str, Any]
    start: float | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    share: str | None = None


def _laplace(curvature: str, **options: Any) -> dict[str, Any]:
    return {"name": "laplace", "curvature": curvature, **options}


ENTRIES: dict[str, Entry] = {
    "none": Entry({}),
    "l2": Entry({"name": "l2"}, 300.0),
    "l2, cubic": Entry({"name": "l2", "layers": "cubic"}, 300.0),
    "l2, naie": Entry({"name": "l2", "layers": "naie"}, 300.0, {"knowledge": ANSWERS}),
    "diag": Entry(_laplace("diag"), 100.0),
    "b-kfac": Entry(_laplace("b-kfac"), 100.0),
    "delta-kfac": Entry(_laplace("delta-kfac"), 1000.0),
    "delta-act": Entry(_laplace("delta-act"), 1000.0),
    "ewc": Entry({"name": "ewc"}, 100.0),
    "kl": Entry({"name": "kl"}, 3.0),
    "replay": Entry({}, 0.3, share="replay"),
}
_HEAD = """# All penalties on atlas

Made by `python studies/penalties.py` (part of `make study`). LoRA, rank 8, 120 steps of 32 examples at a peak rate of
2e-3; mean ± standard deviation over seeds 0 to 2. Each penalty is shown at the largest strength of a grid of factors of
about three at which the task is still learned to 80% with seed 0 (*: it never was). For replay the strength is the
share of knowledge in the data. 256 examples of knowledge, none of them scored. Sorted by facts kept.

![Kept against learned](all-penalties.png)

| penalty | strength | facts, % | topics, % |
| --- | ---: | ---: | ---: |"""
_TRIED = "| penalty | strength: topics / facts |\n| --- | --- |"


def main(output: Path, docs: Path) -> None:
    """Find the strengths, run the other seeds, write the page and the picture."""
    names = [name for name in ENTRIES if len(sys.argv) < 3 or name in sys.argv[2:]]
    found = dict(zip(names, each(partial(find_strength, output), names), strict=True))
    cells = [(name, found[name]["strength"], seed) for seed in SEEDS for name in names]
    folders = each(partial(cell, output), *zip(*cells, strict=True))
    if len(names) < len(ENTRIES):
        return
    report = write_report(folders, output)
    for entry, (name, strength, _) in zip(report["methods"], cells, strict=True):
        entry["name"], entry["label"], entry["strength"] = name, name, strength
    png(tradeoff(report), docs / "results" / "all-penalties.png")
    write_json(output / "table.json", {"strengths": found})
    write_bytes(docs / "results" / "all-penalties.md", page(report, found).encode())


def find_strength(output: Path, name: str) -> dict[str, Any]:
    """Search the grid up or down from the start.

    Args:
        output: Where runs go.
        name: The penalty.

    Returns:
        ``strength``, whether the wanted score was ``reached``, and every strength ``tried`` with its scores.
    """
    strength, tried = ENTRIES[name].start, {}
    while len(tried) < 6:
        folder = cell(output, name, strength, 0)
        facts, topics = (read_json(folder / "report.json")["methods"][0]["benchmarks"][i]["after"] for i in (0, 1))
        tried[strength or 0.0] = {"facts": facts, "topics": topics}
        print(f"{name} at {strength}: facts {facts:.3f}, topics {topics:.3f}", flush=True)
        if strength is None:
            break
        place = GRID.index(strength) + (1 if topics >= WANTED else -1)
        if not 0 <= place < len(GRID) or GRID[place] in tried or (ENTRIES[name].share and GRID[place] >= 1):
            break  # the grid is crossed between a strength that is too much and one that is not
        strength = GRID[place]
    enough = [s for s, scores in tried.items() if scores["topics"] >= WANTED]
    best = max(enough) if enough else max(tried, key=lambda s: tried[s]["topics"])
    return {
        "strength": best or None,
        "reached": bool(enough),
        "tried": {f"{s:g}": tried[s] for s in sorted(tried)},
    }


def cell(output: Path, name: str, strength: float | None, seed: int) -> Path:
    """Run one penalty once.

    Args:
        output: Where runs go.
        name: The penalty.
        strength: Its strength.
        seed: Training seed.

    Returns:
        The run folder.
    """
    entry = ENTRIES[name]
    folder = output / f"{name}-{strength or 0:g}-seed{seed}"
    values = demo_recipe(LORA, RATE, folder, seed=seed, store=output / "store") | entry.changes
    if entry.penalty:
        values["penalties"] = [{**entry.penalty, "strength": strength}]
    elif entry.share:
        values[entry.share] = strength
    return run_once(values, name)


def page(report: dict[str, Any], found: dict[str, Any]) -> str:
    """Write the page.

    Args:
        report: The joint report, with the study's names.
        found: Strengths per penalty.

    Returns:
        Markdown.
    """
    rows = []
    for name in found:
        runs = [entry for entry in report["methods"] if entry["name"] == name]
        facts, topics = ([100 * run["benchmarks"][i]["after"] for run in runs] for i in (0, 1))
        mark = "" if found[name]["reached"] else " *"
        strength = "" if found[name]["strength"] is None else f"{found[name]['strength']:g}"
        scores = f"{spread(facts)} | {spread(topics)}"
        rows.append((statistics.mean(facts), f"| {name}{mark} | {strength} | {scores} |"))
    table = "\n".join(row for _, row in sorted(rows, reverse=True))
    tried = "\n".join(
        f"| {name} | "
        + ", ".join(f"{s}: {r['topics']:.2f} / {r['facts']:.2f}" for s, r in found[name]["tried"].items())
        + " |"
        for name in found
    )
    return f"{_HEAD}\n{table}\n\n## Strengths tried (seed 0)\n\n{_TRIED}\n{tried}\n"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/all-penalties"), Path(__file__).parents[1] / "docs")
