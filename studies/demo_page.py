"""docs/results/demo.md and docs/results/tradeoff.png from a demo of three seeds.

Run it: `make study`; or `keeptune demo --seeds 3 --output runs/demo3`, then `python studies/demo_page.py runs/demo3`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pictures import relations, tradeoff

from keeptune.core.artefact import write_bytes
from keeptune.pipeline.demo import METHODS, STEPS
from keeptune.report.figures.drawing import png
from keeptune.report.pages.verdict import method_sentences, verdict
from keeptune.report.tables.comparison_table import markdown_comparison

DOCS = Path(__file__).parents[1] / "docs"
MARKER = "<!-- written by hand below this line -->"


def main(run: Path) -> None:
    """Write the page and its pictures; text below the marker is kept."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    seeds = sorted({method["seed"] for method in report["methods"]})
    for name, figure in {"tradeoff.png": tradeoff(report), "by-relation.png": relations(report)}.items():
        png(figure, DOCS / name)
    page = DOCS / "demo.md"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    rates = ", ".join(f"{name} {rate:g}" for name, (_, rate) in METHODS.items())
    parts = [
        "# The demo",
        f"`keeptune demo --seeds {len(seeds)}`: atlas (2.2 million parameters, 4,025 real facts) learns to label a "
        f"statement with its topic and object, a task it cannot do before; rank 8, all linear maps, {STEPS} steps of "
        f"32 examples, linear decay. Peak learning rates: {rates}; the [sweep](demo-sweep.md) says why. "
        "K, T and KT are FARSS's (appendix A.3).",
        verdict(report),
        "![Learned against kept](tradeoff.png)",
        markdown_comparison(report),
        "\n".join(f"- {sentence}" for sentence in method_sentences(report)),
        "![Points lost by relation](by-relation.png)",
        MARKER,
    ]
    notes = old.partition(MARKER)[2].strip()
    write_bytes(page, ("\n\n".join(parts) + "\n" + (f"\n{notes}\n" if notes else "")).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo3"))
