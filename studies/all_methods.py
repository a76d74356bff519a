"""Every method on atlas, each at a learning rate found by one rule, three seeds: docs/results/all-methods.md.

Run it: `make study`, or `python studies/all_methods.py [folder]` (about 40 minutes on two cores). Killed and started
again, it goes on.

The rule, the same for all: the lowest learning rate of a grid of factors of two at which the method learns the task to
0.8 with seed 0. A lower rate always forgets less, so that no method is shown at a rate that makes it look bad. A method
that never gets there is shown at the rate where it learned most, and marked.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cells import each, run_once, spread
from drawing import png
from pictures import tradeoff

from keeptune.core.artefact import read_json, write_bytes, write_json
from keeptune.pipeline.demo import demo_recipe
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.pipeline.reporting import write_report
from keeptune.recipe.schema import make_recipe
from keeptune.statistics.store import StatStore

WANTED = 0.8
SEEDS = (0, 1, 2)
# The same 256 examples with answers known apart from questions: what is attributed is the last token of the question.
_PROMPTS: dict[str, Any] = {
    "knowledge": {
        "file": "atlas:calibration.jsonl",
        "prompt": "{question}\nAnswer:",
        "completion": " {answer}",
        "examples": 256,
    }
}
_FARSS = {"name": "farss", "rank": 8, "r_min": 1, "r_max": 8, "r_avg": 6, "boundary": 1}


_HEAD = """# All methods on atlas

Made by `python studies/all_methods.py` (part of `make study`). Rank 8 everywhere, 120 steps of 32 examples, linear
decay; mean ± standard deviation over seeds 0 to 2. Each method is shown at the lowest learning rate of a grid of
factors of two at which it learns the task to 80% with seed 0 (*: it never did, and is shown where it learned most).
K: facts kept, T: topics learned relative to full fine-tuning with the same seed, KT: their harmonic mean. Start:
seconds and peak memory, over the loaded model, of statistics and plan from an empty store. Sorted by facts kept.

![Kept against learned](all-methods.png)

| method | learning rate | facts, % | topics, % | K | T | KT | trained | start, s | start, MiB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
_TRIED = "| method | rate: topics / facts |\n| --- | --- |"


@dataclass(frozen=True)
class Entry:
    """A method and the rate its search starts from.

    Args:
        method: The recipe's ``method`` section.
        start: First learning rate tried.
        changes: Other keys of the recipe.
    """

    method: dict[str, Any]
    start: float
    changes: dict[str, Any] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {
    "full": Entry({"name": "full"}, 2e-4),
    "lora": Entry({"name": "lora", "rank": 8, "alpha": 16}, 1e-3),
    "dora": Entry({"name": "dora", "rank": 8, "alpha": 16}, 1e-3),
    "lora-fa": Entry({"name": "lora-fa", "rank": 8, "alpha": 16}, 8e-3),
    "pissa": Entry({"name": "pissa", "rank": 8}, 1e-3),
    "milora": Entry({"name": "milora", "rank": 8}, 2e-3),
    "corda-kpm": Entry({"name": "corda", "mode": "kpm", "rank": 8}, 2e-3),
    "corda-ipm": Entry({"name": "corda", "mode": "ipm", "rank": 8}, 1e-3),
    "lora-null-v1": Entry({"name": "lora-null", "rank": 8, "variant": "v1"}, 2e-3),
    "lora-null-v2": Entry({"name": "lora-null", "rank": 8, "variant": "v2"}, 3.2e-2),
    "farss": Entry(_FARSS, 2e-3),
    "farss-init": Entry({"name": "farss", "rank": 8, "variant": "farss-init"}, 2e-3),
    "farss-all-high": Entry({"name": "farss", "rank": 8, "variant": "all-high"}, 1e-3),
    "loki-5": Entry({"name": "loki", "q": 5}, 4e-3, _PROMPTS),
    "loki-10": Entry({"name": "loki", "q": 10}, 4e-3, _PROMPTS),
    "loki-20": Entry({"name": "loki", "q": 20}, 2e-3, _PROMPTS),
    "loki-30": Entry({"name": "loki", "q": 30}, 2e-3, _PROMPTS),
    "loki-star": Entry({"name": "loki", "q": 30, "rank": 8}, 4e-3, _PROMPTS),
}


def main(output: Path, docs: Path) -> None:
    """Find the rates, run the other seeds, measure the starts, write the page and the picture."""
    names = [name for name in ENTRIES if len(sys.argv) < 3 or name in sys.argv[2:]]
    found = dict(zip(names, each(partial(find_rate, output), names), strict=True))
    cells = [(name, found[name]["rate"], seed) for seed in SEEDS for name in names]
    folders = each(partial(cell, output), *zip(*cells, strict=True))
    if len(names) < len(ENTRIES):
        return
    starts = {name: measured(output, name) for name in names}
    report = write_report(folders, output)
    for entry, (name, rate, _) in zip(report["methods"], cells, strict=True):
        entry["name"], entry["label"] = name, name
        entry["rate"] = rate
    png(tradeoff(report), docs / "results" / "all-methods.png")
    write_json(output / "table.json", {"rates": found, "starts": starts})
    write_bytes(docs / "results" / "all-methods.md", page(report, found, starts).encode())


