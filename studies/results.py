"""The figures of docs/results/overview.md, from finished comparisons: overview-tables.md and results.png.

    keeptune compare recipes/atlas-compare.yaml
    keeptune compare recipes/stories-compare.yaml
    python studies/results.py [runs/atlas-compare] [runs/stories-compare]

Two readings of the same cells. *At matched score* interpolates on each method's own front, seed by seed; it takes the
luckiest of a method's settings, so a method with more settings has more tries. *Chosen on one seed* has no such luck:
seed 0 chooses the setting, the other seeds show it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import spread
from drawing import INK, MUTED, bare, finish, page, png, themed
from matplotlib.ticker import PercentFormatter

from keeptune.core.artefact import read_json, write_bytes
from keeptune.experiments.comparison_record import FRONT, RUNS_FILE
from keeptune.experiments.front import Point, families, pareto, points_of
from keeptune.experiments.matched import matched

Rows = Sequence[Mapping[str, Any]]
SCORES = (0.8, 0.85)
STORIES = -2.75
SHOWN = {
    "lora": ("#7a7a7a", "o"),
    "lora, scaled": ("#222222", "s"),
    "lora + replay": ("#e69f00", "^"),
    "lora + kl": ("#d55e00", "D"),
    "keep": ("#0072b2", "v"),
    "l2-lora": ("#009e73", "P"),
    "lalora": ("#aa4499", "X"),
    "corda-kpm": ("#56b4e9", "h"),
    "farss": ("#332288", "<"),
    "full": ("#882255", ">"),
}
_HEAD = """# All results of the comparisons

Made by `python studies/results.py` from `keeptune compare recipes/atlas-compare.yaml` and
`recipes/stories-compare.yaml`; [overview.md](overview.md) says what they mean. Forgotten and learned are percentage
points on atlas, nats per token on stories260K. Intervals are Student's, 95%, over three seeds.
"""


def main(atlas: Path, stories: Path, docs: Path) -> None:
    """Write the page and the picture."""
    cells, front = read_json(atlas / RUNS_FILE), read_json(atlas / FRONT)
    parts = [_HEAD, f"\n## atlas\n\n{facts_of(cells)}\n"]
    for score in SCORES:
        parts.append(f"\n### At {score:.0%} of topics learned\n\n{matched_table(cells['runs'], score, 100)}\n")
    parts.append(f"\n### Chosen on seed 0, shown on seeds 1 and 2\n\n{chosen_table(cells['runs'], SCORES[0])}\n")
    parts.append(f"\n### Every setting\n\n{setting_table(front, 100)}\n")
    if (stories / "runs.json").is_file():
        other, other_front = read_json(stories / RUNS_FILE), read_json(stories / FRONT)
        parts.append(f"\n## stories260K\n\n{facts_of(other)}\n")
        title = f"At {-STORIES:.2f} nats per token of word problems"
        parts.append(f"\n### {title}\n\n{matched_table(other['runs'], STORIES, 1)}\n")
        parts.append(f"\n### Every setting\n\n{setting_table(other_front, 1)}\n")
    png(figure(cells["runs"]), docs / "results" / "results.png")
    write_bytes(docs / "results" / "overview-tables.md", "".join(parts).encode())


def facts_of(cells: Mapping[str, Any]) -> str:
    """Say how many cells there are and what they took."""
    rows = cells["runs"]
    trained = [row for row in rows if row["variant"] is None and row["status"] == "done"]
    seconds = sum(value or 0.0 for row in rows if row["status"] == "done" for value in row["seconds"].values())
    failed = sum(row["status"] == "failed" for row in rows)
    benchmarks = ", ".join(f"{b['name']} ({b['n']} items)" for b in cells["benchmarks"])
    return (
        f"{len(trained)} trained runs and {len(rows) - len(trained) - failed} post-hoc variants, {failed} failed; "
        f"{seconds / 60:.0f} minutes of one core in all. Scores: {benchmarks}."
    )


def matched_table(rows: Rows, score: float, unit: float) -> str:
    """Write what each label forgets where all learn the same, and how that differs from plain LoRA and LoRA scaled."""
    groups = families(points_of(rows)[0])
    against = [label for label in ("lora", "lora, scaled") if label in groups]
    tables = {label: {row["label"]: row for row in matched(groups, score, label)["rows"]} for label in against}
    heads = " | ".join(f"than {label}" for label in against)
    lines = [f"| | forgotten | {heads} | |", f"| --- | ---: | {' | '.join('---:' for _ in against)} | --- |"]
    for label, row in tables[against[0]].items():
        differences = [_signed(tables[other][label]["difference"], unit) for other in against]
        lines.append(f"| {label} | {_interval(row['forgotten'], unit)} | {' | '.join(differences)} | {row['how']} |")
    return "\n".join(lines)


def chosen_table(rows: Rows, score: float) -> str:
    """Choose each label's setting by seed 0 and show the other seeds: no setting is shown where it was chosen."""
    found = []
    for label, points in families(points_of(rows)[0]).items():
        enough = [p for p in points if 0 in p.places and p.places[0][0] >= score and len(p.places) > 1]
        if not enough:
            continue
        best = min(enough, key=lambda point: point.places[0][1])
        others = [place for seed, place in best.places.items() if seed != 0]
        learned, forgotten = ([100 * place[axis] for place in others] for axis in (0, 1))
        found.append((statistics.mean(forgotten), label, best, learned, forgotten))
    lines = ["| | setting | forgotten | topics |", "| --- | --- | ---: | ---: |"]
    for _, label, best, learned, forgotten in sorted(found, key=lambda one: one[0]):
        lines.append(f"| {label} | {told(best)} | {spread(forgotten)} | {spread(learned)} |")
    return "\n".join(lines)


