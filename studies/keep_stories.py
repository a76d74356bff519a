"""A second base for keep: stories260K, a storyteller that is tuned on word problems; three seeds.

Run it: `make study DATA=folder`, or `python studies/keep_stories.py folder [output]` (about a quarter of an hour on two
cores). The folder has the whole files of which assets/data has slices (assets/SOURCE.md says where they are from).
Killed and started again, it goes on. It writes docs/results/keep-stories.md.

What is to be kept is the loss on TinyStories, and on web text, which the base is bad at and could get worse at; what
is learned is GSM8K, question and worked answer as text. LoRA of rank 8 at every target, 120 steps of 8 texts of at most
192 tokens. No text is in two of: knowledge data, training data, scores.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cells import each, kept, read_rows, spread, write_rows

from keeptune.core.artefact import read_json, write_bytes

MODEL = Path(__file__).parents[1] / "assets" / "models" / "stories260K"
SEEDS = (0, 1, 2)
STEPS, TEXTS, LENGTH = 120, 8, 192


@dataclass(frozen=True)
class Setting:
    """One row.

    Args:
        label: Its name.
        penalties: The recipe's.
        rate: Peak learning rate.
        method: The recipe's.
        knowledge: File of the knowledge data.
        replay: Share of knowledge in the training data.
    """

    label: str
    penalties: tuple[dict[str, Any], ...] = ()
    rate: float = 2e-3
    method: dict[str, Any] = field(default_factory=lambda: {"name": "lora", "rank": 8, "alpha": 16})
    knowledge: str = "stories"
    replay: float | None = None


def settings() -> list[Setting]:
    """List all rows."""
    return [
        *(Setting(f"LoRA, {rate:g}", rate=rate) for rate in (5e-4, 1e-3, 2e-3)),
        *(Setting(f"drift {b:g}", (_drift(b),)) for b in (0.003, 0.001, 0.0003)),
        *(Setting(f"nats {b:g}", (_drift(b, curvature="delta-kfac"),)) for b in (0.01, 0.003)),
        *(Setting(f"damped nats {b:g}", (_drift(b, curvature="delta-kfac", rho=0.5),)) for b in (0.03, 0.01, 0.003)),
        *(Setting(f"kl {s:g}", ({"name": "kl", "strength": s},)) for s in (0.3, 1.0)),
        Setting("damped nats 0.01, 0.004", (_drift(0.01, curvature="delta-kfac", rho=0.5),), rate=4e-3),
        Setting("kl 1, 0.004", ({"name": "kl", "strength": 1.0},), rate=4e-3),
        Setting("replay 0.3", replay=0.3),
        Setting("LoRA-Null v1", method={"name": "lora-null", "rank": 8}),
        Setting(
            "damped nats 0.01, web text as knowledge",
            (_drift(0.01, curvature="delta-kfac", rho=0.5),),
            knowledge="web",
        ),
    ]


def _drift(budget: float, **options: Any) -> dict[str, Any]:
    return {"name": "drift", "budget": budget, **options}


def main(data: Path, output: Path, docs: Path) -> None:
    """Run what has not been run, seed by seed, then write the page."""
    output.mkdir(parents=True, exist_ok=True)
    write_data(data, output)
    asked = settings()
    cells = [(one, seed) for seed in SEEDS for one in asked]
    scored = each(partial(cell, output), *zip(*cells, strict=True))
    rows = [[score for (one, _), score in zip(cells, scored, strict=True) if one == row] for row in asked]
    write_bytes(docs / "results" / "keep-stories.md", page(asked, rows).encode())


def write_data(data: Path, output: Path) -> None:
    """Write disjoint files: knowledge, training and scores."""
    stories, web = (read_rows(data / name) for name in ("tinystories/stories.jsonl", "c4_text/c4.jsonl"))
    problems = [{"text": f"{row['question']}\n{row['answer']}"} for row in read_rows(data / "gsm8k/train.jsonl")[:2000]]
    tests = [{"text": f"{row['question']}\n{row['answer']}"} for row in read_rows(data / "gsm8k/test.jsonl")[:100]]
    for name, rows in {
        "stories": stories[:128],
        "stories-test": stories[128:228],
        "web": web[:128],
        "web-test": web[128:228],
        "problems": problems,
        "problems-test": tests,
    }.items():
        write_rows(output / f"{name}.jsonl", [{"text": row["text"]} for row in rows])


def cell(output: Path, one: Setting, seed: int) -> dict[str, float]:
    """Run one row with one seed.

    Args:
        output: Where runs go.
        one: The row.
        seed: Training seed.

    Returns:
        The loss of each kind of text, before and after; the KL to the base on stories; the last drift and multiplier.
    """
    folder = output / f"{one.label}-seed{seed}".replace(" ", "_").replace(",", "")
    scored = {"stories": "knowledge", "web": "knowledge", "problems": "task"}
    values: dict[str, Any] = {
        "model": str(MODEL),
        "method": dict(one.method),
        "penalties": [dict(penalty) for penalty in one.penalties],
        "knowledge": {"file": str(output / f"{one.knowledge}.jsonl"), "text": "{text}", "max_length": LENGTH},
        "task": {"train": str(output / "problems.jsonl"), "prompt": "Problem:", "completion": " {text}"},
        "train": {
            "learning_rate": one.rate,
            "max_steps": STEPS,
            "per_device_train_batch_size": TEXTS,
            "max_length": LENGTH,
            "seed": seed,
        },
        "evaluate": [
            {
                "name": name,
                "role": role,
                "file": str(output / f"{name}-test.jsonl"),
                "text": "Problem: {text}" if name == "problems" else "{text}",
                "metric": "cross_entropy",
                "max_length": LENGTH,
            }
            for name, role in scored.items()
        ],
        "output": str(folder),
        "store": str(output / "store"),
        "device": "cpu",
    }
    if one.replay:
        values["replay"] = one.replay
    return kept(values, f"{one.label}, seed {seed}", partial(scores_of, scored))


def scores_of(scored: Mapping[str, str], folder: Path) -> dict[str, float]:
    """Read a run's losses."""
    benchmarks = {b["name"]: b for b in read_json(folder / "report.json")["methods"][0]["benchmarks"]}
    last = read_json(folder / "trained" / "train.json")["loss"][-1]
    found = {f"{name} {when}": benchmarks[name][when] for name in scored for when in ("before", "after")}
    return found | {"kl": benchmarks["stories"]["kl_to_base"], "drift": last.get("feature_drift", 0.0)}


