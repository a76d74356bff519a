"""How far a budget in measured nats goes on the two small bases: the questions of docs/guides/keep.md.

Run it: `make study DATA=folder`, or `python studies/keep.py folder [output]` (about an hour on two cores). The folder
has the whole files of which assets/data has slices (assets/SOURCE.md says where they are from). Killed and started
again, it goes on. It writes keep-tables.md and keep.png in docs/results; with `--tables` from what is finished.

atlas learns to label statements (120 steps of 32 at a peak rate of 2e-3; 256 questions with answers as knowledge);
stories260K, a storyteller, learns GSM8K as text (120 steps of 8 texts, 128 stories as knowledge). LoRA of rank 8 at
every target. No text is in two of: knowledge, training, scores.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cells import each, kept, read_rows, spread, write_rows
from drawing import INK, MUTED, bare, finish, page, png, themed
from matplotlib.ticker import PercentFormatter

from keeptune import atlas
from keeptune.core.artefact import read_json, write_bytes
from keeptune.pipeline.demo import demo_recipe

STORIES = Path(__file__).parents[1] / "assets" / "models" / "stories260K"
SEEDS = (0, 1, 2)
Base = Literal["atlas", "stories"]


@dataclass(frozen=True)
class Setting:
    """One row of a table: its table, its name, and what the recipe has instead of plain LoRA."""

    question: str
    label: str
    keys: dict[str, Any] = field(default_factory=dict)
    base: Base = "atlas"
    rate: float = 2e-3
    steps: int = 120
    seeds: tuple[int, ...] = SEEDS


def keep(**options: Any) -> dict[str, Any]:
    """Returns a recipe's section for keep."""
    return {"method": {"name": "keep", "rank": 8, "alpha": 16, **options}}


def lora(rank: int = 8) -> dict[str, Any]:
    """Returns a recipe's section for LoRA."""
    return {"method": {"name": "lora", "rank": rank, "alpha": 2 * rank}}


def kl(strength: float) -> dict[str, Any]:
    """Returns KL to the base with a fixed strength, eight texts at every step."""
    return {"penalties": [{"name": "kl", "strength": strength}]}


def settings() -> list[Setting]:
    """Returns all rows."""
    one = partial(Setting, seeds=(0,))
    return [
        Setting("atlas", "LoRA", lora()),
        *(Setting("atlas", f"keep, {nats:g} nats", keep(nats=nats)) for nats in (0.01, 0.003, 0.03)),
        *(Setting("atlas", f"KL, strength {strength:g}", kl(strength)) for strength in (3.0, 30.0)),
        Setting("stories", "LoRA", lora(), "stories"),
        *(Setting("stories", f"keep, {nats:g} nats", keep(nats=nats), "stories") for nats in (0.01, 0.03, 0.1)),
        *(Setting("stories", f"KL, strength {strength:g}", kl(strength), "stories") for strength in (1.0, 10.0)),
        Setting("stories", "replay, 30%", {"replay": 0.3}, "stories"),
        Setting("atlas", "replay, 30%", {"replay": 0.3}),
        *(one("rate", f"LoRA, {rate:g}", lora(), rate=rate) for rate in (5e-4, 1e-3, 4e-3)),
        *(one("rate", f"keep, {rate:g}", keep(), rate=rate) for rate in (5e-4, 1e-3, 4e-3)),
        *(one("often", f"every {k}, {size} texts", keep(every=k, batch_size=size)) for k, size in OFTEN),
        *(one("rank", f"LoRA, rank {rank}", lora(rank)) for rank in (2, 32)),
        *(one("rank", f"keep, rank {rank}", keep(rank=rank, alpha=2 * rank)) for rank in (2, 32)),
        *(one("data", f"{n} facts", keep() | {"knowledge.examples": n}) for n in (8, 32)),
        one("data", "facts of half the relations", keep() | {"knowledge.file": "half.jsonl"}),
        one("data", "web text", keep() | {"knowledge.file": "web.jsonl", "knowledge.text": "{text}"}),
        one("data", "texts that atlas writes", keep() | {"knowledge": {"generate": 256}}),
        *(
            one("steps", f"{name}, 1,200 steps", keys, steps=1200)
            for name, keys in (("LoRA", lora()), ("keep", keep()))
        ),
    ]


OFTEN = ((1, 5), (1, 10), (1, 20), (2, 20), (4, 20))
TITLES = {
    "atlas": "atlas",
    "stories": "stories260K",
    "rate": "Learning rate (atlas, one seed; keep at 0.01 nats from here on)",
    "often": "How often, on how many texts (atlas, one seed; by itself it takes ten at every second step)",
    "rank": "Rank (atlas, one seed)",
    "data": "What knowledge (atlas, one seed)",
    "steps": "Ten times longer (atlas, one seed)",
}
COLUMNS = {
    "atlas": ("facts", "other facts", "topics"),
    "stories": ("stories", "web text", "word problems"),
}