def told(point: Point) -> str:
    """Say a setting in a few words."""
    about = point.rows[0]
    rest = {
        key: value for key, value in about["settings"].items() if key.endswith(("strength", "nats", ".q", "replay"))
    }
    words = [f"rate {about['learning_rate']:g}"] if about["learning_rate"] else []
    words += [f"{key.rpartition('.')[2]} {value:g}" for key, value in rest.items()]
    words += [f"{key} {value:g}" for key, value in (about["variant"] or {}).items() if isinstance(value, int | float)]
    return ", ".join(words)


def setting_table(front: Mapping[str, Any], unit: float) -> str:
    """Write every setting's means."""
    digits = 1 if unit > 1 else 3
    lines = ["| | learned | forgotten | seeds | on the front |", "| --- | ---: | ---: | ---: | --- |"]
    for point in front["points"]:
        cells = [_deviation(point[axis], unit, digits) for axis in ("learned", "forgotten")]
        mark = "yes" if point["on_front"] else ""
        lines.append(f"| {point['name']} | {cells[0]} | {cells[1]} | {len(point['seeds'])} | {mark} |")
    return "\n".join(lines)


def _deviation(over: Mapping[str, float | None], unit: float, digits: int) -> str:
    sd = "" if over["sd"] is None else f" ± {unit * over['sd']:.{digits}f}"
    return f"{unit * (over['mean'] or 0.0):.{digits}f}{sd}"


def _interval(over: Mapping[str, float | None] | None, unit: float, digits: int | None = None) -> str:
    if over is None or over["mean"] is None:
        return "-"
    digits = (1 if unit > 1 else 3) if digits is None else digits
    ends = (
        ""
        if over["low"] is None or over["high"] is None
        else f" [{unit * over['low']:.{digits}f}, {unit * over['high']:.{digits}f}]"
    )
    return f"{unit * over['mean']:.{digits}f}{ends}"


def _signed(over: Mapping[str, float | None] | None, unit: float) -> str:
    text = _interval(over, unit)
    return f"+{text}" if over is not None and (over["mean"] or 0.0) > 0 else text


def figure(rows: Rows) -> Any:
    """Draw facts forgotten against topics learned: the front of each label's means, the labels of SHOWN in colour."""
    groups = families(points_of(rows)[0])
    with themed():
        made = page(7.4, 5.0)
        axes = made.subplots()
        for label, points in groups.items():
            front = sorted(p.place for p, on in zip(points, pareto([p.place for p in points]), strict=True) if on)
            colour, shape = SHOWN.get(label, ("#d5dade", ""))
            axes.plot(
                [x for x, _ in front],
                [y for _, y in front],
                marker=shape or ".",
                color=colour,
                label=label if shape else None,
                linewidth=1.6 if shape else 1.0,
                markersize=5.5 if shape else 3,
                zorder=3 if shape else 1,
            )
        axes.plot([], [], color="#d5dade", marker=".", label="the others")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlim(0.4, 1.0)
        axes.invert_yaxis()
        axes.set_xlabel("topics learned", color=MUTED)
        axes.set_ylabel("facts forgotten, percentage points", color=MUTED)
        axes.set_title("What each method forgets for what it learns: means over three seeds", color=INK)
        axes.grid(visible=True)
        axes.legend(frameon=False, fontsize=8.5, loc="lower left")
        bare(axes, ("left", "bottom"))
        return finish(made)


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    defaults = (Path("runs/atlas-compare"), Path("runs/stories-compare"))
    main(*(given + list(defaults[len(given) :])), docs=Path(__file__).parents[1] / "docs")  # type: ignore[misc]
