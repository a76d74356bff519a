"""docs/results/demo.md and demo.png, the README's picture, from a demo of three seeds.

Run it: `make study`; or `keeptune demo --seeds 3 --output runs/demo3`, then `python studies/demo_page.py runs/demo3`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from drawing import png
from pictures import tradeoff

from keeptune.core.artefact import write_bytes
from keeptune.pipeline.demo import LEARNING_RATE, STEPS
from keeptune.report.numbers import markdown
from keeptune.report.pages.verdict import method_sentences, verdict
from keeptune.report.tables.comparison_table import comparison_columns

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MARKER = "<!-- written by hand below this line -->"


def main(run: Path) -> None:
    """Write the page and its picture; text below the marker is kept."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    seeds = sorted({method["seed"] for method in report["methods"]})
    png(tradeoff(report), RESULTS / "demo.png")
    page = RESULTS / "demo.md"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    parts = [
        "# The demo",
        f"`keeptune demo --seeds {len(seeds)}`: atlas (2.2 million parameters, 4,025 real facts) learns to label a "
        f"statement with its topic and object, a task it cannot do before. Plain LoRA, LoRA with 30% of the examples "
        f"replayed from the knowledge, LoRA with a KL penalty, and keep, each at its defaults; rank 8, all linear "
        f"maps, {STEPS} steps of 32 examples, a peak learning rate of {LEARNING_RATE:g}.",
        verdict(report),
        "![Learned against kept](demo.png)",
        table(report),
        "\n".join(f"- {sentence}" for sentence in method_sentences(report)),
        MARKER,
    ]
    notes = old.partition(MARKER)[2].strip()
    write_bytes(page, ("\n\n".join(parts) + "\n" + (f"\n{notes}\n" if notes else "")).encode())


def table(report: dict[str, Any]) -> str:
    """Return the comparison as a Markdown table."""
    heads, *rows = zip(*comparison_columns(report), strict=True)
    lines = [[markdown(", ".join(part for part in (head.main, head.note) if part)) for head in heads]]
    lines.append(["---", *["---:"] * (len(heads) - 1)])
    for row in rows:
        lines.append([markdown(" ".join(part for part in (cell.main, cell.note) if part)) for cell in row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo3"))