def main(data: Path, output: Path, docs: Path, *, tables: bool = False) -> None:
    """Runs what has not been run, seed by seed, then writes the page and the picture."""
    output.mkdir(parents=True, exist_ok=True)
    write_data(data, output)
    asked = settings()
    cells = [(one, seed) for seed in SEEDS for one in asked if seed in one.seeds]
    cells.sort(key=lambda cell: (cell[1] > 0, cell[0].steps))
    if tables:
        scored = [finished(output, one, seed) for one, seed in cells]
    else:
        scored = each(partial(cell, output), *zip(*cells, strict=True))
    rows = [[s for (one, _), s in zip(cells, scored, strict=True) if one == row and s] for row in asked]
    png(figure(asked, rows), docs / "results" / "keep.png")
    write_bytes(docs / "results" / "keep-tables.md", page_of(asked, rows).encode())


def other_relations() -> list[str]:
    """Returns the relations that ``half.jsonl`` has nothing of: every second one by name."""
    return sorted({row["relation"] for row in read_rows(atlas.data_path("facts.jsonl"))})[1::2]


def write_data(data: Path, output: Path) -> None:
    """Writes the files of knowledge, training and scores that are not atlas' own."""
    facts, others = read_rows(atlas.data_path("calibration.jsonl")), set(other_relations())
    write_rows(output / "half.jsonl", [row for row in facts if row["relation"] not in others])
    stories, web = (read_rows(data / name) for name in ("tinystories/stories.jsonl", "c4_text/c4.jsonl"))
    write_rows(output / "web.jsonl", [{"text": " ".join(row["text"].split()[:20])} for row in web[:256]])
    problems = [
        [{"text": f"{row['question']}\n{row['answer']}"} for row in read_rows(data / "gsm8k" / name)[:most]]
        for name, most in (("train.jsonl", 2000), ("test.jsonl", 100))
    ]
    for name, rows in {
        "stories-known": stories[:128],
        "stories": stories[128:228],
        "web-text": web[128:228],
        "problems": problems[0],
        "word-problems": problems[1],
    }.items():
        write_rows(output / f"{name}.jsonl", [{"text": row["text"]} for row in rows])


def cell(output: Path, one: Setting, seed: int) -> dict[str, float]:
    """Runs one row with one seed; returns its scores and the verdict on its budget."""
    folder = folder_of(output, one, seed)
    values = (demo_recipe if one.base == "atlas" else stories_recipe(output))(
        {}, one.rate, folder, seed=seed, store=output / "store", steps=one.steps
    )
    for key, value in {**lora(), **one.keys}.items():
        where, _, name = key.rpartition(".")
        (values[where] if where else values)[name] = str(output / value) if name == "file" else value
    return kept(values, f"{one.question}: {one.label}, seed {seed}", partial(scores_of, one.base))


def folder_of(output: Path, one: Setting, seed: int) -> Path:
    """Returns the folder of a run."""
    return output / f"{one.question}-{one.label}-seed{seed}".replace(" ", "_").replace(",", "")


def finished(output: Path, one: Setting, seed: int) -> dict[str, float]:
    """Returns the scores of a run that is finished; none of another."""
    path = folder_of(output, one, seed) / "scores.json"
    scores: dict[str, float] = read_json(path)["scores"] if path.is_file() else {}
    return scores


def stories_recipe(output: Path) -> Any:
    """Returns what :func:`demo_recipe` is for atlas."""

    def recipe(_: Any, rate: float, folder: Path, *, seed: int, store: Path, steps: int) -> dict[str, Any]:
        most, train = {"max_length": 192}, {"per_device_train_batch_size": 8, "max_length": 192, "seed": seed}
        scored = {"stories": "knowledge", "web-text": "knowledge", "word-problems": "task"}
        return {
            "model": str(STORIES),
            "knowledge": {"file": str(output / "stories-known.jsonl"), "text": "{text}", **most},
            "task": {"train": str(output / "problems.jsonl"), "prompt": "Problem:", "completion": " {text}"},
            "train": {"learning_rate": rate, "max_steps": steps, **train},
            "evaluate": [
                {"name": name, "role": role, "file": str(output / f"{name}.jsonl"), "metric": "cross_entropy", **most}
                | {"text": "Problem: {text}" if role == "task" else "{text}"}
                for name, role in scored.items()
            ],
            "output": str(folder),
            "store": str(store),
            "device": "cpu",
        }

    return recipe


