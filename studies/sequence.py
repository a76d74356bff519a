"""Three tasks one after the other on atlas: docs/results/sequence-tables.md, to which docs/guides/sequence.md refers.

Run it: `make study`, or `python studies/sequence.py [folder] [seeds]` (about seven minutes a seed on one quiet core).
Killed and started again, it goes on. The recipe is recipes/atlas-sequence.yaml; only method and replay differ.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keeptune.core.artefact import write_bytes
from keeptune.experiments.entries import slug
from keeptune.experiments.sequence.run_stages import run_sequence
from keeptune.experiments.sequence.stages_section import load_sequence

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "atlas-sequence.yaml"
KEEP = {"name": "keep", "rank": 8, "alpha": 16}
WAYS: dict[str, dict[str, Any]] = {  # what each changes of the recipe
    "LoRA": {"replay": 0.0},
    "LoRA + replay": {},
    "keep": {"method": KEEP, "replay": 0.0},
    "keep, 0.1 nats": {"method": KEEP | {"nats": 0.1}, "replay": 0.0},
}
MEASURES = {
    "average_accuracy": "average accuracy",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
}
_HEAD = """# Three tasks one after the other on atlas: all figures

Made by `python studies/sequence.py` (in `make study`); [sequence.md](../guides/sequence.md) says what they mean. The
recipe is [atlas-sequence.yaml](../../recipes/atlas-sequence.yaml): rank 8 at every target, 120 steps of 32 examples
in each stage, a peak rate of 4e-3. Scores and measures in per cent{spread}. Replay: 30% of the training examples are
knowledge, drawn from 256 facts and 128 examples of each stage before. keep: its default budget on the same data, and
ten times that.
"""


def main(output: Path, docs: Path, seeds: Sequence[int]) -> None:
    """Run every way with every seed; then write the page."""
    logging.getLogger("keeptune").setLevel(logging.INFO)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in seeds:
        for way, options in WAYS.items():
            folder = output / f"{slug(way)}-seed{seed}"
            own = {"output": str(folder), "store": str(output / "store"), "train.seed": seed}
            found[way].append(run_sequence(load_sequence(RECIPE, options | own)))
            print(way, seed, {key: found[way][-1][key] for key in MEASURES}, flush=True)
    write_bytes(docs / "results" / "sequence-tables.md", page(found, seeds).encode())


def page(found: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> str:
    """Write the page.

    Args:
        found: Way to a record for each seed.
        seeds: The seeds.

    Returns:
        Markdown.
    """
    spread = f"; mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "; seed 0"
    lines = [_HEAD.format(spread=spread), "## At the end", ""]
    names = [b["name"] for b in next(iter(found.values()))[0]["benchmarks"]]
    known = [i for i, b in enumerate(next(iter(found.values()))[0]["benchmarks"]) if b["role"] == "knowledge"]
    lines += [f"| | {' | '.join(MEASURES.values())} | {' | '.join(f'{names[i]} at the end' for i in known)} |"]
    lines += ["| --- |" + " ---: |" * (len(MEASURES) + len(known))]
    for way, records in found.items():
        cells = [told([record[key] for record in records]) for key in MEASURES]
        cells += [told([record["scores"][-1][i] for record in records]) for i in known]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for way, records in found.items():
        lines += ["", f"## {way}: scores after each stage", "", f"| after | {' | '.join(names)} |"]
        lines += ["| --- |" + " ---: |" * len(names)]
        for row, stage in enumerate(["base", *(stage["name"] for stage in records[0]["stages"])]):
            cells = [told([record["scores"][row][i] for record in records]) for i in range(len(names))]
            lines.append(f"| {stage} | {' | '.join(cells)} |")
        ranks = {record["stages"][-1]["rank"] for record in records}
        gap = max(stage["relative_gap"] for record in records for stage in record["stages"])
        lines += ["", f"The adapter for the base: rank {', '.join(map(str, sorted(ranks)))}; largest relative gap in "]
        lines[-1] += f"logits of a product to what was trained, {gap:.0e}."
    return "\n".join(lines) + "\n"


def told(values: Sequence[float]) -> str:
    """Write a mean in per cent, with its spread over seeds where there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sequence")
    main(folder, ROOT / "docs", tuple(range(int(sys.argv[2]))) if len(sys.argv) > 2 else (0, 1, 2))
