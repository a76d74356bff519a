"""The commands of many runs: compare; sweep and layers, of one recipe at several points; run, of stages."""

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import echo

from keeptune.cli import dry_run as cli_dry
from keeptune.cli.shared import AsJson, Ended, ExitCode, Flops, RecipeFile, numbers_in, overrides_of

_MEASURES = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")


def compare(
    context: typer.Context,
    recipe: RecipeFile,
    max_loss: Annotated[
        list[str] | None,
        typer.Option(help="Export the best result that loses at most this share, or benchmark=share, of what it knew."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what they would take; fetch and run nothing.")
    ] = False,
    flops: Flops = None,
    as_json: AsJson = False,
) -> Any:
    """Run methods x rates x strengths x seeds (the recipe's `compare` section). Started again, it goes on."""
    from keeptune.data import hub
    from keeptune.experiments.choice import parse_max_loss
    from keeptune.experiments.engine import tasks_of
    from keeptune.experiments.plan_runs import RUNS, list_runs, load_comparison

    limits = parse_max_loss(max_loss) if max_loss else None
    overrides = overrides_of(context)
    if dry_run:
        listed = load_comparison(recipe, overrides, fetch=hub.cached)
        folder, specs = listed.output / RUNS, list_runs(listed)
        # Where no run has a folder nothing is done, and what is done need not be compared with data that are elsewhere.
        done = len(specs) - len(tasks_of(listed, specs)[1]) if folder.is_dir() else 0
        echo(f"{len(specs)} runs below {folder}, {done} done")
        return cli_dry.dry_run(recipe, overrides, flops, as_json=as_json)
    return run_and_show(load_comparison(recipe, overrides), limits)


def run_and_show(loaded: Any, limits: Any = None, show: Callable[[Any], None] | None = None) -> Any:
    """Runs a comparison, prints its results and returns them; the exit code is 1 where a run failed.

    Args:
        loaded: The comparison.
        limits: How much may be lost, for the best result.
        show: Prints the table; None prints the trade-off.
    """
    from keeptune.core.processes import is_first
    from keeptune.experiments.run_comparison import run_comparison

    compared = run_comparison(loaded, shlex.join(["keeptune", *sys.argv[1:]]), limits)
    (show or _show_trade_off)(compared)
    echo(f"report: {loaded.records / 'report.html'}")
    echo(f"numbers: {loaded.records / 'runs.json'}, runs.parquet and front.json")
    if compared.figure is not None:
        echo(f"figure: {compared.figure}")
    choice = compared.front["choice"]
    if choice:
        lost = ", ".join(f"{name} {loss:.3f}" for name, loss in choice["loss"].items())
        echo(f"best: {choice['run']} in {choice['adapter']}: learned {choice['learned']:.3f}, lost {lost}")
    for name, message in compared.failed.items():
        echo(f"failed: {name}: {message}", err=True)
    found = {"runs": compared.runs, "front": compared.front, "failed": compared.failed}
    # A launcher ends all as soon as one has left with a code.
    return Ended(found, ExitCode.FAILED) if compared.failed and is_first() else found


def _show_trade_off(compared: Any) -> None:
    """Print what each label learned and forgot at its best point, and at matched score."""
    from keeptune.report.tables.terminal import table

    front = compared.front
    matched = {row["label"]: row for row in front["matched"]["rows"]}
    score = front["matched"]["score"]
    rows = []
    for label in matched or front["fronts"]:  # those that forget least at the same score first
        points = [point for point in front["points"] if point["label"] == label]
        best = max(points, key=lambda point: (point["learned"]["mean"], -point["forgotten"]["mean"]))
        row = matched.get(label, {})
        values = (best["learned"], best["forgotten"], row.get("forgotten"))
        rows.append((label, *map(interval_text, values), str(row.get("how", ""))))
    at = "forgotten" if score is None else f"forgotten at {score:.3g}"
    heads = ("method", "learned most", "forgotten there", at, "how")
    Console().print(table(heads, rows, (*heads[:3], "how")))


def interval_text(value: Any) -> str:
    """Returns a mean with its interval, of ``mean``, ``low`` and ``high``."""
    if value is None:
        return "-"
    text = f"{value['mean']:.3f}"
    return text if value.get("low") is None else f"{text} [{value['low']:.3f}, {value['high']:.3f}]"


def sweep(
    context: typer.Context,
    recipe: RecipeFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the points; run nothing.")] = False,
) -> Any:
    """Run a recipe at several points and seeds (its keys `sweep` and `seeds`), and compare them on one page."""
    from keeptune.experiments.plan_runs import load_sweep

    return _run_or_list(load_sweep(recipe, overrides_of(context)), dry_run)


def layers(
    context: typer.Context,
    recipe: RecipeFile,
    study: Annotated[str, typer.Option(help="single: one at a time; bottom or top: the lowest or highest few.")],
    numbers: Annotated[str | None, typer.Option(help="How many layers, such as 2,4,6; for bottom and top.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs; run nothing.")] = False,
) -> Any:
    """Study what tuning each layer gains and costs (L2-LoRA Fig. 4, Tables 5 and 6), as runs of one recipe."""
    from keeptune.experiments.layer_studies import load_layer_study

    counts = numbers_in("--numbers", numbers, int, "2,4,6") or None
    return _run_or_list(load_layer_study(recipe, study, overrides_of(context), counts), dry_run)


def _run_or_list(loaded: Any, dry_run: bool) -> Any:
    from keeptune.experiments.plan_runs import check_runs, list_runs
    from keeptune.report.tables.analyses import print_points

    if not dry_run:
        return run_and_show(loaded, show=_show)
    specs = list_runs(loaded)
    check_runs(loaded, specs)
    print_points([(e.label, e.x, e.settings, loaded.section.seeds) for e in loaded.entries], Console())
    echo(f"{len(specs)} runs below {loaded.output / 'runs'}")
    points = [{"label": e.label, "x": e.x, "settings": e.settings} for e in loaded.entries]
    return {"points": points, "seeds": loaded.section.seeds, "runs": len(specs), "folder": loaded.output / "runs"}


def _show(compared: Any) -> None:
    """Print the points of a sweep: scores after training, K, T and KT."""
    from keeptune.report.tables.analyses import print_benefits
    from keeptune.report.tables.comparison_table import print_comparison

    series = compared.series
    if not series["rows"]:  # every run failed
        return
    runs = [row | {"label": row["name"], "adapter": "", "export_gap": None} for row in series["rows"]]
    print_comparison({"base": "", "methods": runs}, Console())
    if "benefit" in series:
        print_benefits(series, Console())


def run_stages(recipe: Path, overrides: Mapping[str, Any]) -> Any:
    """Run a sequence, print its record and return it.

    Args:
        recipe: The YAML file.
        overrides: Dotted key to value.
    """
    from keeptune.experiments.sequence.run_stages import run_sequence
    from keeptune.experiments.sequence.stages_section import load_sequence
    from keeptune.report.tables.terminal import table

    sequence = load_sequence(recipe, overrides)
    record = run_sequence(sequence)
    heads = ["after"]
    for benchmark in record["benchmarks"]:
        about = benchmark["stage"] or ("keep" if benchmark["role"] == "knowledge" else "learn")
        heads.append(f"{benchmark['name']}\n({about})")
    names = ["base", *(f"{stage['name']} ({stage['method']})" for stage in record["stages"])]
    rows = []
    for name, row, intervals in zip(names, record["scores"], record["intervals"], strict=True):
        ends = ["" if pair is None else f"\n{pair[0]:+.2f} {pair[1]:+.2f}" for pair in intervals]
        rows.append((name, *(_score_text(score) + pair for score, pair in zip(row, ends, strict=True))))
    Console().print(table(heads, rows, heads[:1]))
    echo("below a score: ends of the 95% interval of its difference to the base's, on the same items")
    echo(", ".join(f"{name.replace('_', ' ')} {_score_text(record[name])}" for name in _MEASURES))
    if record["why"]:
        echo(record["why"])
    written = record["export"]
    if written is not None and written["error"]:
        echo(f"cut to rank {written['rank']}: {written['error']:.2%} of the change (Frobenius) is left out")
    for stage in record["stages"]:
        echo(f"after {stage['name']}: {stage['adapter']}, gap {stage['gap']:.1e} in logits to what was trained")
    echo(f"for the original base: {record['adapter']}")
    echo(f"report: {sequence.output / 'report.html'}, numbers: {sequence.output / 'sequence.json'}")
    return record


def _score_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
