"""How far a budget on feature drift goes on atlas: the questions of docs/guides/keep.md, three seeds.

Run it: `make study DATA=folder`, or `python studies/keep.py folder [output]` (about an hour on two cores). The folder
has the whole files of which assets/data has slices (assets/SOURCE.md says where they are from). Killed and started
again, it goes on. It writes keep-tables.md and keep.png in docs/results.

The task, the knowledge and the scores are those of docs/results/all-penalties.md: LoRA of rank 8 at every target,
120 steps of 32 examples, a peak rate of 2e-3, unless a row says otherwise.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cells import each, kept, read_rows, spread, write_rows
from drawing import INK, MUTED, bare, finish, page, png, themed
from matplotlib.ticker import PercentFormatter

from keeptune import atlas
from keeptune.core.artefact import read_json, write_bytes
from keeptune.pipeline.demo import demo_recipe

SEEDS = (0, 1, 2)
RATE = 2e-3
STEPS = 120
BUDGET, NATS = 0.0003, 0.001
FACT = {"text": "{question}\nAnswer: {answer}"}


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Args:
        question: Its table.
        label: Its name in the table.
        penalties: The recipe's.
        method: The recipe's.
        rate: Peak learning rate.
        steps: Optimiser steps.
        knowledge: Other keys of the recipe's ``knowledge``; ``file`` may name one that :func:`write_data` makes.
        targets: Roles, or None for all.
        seeds: Training seeds.
    """

    question: str
    label: str
    penalties: tuple[dict[str, Any], ...] = ()
    method: dict[str, Any] = field(default_factory=lambda: lora(8))
    rate: float = RATE
    steps: int = STEPS
    knowledge: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = SEEDS


def lora(rank: int) -> dict[str, Any]:
    """Give LoRA's section of a recipe."""
    return {"name": "lora", "rank": rank, "alpha": 2 * rank}


def drift(budget: float = BUDGET, **options: Any) -> dict[str, Any]:
    """Give a budget on feature drift."""
    return {"name": "drift", "budget": budget, **options}


def nats(budget: float = NATS, **options: Any) -> dict[str, Any]:
    """Give a budget in nats per token, to second order."""
    return {"name": "drift", "curvature": "delta-kfac", "budget": budget, **options}


def settings() -> list[Setting]:
    """List all rows; a row that two tables share is run once."""
    ask = [
        *(Setting("budget", f"drift {budget:g}", (drift(budget),)) for budget in (0.003, 0.001, 0.0003, 0.0001)),
        *(Setting("budget", f"nats {budget:g}", (nats(budget),)) for budget in (0.001, 0.0003)),
        *(Setting("budget", f"damped nats {b:g}", (nats(b, rho=0.5),)) for b in (0.003, 0.001, 0.0003)),
        Setting("budget", "no budget"),
        *(Setting("rate", f"no budget, {rate:g}", rate=rate) for rate in (5e-4, 1e-3, 4e-3)),
        *(Setting("rate", f"drift {BUDGET:g}, {rate:g}", (drift(),), rate=rate) for rate in (5e-4, 1e-3, 4e-3)),
        *(Setting("rank", f"no budget, rank {rank}", method=lora(rank)) for rank in (2, 32)),
        *(Setting("rank", f"drift {BUDGET:g}, rank {rank}", (drift(),), lora(rank)) for rank in (2, 32)),
        *(Setting("amount", f"{n} examples", (drift(),), knowledge={"examples": n}) for n in (8, 32, 128)),
        Setting("kind", "half the relations", (drift(),), knowledge={"file": "half.jsonl", "examples": None}),
        Setting("kind", "one relation", (drift(),), knowledge={"file": "one.jsonl", "examples": None}),
        Setting("kind", "questions without answers", (drift(),), knowledge={"text": "{question}"}),
        Setting("kind", "web text", (drift(),), knowledge={"file": "web.jsonl", "text": "{text}"}),
        Setting("kind", "stories", (drift(),), knowledge={"file": "stories.jsonl", "text": "{text}"}),
        Setting("with", "LoRA-Null v1 and drift", (drift(),), {"name": "lora-null", "rank": 8}),
        Setting("with", "kl 3", ({"name": "kl", "strength": 3.0},)),
        Setting("with", "kl 3 and drift", ({"name": "kl", "strength": 3.0}, drift())),
        *(Setting("rate", f"damped nats {NATS:g}, {r:g}", (nats(rho=0.5),), rate=r) for r in (1e-3, 4e-3)),
        Setting("with", "drift, gain 0", (drift(gain=0.0),)),
        *(Setting("targets", f"no budget, {name}", targets=roles) for name, roles in TARGETS.items()),
        *(
            Setting("targets", f"drift {BUDGET:g}, {name}", (drift(),), targets=roles)
            for name, roles in TARGETS.items()
        ),
        Setting("steps", "no budget, 1,200 steps", steps=1200, seeds=(0,)),
        Setting("steps", "drift, 1,200 steps", (drift(),), steps=1200, seeds=(0,)),
    ]
    return ask


TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
}


def main(data: Path, output: Path, docs: Path) -> None:
    """Run what has not been run, seed by seed, then write the page and the picture."""
    output.mkdir(parents=True, exist_ok=True)
    write_data(data, output)
    asked = settings()
    cells = [(one, seed) for seed in SEEDS for one in asked if seed in one.seeds]
    order = list(_TITLES)
    cells.sort(key=lambda cell: (cell[0].steps, cell[1] > 0, order.index(cell[0].question)))  # the long ones last
    scored = each(partial(cell, output), *zip(*cells, strict=True))
    rows = [[score for (one, _), score in zip(cells, scored, strict=True) if one == row] for row in asked]
    png(figure(asked, rows), docs / "results" / "keep.png")
    write_bytes(docs / "results" / "keep-tables.md", page_of(asked, rows).encode())


def source_of(one: Setting) -> str | None:
    """Name the file of a row's knowledge, where it is one of this study's."""
    return one.knowledge.get("file")


def other_relations() -> list[str]:
    """List the relations that ``half.jsonl`` has nothing of: every second one by name."""
    return sorted({row["relation"] for row in atlas_rows("facts.jsonl")})[1::2]


def atlas_rows(name: str) -> list[dict[str, Any]]:
    """Read one of atlas' files."""
    return read_rows(atlas.data_path(name))


def write_data(data: Path, output: Path) -> None:
    """Write the knowledge files: facts of half the relations, of one, and 20-word pieces of other text."""
    facts, others = atlas_rows("calibration.jsonl"), set(other_relations())
    half = [row for row in facts if row["relation"] not in others]
    write_rows(output / "half.jsonl", half)
    write_rows(output / "one.jsonl", [row for row in half if row["relation"] == "landmark in country"])
    for name, source in (("web", "c4_text/c4.jsonl"), ("stories", "tinystories/stories.jsonl")):
        texts = [row["text"].split() for row in read_rows(data / source)]
        write_rows(output / f"{name}.jsonl", [{"text": " ".join(words[:20])} for words in texts][:256])


def cell(output: Path, one: Setting, seed: int) -> dict[str, float]:
    """Run one row with one seed.

    Args:
        output: Where runs go.
        one: The row.
        seed: Training seed.

    Returns:
        ``facts``, ``other`` (facts of :func:`other_relations`), ``topics``, and what the budget's own log says last:
        ``drift`` and ``multiplier``, where there is one.
    """
    folder = output / f"{one.question}-{one.label}-seed{seed}".replace(" ", "_").replace(",", "")
    values = demo_recipe(dict(one.method), one.rate, folder, seed=seed, store=output / "store", steps=one.steps)
    knowledge = values["knowledge"] | one.knowledge
    if source_of(one):
        knowledge["file"] = str(output / knowledge["file"])
    values["knowledge"] = {key: value for key, value in knowledge.items() if value is not None}
    values["penalties"] = [dict(penalty) for penalty in one.penalties]
    if one.targets:
        values["targets"] = list(one.targets)
    return kept(values, f"{one.question}: {one.label}, seed {seed}", scores_of)


def scores_of(folder: Path) -> dict[str, float]:
    """Read a run's scores."""
    facts, topics = read_json(folder / "report.json")["methods"][0]["benchmarks"][:2]
    groups = [facts["groups"][name] for name in other_relations()]
    last = read_json(folder / "trained" / "train.json")["loss"][-1]
    return {
        "facts": facts["after"],
        "other": sum(group["after"] * group["n"] for group in groups) / sum(group["n"] for group in groups),
        "topics": topics["after"],
        **{key: last[name] for key, name in (("drift", "feature_drift"), ("multiplier", "multiplier")) if name in last},
    }


