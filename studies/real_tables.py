"""The page and the picture of the study of real models, from its records alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from keeptune.core.artefact import write_bytes
from keeptune.core.bootstrap import paired_interval
from studies.cells import read_rows
from studies.drawing import MUTED, Figure, finish, frame, look, page, png, themed
from studies.real_data import Sizes

Row = Mapping[str, Any]
KEPT = {"arc_easy": "ARC-Easy", "openbookqa": "OpenBookQA", "facts": "facts", "web": "C4, nats"}
TASKS = {
    "labels": "labels of statements, exact match",
    "calls": "function calls in JSON through the chat template, exact match",
    "gsm8k": "word problems (GSM8K) as text, nats per token",
}
NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
NEAR = 0.02
OWN = "the model's"  # dtype
EARLIER = {
    "keep at every k-th step": "at each k-th step",
    "keep without the limit": "and at every step while the budget is overdrawn",
    "keep without the limit, one text": "the same, one text at a time",
    "keep without the first steps": "and its gradient limited by the task's",
    "keep, chats held out": "and from the second step on, ever more rarely up to each k-th",
    "keep, 16 held out": "and held out at random: 16 texts, which no longer are conversations all",
    "keep, 16 held out, rate 0.0003": "the same, at a rate of 3e-4",
    "keep, start token": "and 64 of 256 held out",
}
ENOUGH = 6  # rows for a correlation
_HEAD = """# Real language models: what methods forget

