"""The command line: the whole job, each of its stages, and what is done with its results."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import echo

from keeptune.cli import compare, dry_run, launch, serve, show_data, store_commands, studies
from keeptune.cli.first_steps import doctor, init
from keeptune.cli.repair import check, repair
from keeptune.cli.share import compare_served, merge, push
from keeptune.cli.shared import (
    OVERRIDES,
    AsJson,
    Commands,
    ExitCode,
    Flops,
    RecipeFile,
    job_of,
    load,
    overrides_of,
    print_report,
)
from keeptune.core.errors import KeeptuneError

_NO_TELEMETRY = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio's pages
}
_HOSTED = {"llamafactory"}  # in each of several processes, which the host joins itself
# Commands that several processes share; of the others the first process does all.
_DIVIDED = {"run", "stats", "plan", "train", "export", "evaluate", "compare", "sweep"}
app = Commands(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model without destroying what it already knows.",
    epilog="Any key of the recipe can be set: keeptune run recipe.yaml --train.learning_rate 1e-3 --method.rank 4",
)


def main() -> None:
    """Runs a command; an error that the user can correct is one message and exit code 2."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read as torch is loaded; what is wrong is raised too
    for name, value in _NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    divided = not _DIVIDED.isdisjoint(sys.argv[1:2])
    if several and not divided and _HOSTED.isdisjoint(sys.argv[1:2]) and os.environ.get("RANK", "0") != "0":
        return  # the first process does it alone
    try:
        with contextlib.ExitStack() as stack:
            if several and divided:
                from keeptune.core.processes import joined  # loads torch

                stack.enter_context(joined())
            _quiet_libraries()
            app(standalone_mode=True, prog_name="keeptune")
    except KeeptuneError as error:
        echo(f"error: {error}", err=True)
        sys.exit(ExitCode.WRONG)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


@app.command(context_settings=OVERRIDES)
def run(
    context: typer.Context,
    recipe: RecipeFile,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be fetched, trained and scored; fetch and run nothing.")
    ] = False,
    flops: Flops = None,
    as_json: AsJson = False,
) -> Any:
    """Run the whole job: statistics, plan, train, export, evaluate, report; or each of the recipe's `stages`."""
    from keeptune.pipeline.run import run as run_job
    from keeptune.recipe.reading import read_values

    overrides = overrides_of(context)
    if dry:
        return dry_run.dry_run(recipe, overrides, flops, as_json=as_json)
    if "stages" in read_values(recipe, overrides):
        return compare.run_stages(recipe, overrides)
    loaded = load(recipe, context)
    return print_report(run_job(loaded), loaded.output)


@app.command(context_settings=OVERRIDES)
def stats(context: typer.Context, recipe: RecipeFile) -> dict[str, Any]:
    """Collect the statistics that the method needs into the store."""
    from keeptune.pipeline.run import stats_stage

    job = job_of(recipe, context)
    targets, statistics = stats_stage(job)
    sites = {request.site(t) for t in targets for request in statistics.requests[t.name]}
    echo(f"{len(sites)} statistics for {len(targets)} targets in {job.store.folder}")
    return {"statistics": len(sites), "targets": len(targets), "store": job.store.folder}


@app.command(context_settings=OVERRIDES)
def plan(context: typer.Context, recipe: RecipeFile) -> dict[str, Any]:
    """Print ranks, trained parameters and start error, without training."""
    from keeptune.adapter.anchor import start_errors
    from keeptune.pipeline.run import plan_stage
    from keeptune.report.tables.analyses import print_plan

    job = job_of(recipe, context)
    made = plan_stage(job)
    notes = made.provenance.get("notes", ())
    if made.scope == "all":
        echo("full fine-tuning: every weight is trained, no adapter is planned")
        return {"targets": [], "notes": notes}
    errors = start_errors(job.base(), made, anchor=job.recipe.anchor)
    rows = [row | {"start_error": errors[row["target"]]} for row in made.summary()]
    print_plan(rows, Console(), notes)
    return {"targets": rows, "notes": notes}


@app.command(context_settings=OVERRIDES)
def train(context: typer.Context, recipe: RecipeFile) -> dict[str, Any]:
    """Train by the plan (made if it is not there), going on from the last checkpoint."""
    from keeptune.pipeline.run import plan_stage
    from keeptune.pipeline.training import train_stage

    job = job_of(recipe, context)
    train_stage(job, plan_stage(job))
    echo(f"trained factors in {job.output / 'trained'}")
    return {"trained": job.output / "trained"}


@app.command(context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    recipe: RecipeFile,
    adapter: Annotated[Path | None, typer.Option(help="Any PEFT adapter for the same base.")] = None,
) -> list[dict[str, Any]]:
    """Score the exported adapter and the base on the same items."""
    from keeptune.pipeline.scoring import evaluate_stage
    from keeptune.report.tables.analyses import print_scores

    scores = evaluate_stage(job_of(recipe, context), adapter)
    print_scores(scores, Console())
    return scores


app.command("data", context_settings=OVERRIDES)(show_data.show_data)
for _starts_another in (launch.launch, launch.llamafactory):  # launch passes --json on to it
    typer.Typer.command(app, context_settings=OVERRIDES)(_starts_another)
for _with_recipe in (
    init,
    doctor,
    serve.export,
    serve.serve,
    compare.sweep,
    compare.compare,
    compare.layers,
    studies.suppress,
    studies.overlap,
):
    app.command(context_settings=OVERRIDES)(_with_recipe)
for _with_options in (
    studies.change,
    studies.curvature,
    studies.energy,
    repair,
    check,
    merge,
    push,
    compare_served,
    studies.trace,
):
    app.command()(_with_options)


app.add_typer(store_commands.app, name="store")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Where the report goes; default: the first run.")] = None,
    reference: Annotated[Path | None, typer.Option(help="A run of full fine-tuning that T is relative to.")] = None,
) -> dict[str, Any]:
    """Join finished runs into one report.json and report.html."""
    from keeptune.pipeline.reporting import write_report

    folder = output or runs[0]
    return print_report(write_report(runs, folder, reference=reference), folder)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many training seeds.")] = 1,
) -> dict[str, Any]:
    """Compare plain LoRA, replay, KL to the base and keep on the embedded model, in about three minutes."""
    from keeptune.pipeline.demo import demo as run_demo

    return print_report(run_demo(output, seeds=range(seeds)), output)


def _quiet_libraries() -> None:
    """Shows keeptune's own messages and bars, not those of the libraries below it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("keeptune").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a package that is not needed
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # weights that are left on disk on purpose
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "--help" in sys.argv or len(sys.argv) == 1 or "_KEEPTUNE_COMPLETE" in os.environ:
        return
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", "Could not find a config file", module="peft")  # beside a GGUF file
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