_HEAD = """# keep on a second base: stories260K tuned on word problems

Made by `python studies/keep_stories.py` (in `make study`); [keep.md](../guides/keep.md) says what it means. Losses in
nats per token on texts that neither training nor knowledge data hold: lower is better, everywhere. Means ± standard
deviation over seeds 0 to 2. LoRA, rank 8, 120 steps of 8 texts, a peak rate of 2e-3 unless a row says otherwise; 128
stories as knowledge data. *KL* is that to the base on the scored stories.

| | stories, to be kept | web text | word problems, to be learned | KL | drift |
| --- | ---: | ---: | ---: | ---: | ---: |"""


def page(asked: Sequence[Setting], rows: Sequence[Sequence[dict[str, float]]]) -> str:
    """Write the page.

    Args:
        asked: Rows.
        rows: The scores of each, seed by seed.

    Returns:
        Markdown.
    """
    names = ("stories", "web", "problems")
    lines = [_HEAD, "| base | " + " | ".join(f"{rows[0][0][f'{name} before']:.3f}" for name in names) + " | | |"]
    for one, scores in zip(asked, rows, strict=True):
        cells = [spread([score[f"{name} after"] for score in scores], 3) for name in names]
        held = f"{statistics.mean(score['drift'] for score in scores):.2g}" if scores[0]["drift"] else ""
        lines.append(f"| {one.label} | {' | '.join(cells)} | {spread([s['kl'] for s in scores], 3)} | {held} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python studies/keep_stories.py DATA [OUTPUT]")
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]), Path([*sys.argv, "runs/keep-stories"][2]), Path(__file__).parents[1] / "docs")
