"""The command line: the main job and each of its stages."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from keeptune.cli import compare as cli_compare
from keeptune.cli import dry_run as cli_dry
from keeptune.cli import nodes as cli_nodes
from keeptune.cli import repair as cli_repair
from keeptune.cli import sequence as cli_sequence
from keeptune.cli import studies as cli_studies
from keeptune.cli.studies import OVERRIDES, RecipeFile, say, show_comparison
from keeptune.core.errors import KeeptuneError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model without destroying what it already knows.",
    epilog="Any key of the recipe can be set: keeptune run recipe.yaml --train.learning_rate 1e-3 --method.rank 4",
)


def main() -> None:
    """Run a command; an error the user can mend is one message and exit code 2."""
    _quiet_libraries()
    try:
        app(standalone_mode=True)
    except KeeptuneError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command(context_settings=OVERRIDES)
def run(
    context: typer.Context,
    recipe: RecipeFile,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be fetched, trained and scored; fetch and run nothing.")
    ] = False,
    flops: cli_dry.Flops = None,
) -> None:
    """Do the whole job: stats, plan, train, export, evaluate, report; stage after stage where it has `stages`."""
    from keeptune.pipeline.run import run as run_job
    from keeptune.recipe.schema import parse_overrides

    overrides = parse_overrides(context.args)
    if dry_run:
        cli_dry.dry_run(recipe, overrides, flops)
        return
    if cli_sequence.has_stages(recipe, overrides):
        cli_sequence.run_stages(recipe, overrides)
        return
    loaded = _load(recipe, context)
    _show_report(run_job(loaded), loaded.output)


@app.command(context_settings=OVERRIDES)
def stats(context: typer.Context, recipe: RecipeFile) -> None:
    """Collect the statistics the method needs into the store."""
    from keeptune.pipeline.run import stats_stage

    job = _job(recipe, context)
    targets, statistics = stats_stage(job)
    sites = {request.site(t) for t in targets for request in statistics.requests[t.name]}
    say(f"{len(sites)} statistics for {len(targets)} targets in {job.store.folder}")


@app.command(context_settings=OVERRIDES)
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    diff: Annotated[Path | None, typer.Option(help="A plan folder to compare with.")] = None,
) -> None:
    """Print ranks, trained parameters and start error, without training."""
    from keeptune.adapter.install import start_errors
    from keeptune.core.plan import Plan
    from keeptune.pipeline.run import plan_stage
    from keeptune.report.diff import print_diff
    from keeptune.report.stages import print_plan

    job = _job(recipe, context)
    made = plan_stage(job)
    if made.scope == "all":
        say("full fine-tuning: every weight is trained, no adapter is planned")
        return
    errors = start_errors(job.base(), made, anchor=job.recipe.anchor)
    rows = [row | {"start_error": errors[row["target"]]} for row in made.summary()]
    print_plan(rows, Console(), made.provenance.get("notes", ()))
    if diff is not None:
        other = Plan.load(diff)
        say(f"\nthis plan | {diff}")
        if not print_diff(made, other, Console()):
            say(f"equal to {diff}")


@app.command(context_settings=OVERRIDES)
def train(context: typer.Context, recipe: RecipeFile) -> None:
    """Train by the plan (made if it is not there), going on from the last checkpoint."""
    from keeptune.pipeline.run import plan_stage, train_stage

    job = _job(recipe, context)
    train_stage(job, plan_stage(job))
    say(f"trained factors in {job.output / 'trained'}")


@app.command(context_settings=OVERRIDES)
def export(context: typer.Context, recipe: RecipeFile) -> None:
    """Write the trained adapter and check it on a freshly loaded base."""
    from keeptune.pipeline.run import export_stage, plan_stage

    job = _job(recipe, context)
    _show_export(export_stage(job, plan_stage(job)))


@app.command(context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    recipe: RecipeFile,
    adapter: Annotated[Path | None, typer.Option(help="Any PEFT adapter for the same base.")] = None,
) -> None:
    """Score the exported adapter and the base on the same items."""
    from keeptune.pipeline.scoring import evaluate_stage
    from keeptune.report.stages import print_scores

    print_scores(evaluate_stage(_job(recipe, context), adapter), Console())


app.command(context_settings=OVERRIDES)(cli_studies.sweep)
app.command(context_settings=OVERRIDES)(cli_compare.compare)
app.command(context_settings=OVERRIDES)(cli_studies.layers)
app.command()(cli_studies.change)
app.command()(cli_studies.curvature)
app.command()(cli_studies.energy)
app.command()(cli_repair.repair)
app.command(context_settings=OVERRIDES)(cli_nodes.suppress)
app.command(context_settings=OVERRIDES)(cli_nodes.overlap)


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="atlas, a folder or a hub id.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Examples, a JSONL file.", show_default=False)],
    prompt: Annotated[str, typer.Option(help='Template, such as "{question}\\nAnswer:".', show_default=False)],
    completion: Annotated[str, typer.Option(help='Template of the answer, such as " {answer}".', show_default=False)],
    adapter: Annotated[
        str | None, typer.Option(help="What to compare with: an adapter or a run of this model, or another model.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many rows are used, the first ones.")] = 100,
    reading: Annotated[
        str, typer.Option(help="positions: restore each prompt token; diagonal: the one before each answer token.")
    ] = "positions",
    fraction: Annotated[float, typer.Option(help="Share of the prompt's tokens that get noise.")] = 0.5,
    scale: Annotated[float, typer.Option(help="Noise, in standard deviations of the token embeddings.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    kind: Annotated[str, typer.Option(help="What is restored: block, attention or mlp outputs.")] = "block",
    window: Annotated[int, typer.Option(help="Layers restored together, for attention and mlp.")] = 10,
    norm: Annotated[str, typer.Option(help="What NAIE is normalised by: max or sum.")] = "max",
    example: Annotated[
        int | None, typer.Option(help="Whose heat map is drawn; default: what noise harms most.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where trace.json, layers.png and heat.png go.")] = Path("trace"),
    max_length: Annotated[int, typer.Option(min=2, help="Longer examples are cut to this many tokens.")] = 512,
    store: Annotated[Path | None, typer.Option(help="Store of statistics; default: the user's cache.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens in a pass: memory against speed.")] = 2048,
) -> None:
    """Trace which layers bring known answers back after noise (L2-LoRA Figs. 2 and 3), in one model or in two."""
    from keeptune.report.tracing import print_trace
    from keeptune.statistics.layer_effect import LayerEffect
    from keeptune.studies.trace_files import TraceOptions, trace_models

    options = TraceOptions(
        model,
        data,
        # A shell hands over what stands for a line end as it is typed.
        prompt.replace(r"\n", "\n"),
        completion.replace(r"\n", "\n"),
        output,
        adapter=adapter,
        examples=examples,
        max_length=max_length,
        example=example,
        store=store,
        device=device,
        dtype=dtype,
        chunk=chunk,
    )
    checked_later: Any = {"reading": reading, "output": kind}
    request = LayerEffect("knowledge", fraction=fraction, scale=scale, seed=seed, window=window, **checked_later)
    print_trace(trace_models(options, request, norm), Console())
    say(f"figures: {output / 'layers.png'}, {output / 'heat.png'}, numbers: {output / 'trace.json'}")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Where the merged model goes.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base; default: what the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
) -> None:
    """Merge an adapter into its base and check the merged model."""
    from keeptune.pipeline.merge import merge_adapter

    gap = merge_adapter(adapter, output, base=base, dtype=dtype)
    say(f"merged model in {output}; largest difference in logits {gap:.1e}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Where the report goes; default: the first run.")] = None,
    reference: Annotated[Path | None, typer.Option(help="A run of full fine-tuning that T is relative to.")] = None,
) -> None:
    """Join finished runs into one report.json and report.html."""
    from keeptune.pipeline.reporting import write_report

    folder = output or runs[0]
    _show_report(write_report(runs, folder, reference=reference), folder)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many training seeds.")] = 1,
) -> None:
    """Compare LoRA, LoRA-Null v1 and v2 and full fine-tuning on the embedded model, in about three minutes."""
    from keeptune.pipeline.demo import demo as run_demo

    _show_report(run_demo(output, seeds=range(seeds)), output)


def _load(recipe: Path, context: typer.Context) -> Any:
    from keeptune.recipe.schema import load_recipe, parse_overrides

    return load_recipe(recipe, parse_overrides(context.args))


def _job(recipe: Path, context: typer.Context) -> Any:
    from keeptune.pipeline.run import start

    return start(_load(recipe, context))


def _show_report(report: dict[str, Any], folder: Path) -> None:
    show_comparison(report)
    say(f"report: {folder / 'report.html'}")


def _show_export(done: Any) -> None:
    say(f"{done.format} in {done.folder}, rank {done.rank}")
    say(f"gap to the trained model on a fresh base: {done.gap:.1e} in logits, {done.relative_gap:.1e} relative")
    if done.error:
        say(f"cut to a smaller rank: {done.error:.2%} of the trained change (Frobenius) is left out")
    say(f"serve: {done.serve}")


def _quiet_libraries() -> None:
    """Show keeptune's own messages and bars, not those of the libraries below it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("keeptune").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "--help" in sys.argv or len(sys.argv) == 1:
        return
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