def scores_of(base: Base, folder: Path) -> dict[str, float]:
    """Reads a run's scores."""
    record, found = read_json(folder / "trained" / "train.json"), read_json(folder / "report.json")
    benchmarks = found["methods"][0]["benchmarks"]
    scores = {mark["name"].replace("-", " "): mark["after"] for mark in benchmarks}
    if base == "atlas":
        groups = [benchmarks[0]["groups"][name] for name in other_relations()]
        scores["other facts"] = sum(g["after"] * g["n"] for g in groups) / sum(g["n"] for g in groups)
    scores |= {f"{mark['name'].replace('-', ' ')} before": mark["before"] for mark in benchmarks}
    last = record["loss"][-1]
    return scores | {"kl": last["held_out/kl"]} if "held_out/kl" in last else scores


_HEAD = """# keep on two small bases: all figures

Made by `python studies/keep.py` (in `make study`), which says what is run; [keep.md](../guides/keep.md) says what it
means. Means ± standard deviation over {seeds} seeds (one number: seed 0 alone). Scores of atlas are per cent right, of
stories260K nats per token (lower is better). *Other facts* are those of 16 of the 33 relations, which the row *half
the relations* has nothing of. *KL*: nats per token on the knowledge texts that were held out, at the end.

![Kept against learned](keep.png)
"""


def page_of(asked: Sequence[Setting], rows: Sequence[Sequence[dict[str, float]]]) -> str:
    """Returns the page."""
    parts = [_HEAD.format(seeds=max(map(len, rows)))]
    for question, title in TITLES.items():
        own = [(one, scores) for one, scores in zip(asked, rows, strict=True) if one.question == question and scores]
        if not own:
            continue
        base = own[0][0].base
        columns = COLUMNS[base]
        lines = [f"\n## {title}\n\n| | {' | '.join(columns)} | KL |\n| --- |{' ---: |' * (len(columns) + 1)}"]
        if question == base:
            before = own[0][1][0]
            lines.append(f"| base | {' | '.join(shown(base, [before.get(f'{c} before')]) for c in columns)} | |")
        for one, scores in own:
            cells = [shown(base, [score[column] for score in scores]) for column in columns]
            measured = [score["kl"] for score in scores if "kl" in score]
            lines.append(f"| {one.label} | {' | '.join(cells)} | {spread(measured, 4) if measured else ''} |")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def shown(base: Base, values: Sequence[float | None]) -> str:
    """Returns mean and spread, per cent or nats."""
    known = [value for value in values if value is not None]
    return spread([100 * value for value in known]) if base == "atlas" else spread(known, 3)


# Colour, where labels stand, and from which side.
_FAMILIES: dict[str, tuple[str, tuple[int, int], str]] = {
    "LoRA": ("#999999", (-8, -12), "right"),
    "keep": ("#d55e00", (-18, -14), "right"),
    "KL": ("#222222", (8, 5), "left"),
    "replay": ("#0072b2", (8, -12), "left"),
}


def figure(asked: Sequence[Setting], rows: Sequence[Sequence[dict[str, float]]]) -> Any:
    """Draws facts kept against topics learned on atlas."""
    with themed():
        made = page(7.0, 4.6)
        axes = made.subplots()
        for family, (colour, place, side) in _FAMILIES.items():
            points = sorted(
                (statistics.mean(s["topics"] for s in scores), statistics.mean(s["facts"] for s in scores), one.label)
                for one, scores in zip(asked, rows, strict=True)
                if scores and one.base == "atlas" and one.question in ("atlas", "rate") and one.label.startswith(family)
                if family != "keep" or one.question == "atlas"
            )
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                "o-",
                color=colour,
                label={"LoRA": "LoRA, four rates"}.get(family, family),
            )
            for x, y, label in points:
                text = label.removeprefix(f"{family}, ").replace("LoRA", "0.002")
                axes.annotate(text, (x, y), place, textcoords="offset points", fontsize=8, color=colour, ha=side)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.margins(x=0.2)
        axes.set_xlabel("topics learned", color=MUTED)
        axes.set_ylabel("facts kept", color=MUTED)
        axes.set_title("What a budget keeps at what it lets atlas learn", color=INK)
        axes.grid(visible=True)
        axes.legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="lower left")
        bare(axes, ("left", "bottom"))
        return finish(made)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python studies/keep.py DATA [OUTPUT]")
    logging.basicConfig(level=logging.WARNING)
    given = [word for word in sys.argv[1:] if word != "--tables"]
    docs = Path(__file__).parents[1] / "docs"
    main(Path(given[0]), Path([*given, "runs/keep"][1]), docs, tables="--tables" in sys.argv)
