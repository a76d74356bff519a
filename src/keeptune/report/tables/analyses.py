"""Tables of stages and analyses: plans, scores, checks, sweeps, changes, traces, overlaps, repairs, grids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from keeptune.report.estimates import totals
from keeptune.report.numbers import axis_value, count, gap, number, short, signed, unit_words
from keeptune.report.tables.comparison_table import print_comparison
from keeptune.report.tables.terminal import print_grid, say, table

_ENDS = ("mean", "low", "high")
Record = Mapping[str, Any]


def print_plan(rows: Sequence[Record], console: Console, notes: Sequence[str] = ()) -> None:
    """Prints ``plan`` of ``report.json``: ranks and importances by layer and role, and the largest start error."""
    if not rows:
        console.print("The plan is empty.")
        return
    say(console, "rank")
    print_grid(_cells(rows, lambda row: str(row["rank"])), console)
    weighed = [row for row in rows if len(row["evidence"].get("importance", ())) == 1]
    if weighed:
        say(console, "\nimportance")
        print_grid(_cells(weighed, lambda row: gap(row["evidence"]["importance"][0])), console)
    for index, note in enumerate(notes):
        say(console, f"\n{note}" if index == 0 else note)
    errors = [row["start_error"] for row in rows if "start_error" in row]
    if errors:
        say(console, f"start error: at most {gap(max(errors))}")
    total = sum(row["trained_parameters"] for row in rows)
    say(console, f"{len(rows)} targets, {total:,} trained parameters ({count(total)})")


def print_points(points: Sequence[tuple[str, float | None, Record, Sequence[int]]], console: Console) -> None:
    """Prints the points of a sweep and what each changes: name, place on the axis, settings and seeds."""
    rows = [
        (
            name,
            "–" if x is None else f"{x:g}",
            "\n".join(f"{key}: {value}" for key, value in settings.items()) or "nothing",
            ", ".join(map(str, seeds)),
        )
        for name, x, settings, seeds in points
    ]
    console.print(table(("point", "x", "changes", "seeds"), rows, ("point", "changes", "seeds")))


def print_scores(summaries: Sequence[Record], console: Console) -> None:
    """Prints benchmark scores before and after, with the interval of the change."""
    if not summaries:
        console.print("The recipe lists no benchmarks under `evaluate`.")
        return
    rows = [
        (
            *(str(item[key]) for key in ("name", "role")),
            f"{item['metric']}, chat" if item.get("chat") else str(item["metric"]),
            str(item["n"]),
            *(number(item[key]) for key in ("before", "after")),
            f"[{item['interval'][0]:+.3f}, {item['interval'][1]:+.3f}]",
        )
        for item in summaries
    ]
    left = ("benchmark", "role", "metric")
    console.print(table((*left, "items", "before", "after", "95% interval of the change"), rows, left))


def print_check(record: Record, console: Console) -> None:
    """Prints what each benchmark of a check lost, with its interval, its limit and the verdict; and the whole one.

    Of two servers there are no limits, and no verdict.
    """
    end = 8 if "passed" in record else 6
    rows = [
        (
            str(item["name"]),
            str(item["n"]),
            *(number(item[key]) for key in ("before", "after")),
            f"{item['loss']:+.4f}",
            "[{:+.4f}, {:+.4f}]".format(*item["loss_interval"]),
            "–" if item.get("limit") is None else f"{item['limit']:g}",
            "LOST" if item.get("lost") else "kept",
        )[:end]
        for item in record["benchmarks"]
    ]
    heads = ("benchmark", "items", "base", "tuned", "lost", "95% interval", "limit", "verdict")
    console.print(table(heads[:end], rows, ("benchmark", "verdict")))
    if "passed" not in record:
        return
    lost = [item["name"] for item in record["benchmarks"] if item["lost"]]
    words = f"lost more than it may: {', '.join(lost)}" if lost else "nothing lost more than it may"
    say(console, f"{words} (by the {record['estimate']} of the loss)")


def _cells(rows: Sequence[Record], write: Callable[[Record], str]) -> dict[tuple[int | None, str], list[str]]:
    cells: dict[tuple[int | None, str], list[str]] = {}
    for row in rows:
        cells.setdefault((row["layer"], row["role"]), []).append(write(row))
    return cells


def print_change(record: Record, console: Console) -> None:
    """Prints the relative change, in percent, by layer and role, of one model after the other, from ``change.json``."""
    for source in record["sources"]:
        texts: dict[tuple[int | None, str], list[str]] = {}
        for place, total in totals(source["rows"], "layer", "role").items():
            texts[place] = [_text(total["relative"], ".2%").rstrip("%")]
        texts |= {
            (int(layer), "all"): [_text(total["relative"], ".2%").rstrip("%")]
            for layer, total in source["layers"].items()
        }
        say(console, f"\n{source['label']}: change relative to the weights, %")
        print_grid(texts, console)


def print_curvature(record: Record, console: Console) -> None:
    """Prints the curvature felt and the shares in its stiffest directions, of each model in ``curvature.json``."""
    rows = []
    for source in record["sources"]:
        for side, felt in source["sides"].items():
            stiff = sum(felt["curvature"][: len(felt["curvature"]) // 2])
            shares = (f"{100 * stiff:.1f}%", f"{100 * felt['directions'][0]:.1f}%")
            rows.append((short(source["label"], 40), side, f"{felt['felt']:.2f}", *shares))
    heads = ("curvature felt", "in stiffest half of curvature", "in stiffest tenth of directions")
    console.print(table(("update of", "side", *heads), rows, ("update of", "side")))
    say(console, "curvature felt: per unit of the update; 1 for one that knows nothing of it")


def print_trace(record: Record, console: Console) -> None:
    """Prints the effects of each layer, from ``trace.json``."""
    models = record["models"]
    heads = [head for model in models for head in (f"{short(model['name'], 24)}: AIE", "NAIE")]
    rows = []
    for layer in range(len(models[0]["AIE"])):
        row = [str(layer)]
        for model in models:
            error, shares = model["AIE_error"][layer], model[f"NAIE_{record['norm']}"]
            row.append(f"{model['AIE'][layer]:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}"))
            row.append(_text(shares and shares[layer], ".3f"))
        rows.append(row)
    console.print(table(("layer", *heads), rows))
    for model in models:
        chance = "" if model["distinct"] else "; no layer's effect stands out of the spread over texts"
        probabilities = f"the answer's probability is {model['clean']:.3f}, with noise {model['corrupted']:.3f}"
        say(console, f"{model['name']}: {probabilities}{chance}")
    say(console, "AIE: probability brought back, ± half the 95% interval; probabilities are summed over answer tokens")


def print_suppressed(record: Record, console: Console) -> None:
    """Prints what suppression costs, from ``suppress.json``."""
    count = sum(map(len, record["methods"][0]["rows"]))
    say(
        console,
        f"{count} of {record['nodes'] * len(record['layers'])} nodes give zero ({record['q']:g}%, "
        f"{record['over']}), attributed over {record['texts']} texts; S-H: the highest, S-L: the lowest",
    )
    print_comparison(record, console)
    for item in record["gaps"]:
        low, high = item["interval"]
        difference = f"S-L less S-H {item['S-L less S-H']:+.3f}"
        say(console, f"{item['name']}: {difference}, 95% interval {low:+.3f} to {high:+.3f}")


def print_overlap(record: Record, console: Console) -> None:
    """Prints an overlap, layer by layer and in all, from ``overlap.json``."""
    for side in ("first", "second"):
        say(console, f"{side}: {record[side]['name']}, {record[side]['texts']} texts")
    rows = []
    for row in [*record["by_layer"], {"layer": "all", **record["all"]}]:
        counts = [str(row[key]) for key in ("layer", "first", "second", "common")]
        rows.append([*counts, _text(row["share"]), _text(row["chance"])])
    console.print(table(("layer", "first", "second", "common", "share", "by chance"), rows))


def print_repair(record: Record, console: Console) -> None:
    """Prints the drift of each target in ``repair.json``, what is kept of the task, the sweep over μ and the scores."""
    say(console, "relative feature drift on the knowledge, %, before > after")
    drifts = _cells(record["targets"], lambda row: f"{100 * row['drift_before']:.2f} > {100 * row['drift']:.2f}")
    print_grid(drifts, console)
    say(console, f"mu {record['mu']:.4g}: mean drift {record['drift_before']:.4g} > {record['drift']:.4g}")
    kept, error = record["task_kept"], record["task_error"]
    if kept is not None:
        say(console, f"kept of what the adapter does on the task: {kept:.1%}, relative error {error:.1%}")
    if "sweep" in record:
        rows = [
            (f"{row['mu']:g}", f"{row['drift']:.2g}", _text(row["task_kept"]), _text(row["task_error"]))
            for row in record["sweep"]
        ]
        console.print(table(("mu", "drift", "kept", "task error"), rows))
    if "scores" in record:
        _print_repaired_scores(record["scores"], console)


def _print_repaired_scores(scores: Sequence[Record], console: Console) -> None:
    rows = []
    for row in scores:
        cells = [f"{row['name']} ({'keep' if row['role'] == 'knowledge' else 'learn'})", f"{row['base']:.3f}"]
        for entry in row["models"]:
            low, high = entry["interval_to_first"] or (None, None)
            cells.append(f"{entry['score']:.3f}" + ("" if low is None else f"\n{low:+.3f} to {high:+.3f}"))
        rows.append(cells)
    console.print(table(("", "base", *(entry["label"] for entry in scores[0]["models"])), rows, ("",)))
    say(console, "below a score: 95% interval of its difference to the adapter's, on the same items")


def print_benefits(record: Record, console: Console) -> None:
    """Prints the benefit of each cell of a grid over its baseline, a table for each benchmark, with means at the ends.

    The first of the two axes of ``runs.json`` runs downwards, the second to the right.
    """
    (down, downs), (across, acrosses) = ((axis["key"], axis["values"]) for axis in record["grid"]["axes"])
    corner = f"{down.rpartition('.')[2]} \\ {across.rpartition('.')[2]}"
    for benefit in record["benefit"]:
        decimals = 3 if benefit["unit"] == "nats" else 1

        def told(mean: float | None, low: float | None = None, high: float = 0.0, decimals: int = decimals) -> str:
            half = "" if low is None else f" ±{(high - low) / 2:.{decimals}f}"
            return "–" if mean is None else signed(mean, decimals) + half

        rows = [
            [axis_value(value), *(told(*(cell[k] for k in _ENDS)) if cell else "–" for cell in line), told(mean)]
            for value, line, mean in zip(downs, benefit["cells"], benefit["rows"], strict=True)
        ]
        rows.append(["mean", *map(told, [*benefit["columns"], benefit["mean"]])])
        frame = table([corner, *map(axis_value, acrosses), "mean"], rows, wrap=False)
        over = record.get("baseline") or "the base model"
        frame.title = Text(f"{benefit_title(benefit)}: {unit_words(benefit['unit'])} over {over}")
        console.print(frame)


def benefit_title(benefit: Record) -> str:
    """Returns the name of a benchmark with what it stands for: to keep, or to learn."""
    word = {"knowledge": "keep", "task": "learn"}.get(benefit["role"])
    return str(benefit["name"]) if word is None else f"{benefit['name']} ({word})"


def _text(value: float | None, form: str = ".1%") -> str:
    return "–" if value is None else f"{value:{form}}"
