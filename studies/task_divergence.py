"""Does KL to the base on the task's own data predict forgetting, as RL's Razor (arXiv 2509.04259) has it?

`python studies/task_divergence.py runs/*` reads finished runs with the report of each: `kl_to_base` of their task
benchmarks, forward KL(base || tuned) per token of the right answers, and the share of the knowledge that was lost. It
writes docs/results/task-divergence.md; runs that measured no such KL are left out, by name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from keeptune.core.artefact import read_json, write_bytes


def main(folders: list[Path], docs: Path) -> None:
    """Read the runs, write the page."""
    rows = []
    for folder in folders:
        for entry in read_json(folder / "report.json")["methods"]:
            known = [b for b in entry["benchmarks"] if b["role"] == "knowledge"]
            tasks = [b for b in entry["benchmarks"] if b["role"] == "task" and b["kl_to_base"] is not None]
            if known and tasks:
                lost = 1 - sum(b["after"] / b["before"] for b in known) / len(known)
                rows.append(row_of(entry, tasks[0], lost))
            else:
                print(f"{folder} is left out: no KL on a task's answers, or no knowledge benchmark")
    rows.sort(key=lambda row: row["kl"])
    write_bytes(docs / "results" / "task-divergence.md", text(rows).encode())


def row_of(entry: dict[str, Any], task: dict[str, Any], lost: float) -> dict[str, Any]:
    """Put what is compared of one run together."""
    rate = entry["options"].get("train.learning_rate", entry["options"].get("learning_rate"))
    held = entry["name"] != "lora"
    return {"name": entry["name"], "rate": rate, "held": held, "kl": task["kl_to_base"], "lost": lost} | {
        "learned": task["after"]
    }


def text(rows: list[dict[str, Any]]) -> str:
    """Write the page: every run, and the rank correlation of all and of those that nothing holds."""
    lines = [
        "# KL on the task's data and forgetting",
        "",
        f"Made by `python studies/task_divergence.py` from {len(rows)} runs of the demo on atlas, one seed each.",
        "",
        "| run | rate | KL on the task, nats/token | facts lost | task learned |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        numbers = f"{row['kl']:.2f} | {row['lost']:.1%} | {row['learned']:.1%}"
        lines.append(f"| {row['name']} | {row['rate']} | {numbers} |")
    for words, some in (
        ("all", rows),
        ("plain LoRA", [row for row in rows if not row["held"]]),
        ("with keep, KL or replay", [row for row in rows if row["held"]]),
    ):
        rho = spearmanr([row["kl"] for row in some], [row["lost"] for row in some]).statistic
        lines += ["", f"Spearman's ρ, {words}: {rho:.2f} (n = {len(some)})."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]], Path(__file__).parents[1] / "docs")