_TITLES = {
    "budget": "How much",
    "with": "What else may help",
    "kind": "What knowledge data",
    "amount": "How much knowledge data",
    "rate": "Learning rate",
    "rank": "Rank",
    "targets": "Which targets",
    "steps": "Ten times longer (one seed)",
}
_COLUMNS = "| | facts | other facts | topics | used | pressure |\n| --- | ---: | ---: | ---: | ---: | ---: |"
_HEAD = """# keep on atlas: all figures

Made by `python studies/keep.py` (in `make study`); [keep.md](../guides/keep.md) says what they mean. LoRA, rank 8,
120 steps of 32 examples at a peak rate of 2e-3 unless a row says otherwise; mean ± standard deviation over seeds 0 to
2, in per cent. *Other facts* are those of 16 of the 33 relations: the rows *half the relations* and *one relation*
have none of them in their knowledge data. *Used* is the drift (or the nats) at the last step over the budget,
*pressure* what it is weighed by then.

![Kept against learned](keep.png)
"""


def page_of(asked: Sequence[Setting], rows: Sequence[Sequence[dict[str, float]]]) -> str:
    """Write the page.

    Args:
        asked: Rows.
        rows: The scores of each, seed by seed.

    Returns:
        Markdown.
    """
    parts = [_HEAD]
    shared = {
        "rate": ("no budget", f"drift {BUDGET:g}", f"damped nats {NATS:g}"),
        "rank": ("no budget", f"drift {BUDGET:g}"),
        "targets": ("no budget", f"drift {BUDGET:g}"),
        "amount": (f"drift {BUDGET:g}",),
        "kind": (f"drift {BUDGET:g}", "no budget"),
        "with": (f"drift {BUDGET:g}",),
    }
    for question, title in _TITLES.items():
        lines = [f"\n## {title}\n\n{_COLUMNS}"]
        for one, scores in zip(asked, rows, strict=True):
            repeated = one.question == "budget" and one.label in shared.get(question, ())
            if one.question == question or repeated:
                lines.append(row_of(one, scores, repeated=repeated))
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def row_of(one: Setting, scores: Sequence[dict[str, float]], *, repeated: bool) -> str:
    """Write a line of a table; one that stands in the first table as well says so."""
    budget = next((penalty["budget"] for penalty in one.penalties if "budget" in penalty), None)
    used = pressure = ""
    if budget and "drift" in scores[0]:
        used = f"{100 * statistics.mean(score['drift'] for score in scores) / budget:.0f}%"
        pressure = f"{statistics.mean(score['multiplier'] for score in scores):.2g}"
    cells = [spread([100 * score[key] for score in scores]) for key in ("facts", "other", "topics")]
    return f"| {one.label}{' (above)' if repeated else ''} | {' | '.join(cells)} | {used} | {pressure} |"


# First words of a row's label to: colour, name, where its numbers stand, and from which side.
_FAMILIES: dict[str, tuple[str, str, tuple[int, int], str]] = {
    "no budget": ("#999999", "LoRA, four learning rates", (6, 5), "left"),
    "drift": ("#0072b2", "budget on drift", (-8, -12), "right"),
    "nats": ("#009e73", "budget in nats, not damped", (0, 0), ""),
    "damped nats": ("#d55e00", "budget in nats", (7, 4), "left"),
    "kl": ("#222222", "KL to the base, strength 3", (0, 0), ""),
}


def figure(asked: Sequence[Setting], rows: Sequence[Sequence[dict[str, float]]]) -> Any:
    """Draw facts kept against topics learned: budgets, plain LoRA at four rates, and one KL."""
    with themed():
        made = page(7.0, 4.6)
        axes = made.subplots()
        for family, (colour, name, place, side) in _FAMILIES.items():
            points = [
                (statistics.mean(s["topics"] for s in scores), statistics.mean(s["facts"] for s in scores), one)
                for one, scores in zip(asked, rows, strict=True)
                if one.label.startswith(family) and (one.question == "budget" or one.label == "kl 3" or is_rate(one))
            ]
            points.sort(key=lambda point: point[0])
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=colour, label=name)
            for x, y, one in points if side else ():
                text = f"{one.rate:g}" if family == "no budget" else one.label.rpartition(" ")[2]
                axes.annotate(text, (x, y), place, textcoords="offset points", fontsize=8, color=colour, ha=side)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("topics learned", color=MUTED)
        axes.set_ylabel("facts kept", color=MUTED)
        axes.set_title("What a budget keeps at what it lets the model learn", color=INK)
        axes.grid(visible=True)
        axes.legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="lower left")
        bare(axes, ("left", "bottom"))
        return finish(made)


def is_rate(one: Setting) -> bool:
    """Tell the rows of LoRA without a budget at other rates."""
    return one.question == "rate" and one.label.startswith("no budget")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python studies/keep.py DATA [OUTPUT]")
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]), Path([*sys.argv, "runs/keep"][2]), Path(__file__).parents[1] / "docs")