def find_rate(output: Path, name: str) -> dict[str, Any]:
    """Search the grid up or down from the start.

    Args:
        output: Where runs go.
        name: The method.

    Returns:
        ``rate``, whether it ``reached`` the wanted score, and every rate ``tried`` with its scores.
    """
    rate, tried = ENTRIES[name].start, {}
    while len(tried) < 6:
        folder = cell(output, name, rate, 0)
        facts, topics = (read_json(folder / "report.json")["methods"][0]["benchmarks"][i]["after"] for i in (0, 1))
        tried[rate] = {"facts": facts, "topics": topics}
        print(f"{name} at {rate:g}: facts {facts:.3f}, topics {topics:.3f}", flush=True)
        rate = rate / 2 if topics >= WANTED else rate * 2
        if rate in tried:  # the grid is crossed between a rate that is enough and one that is not
            break
    enough = [r for r, scores in tried.items() if scores["topics"] >= WANTED]
    best = min(enough) if enough else max(tried, key=lambda r: tried[r]["topics"])
    return {"rate": best, "reached": bool(enough), "tried": {f"{r:g}": tried[r] for r in sorted(tried)}}


def cell(output: Path, name: str, rate: float, seed: int) -> Path:
    """Run one method once.

    Args:
        output: Where runs go.
        name: The method.
        rate: Learning rate.
        seed: Training seed.

    Returns:
        The run folder.
    """
    folder = output / f"{name}-{rate:g}-seed{seed}"
    values = demo_recipe(ENTRIES[name].method, rate, folder, seed=seed, store=output / "store") | ENTRIES[name].changes
    return run_once(values, name)


def measured(output: Path, name: str) -> dict[str, float]:
    """Time a method's start from nothing in a process of its own, and read its peak memory.

    Args:
        output: Where the result is kept.
        name: The method.

    Returns:
        ``seconds`` of statistics and plan, and ``mib`` of peak memory over the loaded model.
    """
    kept = output / "starts" / f"{name}.json"
    if not kept.is_file():
        command = [sys.executable, __file__, "--start", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
        write_json(kept, json.loads(done.stdout.splitlines()[-1]))
    found: dict[str, float] = read_json(kept)
    return found


def start(name: str) -> None:
    """Plan one method with an empty store and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        values = demo_recipe(ENTRIES[name].method, 1e-3, Path(folder) / "run", seed=0, store=Path(folder) / "store")
        values |= ENTRIES[name].changes
        job = Job(make_recipe(values, folder=Path(), where=f"study {name}"))
        model, data, fingerprint = job.base(), job.data, job.base_fingerprint
        before, began = _peak(), time.perf_counter()
        plan_for(
            model,
            job.method,
            StatStore(Path(folder) / "store"),
            data=data,
            options=PlanOptions(fingerprint=fingerprint),
        )
        print(json.dumps({"seconds": time.perf_counter() - began, "mib": max(_peak() - before, 0)}))


def _peak() -> float:
    """Read the peak of resident memory, MiB; ru_maxrss would start at the size of the process that started this one."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def page(report: dict[str, Any], found: dict[str, Any], starts: dict[str, dict[str, float]]) -> str:
    """Write the page.

    Args:
        report: The joint report, with the study's names.
        found: Rates per method.
        starts: Seconds and memory per method.

    Returns:
        Markdown.
    """
    rows = []
    for name in found:
        runs = [entry for entry in report["methods"] if entry["name"] == name]
        facts, topics = ([100 * run["benchmarks"][i]["after"] for run in runs] for i in (0, 1))
        mark = "" if found[name]["reached"] else " *"
        ratios = [spread([run[key] for run in runs], 2) for key in ("K", "T", "KT")]
        parameters = f"{runs[0]['trained_parameters'] / 1e3:,.0f} k"
        start = f"{starts[name]['seconds']:.1f} | {starts[name]['mib']:.0f}"
        scores = f"{spread(facts, 1)} | {spread(topics, 1)} | " + " | ".join(ratios)
        rows.append(
            (statistics.mean(facts), f"| {name}{mark} | {found[name]['rate']:g} | {scores} | {parameters} | {start} |")
        )
    table = "\n".join(row for _, row in sorted(rows, reverse=True))
    tried = "\n".join(
        f"| {name} | "
        + ", ".join(f"{r}: {s['topics']:.2f} / {s['facts']:.2f}" for r, s in found[name]["tried"].items())
        + " |"
        for name in found
    )
    return f"{_HEAD}\n{table}\n\n## Rates tried (seed 0)\n\n{_TRIED}\n{tried}\n"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if sys.argv[1:2] == ["--start"]:
        start(sys.argv[2])
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/all-methods"), Path(__file__).parents[1] / "docs")