Made by `python -m studies.real` from [the records](real/cells.jsonl): {cells} cells, {seeds}. bfloat16, one thread of a
CPU. LoRA of rank 8 (alpha 16) at every target, {steps} steps of a few short examples (8 of labels, 4 of calls, 2 of
word problems) and a peak rate of 1e-3 unless a row says otherwise. *generated*: the base wrote the 256 texts that are
to be kept itself, nobody gave a file; *general*: the mixture that ships. keep has generated ones unless it says so;
*defaults* stands for keep as it is, at 0.01 nats (a number for another budget, *rate* for another peak rate);
what it was before stands [at the end](#earlier-forms-of-keep). Other rows with *generated* texts whose records name no
day are of when SmolLM2's plain ones began with its start token; *kl* held out 16 of them then, not 64. It has a
strength, and four texts at every step; *sparse*: what keep would take, so few and so rarely. Records name the commit.

Kept benchmarks: ARC-Easy and OpenBookQA by log-likelihood; *facts*: the answer to a question of NQ-open, told from
three answers to questions that begin alike, by log-likelihood; web text (C4). What a row shows is the difference to the
base, of accuracies in points, with its 95% interval over items, paired.

**Forgotten** is (before - after) / before of an accuracy (chance is not taken off), and 1 - exp(before - after) of nats
per token, the share that a token's probability has lost; negative where a score rose. *On average*: over the four kept
benchmarks; ± is half of its interval, which takes the benchmarks as independent. *KL*: nats per token from the base to
the tuned model on texts that the base wrote with another seed, the mean of plain texts and chats. *Plan*: its processor
seconds (the base's texts were written before, or then where it took hundreds); *time*: those of training over
the mean of LoRA's; a machine that others use made both vary. ᶠ: computed in float32, on a processor without
instructions for bfloat16, and compared with the base in float32. Times are over those of LoRA in the same numbers, and
of the same day where the records name it, for machines differ. Mostly one seed, few hundred items: differences
within the intervals are noise.

![What each row forgot on average](real/real.png)

Beside each name: the task's score, nats per token for word problems.
"""


def write_page(out: Path) -> None:
    """Writes the page beside the folder of the records, and the picture in it; the records are of the last version."""
    rows = read_rows(out / "cells.jsonl")
    rows = [row for row in rows if row["v"] == max(row["v"] for row in rows)]
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    steps = max(row["recipe"]["train"]["max_steps"] for row in rows)
    parts = [_HEAD.format(cells=len(rows), seeds=f"seeds {seeds}", steps=steps)]
    now = [row for row in rows if row["entry"] not in EARLIER]
    for (model, task), some in groups(now).items():
        parts.append(f"\n## {NAMES.get(model, model)}: {TASKS[task]}\n\n{table(some)}\n{matched(some)}")
        parts.append(f"{over_seeds(some)}{predicted(some)}")
    if (out / "ifeval.jsonl").is_file():
        parts.append(followed(read_rows(out / "ifeval.jsonl"), rows))
    parts.append(earlier([row for row in rows if row["entry"] in EARLIER]))
    png(picture(now), out / "real.png")
    write_bytes(out.with_suffix(".md"), "".join(parts).encode())


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each model and task, those that forgot least first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["task"]), []).append(row)
    return {key: sorted(some, key=lambda row: forgotten(row)[0]) for key, some in found.items()}


def label(row: Row) -> str:
    """The entry, its seed where it is not the first, and a mark where it was computed in float32."""
    return row["entry"] + (f" (seed {row['seed']})" if row["seed"] else "") + ("" if dtype(row) == OWN else " ᶠ")


def dtype(row: Row) -> str:
    """What a row was computed in."""
    return row["recipe"].get("dtype", OWN)


def clock(row: Row) -> tuple[str, str]:
    """What rows share whose seconds are compared: what they were computed in, and the day, where it is known."""
    return dtype(row), row.get("day", "")


def is_nats(score: Row) -> bool:
    """Whether lower is better: a loss has no right answers."""
    return "bits" not in score


def lost(score: Row) -> tuple[float, float]:
    """The share of a benchmark that was forgotten, and half of its interval's width."""
    low, high = score["interval"]
    if is_nats(score):
        return 1 - math.exp(score["before"] - score["after"]), (math.exp(-low) - math.exp(-high)) / 2
    return (score["before"] - score["after"]) / score["before"], (high - low) / 2 / score["before"]


def forgotten(row: Row) -> tuple[float, float]:
    """What was forgotten on average over the kept benchmarks, and half of its interval's width."""
    shares, halves = zip(*(lost(row["scores"][name]) for name in KEPT), strict=True)
    return mean(shares), math.hypot(*halves) / len(halves)


def learned(row: Row) -> float:
    """The task's score, higher is better."""
    score = row["scores"][row["task"]]
    return -score["after"] if is_nats(score) else score["after"]


def is_lora(row: Row) -> bool:
    """Whether this is plain LoRA at one of its rates."""
    return row["entry"].startswith("lora, ")


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> str:
    """All cells of a model and a task."""
    task, own = rows[0]["task"], rows[0]["scores"]
    heads = [f"{name} ({own[key]['before']:.3f}, n {own[key]['n']})" for key, name in KEPT.items()]
    first = ["", f"task ({own[task]['before']:.3f}, n {own[task]['n']})", *heads, "forgotten on average", "KL"]
    lines = [line(*first, "plan, time"), line("---", *["---:"] * (len(first)))]
    plain: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if is_lora(row) and "train" in row["seconds"]:
            plain.setdefault(clock(row), []).append(row["seconds"]["train"])
    for row in rows:
        share, half = forgotten(row)
        scores, seconds = row["scores"], row["seconds"]
        kl = kl_of(row)
        time = ""
        if "train" in seconds and clock(row) in plain:
            time = f"{seconds['plan']:.0f} s, {seconds['train'] / mean(plain[clock(row)]):.2f}"
        if row["entry"].startswith(("lora scaled", "repair", "fapm")):
            time = f"+{seconds.get('repair', 0):.0f} s"
        changes = [difference(scores[name]) for name in KEPT]
        numbers = [f"{scores[task]['after']:.3f}", *changes, f"{share:.1%} ± {half:.1%}", f"{kl:.4f}", time]
        lines.append(line(label(row), *numbers))
    return "\n".join(lines) + "\n"


def over_seeds(rows: Sequence[Row]) -> str:
    """The means of the entries that were run with several seeds, with the least and the most."""
    entries: dict[str, list[Row]] = {}
    for row in rows:
        entries.setdefault(row["entry"], []).append(row)
    several = [some for some in entries.values() if len(some) > 1]
    if not several:
        return ""

    def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
        return f"{form(mean(values))} ({form(min(values))} to {form(max(values))})"

    heads = ["", "seeds", "task", "C4, nats", "forgotten on average"]
    lines = ["\nOver seeds, mean (least to most):\n", line(*heads), line("---", *["---:"] * (len(heads) - 1))]
    for some in sorted(several, key=lambda own: mean(forgotten(row)[0] for row in own)):
        web = [row["scores"]["web"] for row in some]
        numbers = [
            spread([abs(learned(row)) for row in some], "{:.3f}".format),
            spread([score["after"] - score["before"] for score in web], "{:+.3f}".format),
            spread([forgotten(row)[0] for row in some], "{:.1%}".format),
        ]
        lines.append(line(some[0]["entry"], str(len(some)), *numbers))
    return "\n".join(lines) + "\n"


def followed(scored: Sequence[Row], rows: Sequence[Row]) -> str:
    """The rows of which IFEval was scored as well."""
    first = scored[0]["scores"]["ifeval"]
    about = f"{first['n']} prompts, none whose rules need data of nltk; answers of up to {Sizes.answer} tokens, greedy"
    lines = [
        f"\n## Instructions followed (IFEval, prompt level, strict)\n\n{about}. The base: {first['before']:.3f}.\n",
        line("", "learned", "task", "IFEval", "to the base, points", "forgotten"),
        line("---", "---", *["---:"] * 4),
    ]
    tasks = {cell_of(row): f"{abs(learned(row)):.3f}" for row in rows}
    for row in sorted(scored, key=lambda row: (-len(row["task"]), -row["scores"]["ifeval"]["after"])):
        score = row["scores"]["ifeval"]
        share, half = lost(score)
        numbers = [f"{score['after']:.3f}", difference(score), f"{share:.0%} ± {half:.0%}"]
        lines.append(line(label(row), TASKS[row["task"]].partition(",")[0], tasks.get(cell_of(row), ""), *numbers))
    return "\n".join(lines) + "\n"


def earlier(rows: Sequence[Row]) -> str:
    """What keep's defaults were before, oldest first: each form adds to the one above it."""
    if not rows:
        return ""
    heads = ["knowledge", "model, task", "seed", "task", "C4, nats", "forgotten on average", "of 0.01 nats"]
    lines = [
        "\n## Earlier forms of keep\n\nIts defaults until each was found wanting. Today's hold plain texts without the"
        " start token that SmolLM2 wrote them after."
        " *Of 0.01 nats*: what the run itself said, on SmolLM2 of 16 conversations alone until they were drawn.\n",
        line(*heads),
        line("---", "---", *["---:"] * (len(heads) - 2)),
    ]
    for row in sorted(rows, key=lambda row: [*EARLIER].index(row["entry"])):
        (share, half), score = forgotten(row), row["scores"][row["task"]]
        cells = [f"{EARLIER[row['entry']]}{'' if dtype(row) == OWN else ' ᶠ'}", f"{NAMES[row['model']]}, {row['task']}"]
        numbers = [str(row["seed"]), f"{score['after']:.3f}", difference(row["scores"]["web"])]
        lines.append(line(*cells, *numbers, f"{share:.1%} ± {half:.1%}", f"{row['last']['held_out/kl']:.4f}"))
    return "\n".join(lines) + "\n"


def cell_of(row: Row) -> tuple[str, str, str, int]:
    """What tells cells apart: model, task, entry, seed."""
    return row["model"], row["task"], row["entry"], row["seed"]


def kl_of(row: Row) -> float:
    """The KL to the base on texts that the base wrote itself with another seed: plain ones and chats."""
    return mean(row["scores"][name]["kl"] for name in ("own-texts", "own-chats") if name in row["scores"])


def predicted(rows: Sequence[Row]) -> str:
    """What the KL on the base's own texts, and that on the task's, say of what was forgotten: Spearman's ρ."""
    if len(rows) < ENOUGH:
        return ""
    lost_nats = [lost(row["scores"]["web"])[0] for row in rows]
    shares = [forgotten(row)[0] for row in rows]
    task = [row["scores"][row["task"]].get("kl") for row in rows]
    own, kinds = [kl_of(row) for row in rows], {"what C4 lost": lost_nats, "forgotten on average": shares}
    parts = []
    for name, values in kinds.items():
        told = f"{spearmanr(own, values).statistic:.2f}"
        if None not in task:
            told += f" (of the KL on the task's own items {spearmanr(task, values).statistic:.2f})"
        parts.append(f"{told} with {name}")
    return f"\nSpearman's ρ of the KL on the base's own texts over the {len(rows)} rows: {', '.join(parts)}.\n"


def difference(score: Row) -> str:
    """The difference to the base with its interval: points of an accuracy, or nats."""
    unit, digits = (1, 3) if is_nats(score) else (100, 1)
    numbers = [unit * value for value in (score["after"] - score["before"], *score["interval"])]
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*numbers, d=digits)


def matched(rows: Sequence[Row]) -> str:
    """What learned as much as LoRA at its best rate, nearly, beside its loss; and what learned less."""
    plain = [row for row in rows if is_lora(row) and not row["seed"]]
    if not plain:
        return ""
    best = max(plain, key=lambda row: (learned(row), -float(row["entry"].partition(", ")[2])))
    near = [row for row in rows if learned(row) >= learned(best) - NEAR]
    lines = [
        f"\nAt the task score of LoRA's best rate ({best['entry']}; of equal ones the lowest), at most {NEAR} below it;"
        " losses over LoRA's, where LoRA's is more than noise, ± what the row's own interval makes of it:\n",
        line("", "task, less LoRA's", "on average", *KEPT.values()),
        line("---", *["---:"] * (len(KEPT) + 2)),
    ]
    for row in near:
        losses = [(*forgotten(row), *forgotten(best))]
        losses += [(*lost(row["scores"][name]), *lost(best["scores"][name])) for name in KEPT]
        shares = [f"{own / all_:.0%} ± {half / all_:.0%}" if all_ > noise else "-" for own, half, all_, noise in losses]
        lines.append(line(label(row), against(*(one["scores"][one["task"]] for one in (row, best))), *shares))
    if less := [f"{label(row)} ({abs(learned(row)):.3f})" for row in rows if row not in near]:
        lines.append(f"\nThese learned less: {', '.join(less)}.")
    return "\n".join(lines) + "\n"


def against(score: Row, best: Row) -> str:
    """The difference of two scores of the task, with its paired interval where the right answers are known."""
    if is_nats(score):
        return f"{score['after'] - best['after']:+.3f}"
    right, wanted = ([float(bit) for bit in f"{int(one['bits'], 16):0{one['n']}b}"] for one in (score, best))
    low, high = paired_interval(wanted, right, 0)
    return f"{100 * (score['after'] - best['after']):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def picture(rows: Sequence[Row]) -> Figure:
    """What each row forgot on average, the task's score beside its name; a plot for each model and task."""
    every = groups(rows)
    colours = {"keep": look(1).colour, "lora": look(0).colour}
    with themed():
        made = page(9.5, 1.2 * len(every) + 0.24 * len(rows))
        heights = [len(some) + 3 for some in every.values()]
        plots = made.subplots(len(every), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for axes, ((model, task), some) in zip(plots, every.items(), strict=True):
            names = [f"{label(row)}   {abs(learned(row)):.3f}" for row in some]
            for place, row in enumerate(some):
                share, half = (100 * part for part in forgotten(row))
                family = row["entry"].partition(",")[0].removesuffix(" general")
                colour = colours.get(family, MUTED)
                axes.errorbar(share, place, xerr=half, fmt="o", color=colour, ms=5.5, elinewidth=1.0)
            axes.axvline(0, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
            frame(axes, "forgotten on average, %" if axes is plots[-1] else "")
            axes.set_yticks(range(len(some)), names)
            axes.set_ylim(len(some) - 0.4, -0.6)
            axes.set_title(f"{NAMES.get(model, model)}: {TASKS[task].partition(',')[0]}")
        return finish(made)
