"""Commands that examine models and what training changed: change, curvature, energy, overlap, suppress, trace."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import echo

from keeptune.cli.shared import Base, Device, Dtype, FigureFile, RecipeFile, Roles, Store, load, names_in


def energy(
    model: Annotated[str, typer.Argument(help="atlas, a folder or a hub id.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="How many singular values.")] = 5,
    output: FigureFile = Path("energy.png"),
    targets: Roles = None,
    device: Device = "auto",
) -> Any:
    """Show how much of each weight's energy its largest singular values hold, layer by layer (FARSS Fig. 1)."""
    from keeptune.report.tables.terminal import print_grid
    from keeptune.studies.energy import energy as measure_energy

    record = measure_energy(model, output, top=top, roles=names_in(targets), device=device)
    cells: dict[tuple[int | None, str], list[str]] = {}
    for row in record["rows"]:
        text = "–" if row["energy"] is None else f"{row['energy']:.3f}"
        cells.setdefault((row["layer"], row["role"]), []).append(text)
    cells |= {(int(layer), "mean"): [f"{value:.3f}"] for layer, value in record["mean"].items()}
    print_grid(cells, Console())
    echo(f"share of the squared singular values in the top {top}")
    _echo_files(output)
    return record


def change(
    trained: Annotated[list[str], typer.Argument(help="Adapter folders, run folders or models.", show_default=False)],
    base: Base = None,
    output: FigureFile = Path("change.png"),
    targets: Roles = None,
    device: Device = "auto",
) -> Any:
    """Show how far training moved each weight, by layer and module, of one or more adapters (L2-LoRA Fig. 6)."""
    from keeptune.report.tables.analyses import print_change
    from keeptune.studies.change import change as measure_change

    record = measure_change(trained, output, base=base, roles=names_in(targets), device=device)
    print_change(record, Console())
    _echo_files(output)
    return record


def curvature(
    run: Annotated[Path, typer.Argument(help="A run whose plan holds curvature (lalora).", show_default=False)],
    others: Annotated[list[str] | None, typer.Argument(help="Other runs or adapters on the same base.")] = None,
    base: Base = None,
    output: FigureFile = Path("curvature.png"),
    device: Device = "auto",
) -> Any:
    """Show where updates go against the curvature of the knowledge, a run's and others' (after LaLoRA Fig. 3a)."""
    from keeptune.report.tables.analyses import print_curvature
    from keeptune.studies.curvature import curvature as measure_curvature

    record = measure_curvature(run, others or [], output, base=base, device=device)
    print_curvature(record, Console())
    _echo_files(output)
    return record


def suppress(
    context: typer.Context,
    recipe: RecipeFile,
    q: Annotated[float, typer.Option(help="Per cent of the nodes.")] = 1.0,
    over: Annotated[
        str, typer.Option(help="layer-balanced: as many of each block; global: of all blocks together.")
    ] = "layer-balanced",
    draws: Annotated[int, typer.Option(help="How many random selections of the same size, the control.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the first random selection.")] = 0,
) -> Any:
    """Score the base without the nodes that attribution finds highest, or lowest, or as many others (LoKI Table 5a)."""
    from keeptune.report.tables.analyses import print_suppressed
    from keeptune.studies.suppress import suppress as measure

    record = measure(load(recipe, context), q=q, over=over, draws=draws, seed=seed)
    print_suppressed(record, Console())
    echo(f"figures and numbers in {record['folder']}")
    return record


def overlap(
    context: typer.Context,
    recipe: RecipeFile,
    against: Annotated[
        Path | None, typer.Option(help="A recipe of the same base with other knowledge, for the second.")
    ] = None,
    first: Annotated[
        str,
        typer.Option(
            help="paper, release or current; layer-balanced, global-low or another selection; a number of examples."
        ),
    ] = "",
    second: Annotated[str, typer.Option(help="The same for what it is compared with, such as current,50.")] = "",
    q: Annotated[float | None, typer.Option(help="Per cent of the nodes; default: the recipe's, or 10.")] = None,
) -> Any:
    """Compare the rows that two presets, selections, numbers of examples or data sets select (LoKI's 97.57%)."""
    from keeptune.report.tables.analyses import print_overlap
    from keeptune.studies.overlap import overlap as measure

    other = None if against is None else load(against, context)
    record = measure(load(recipe, context), other, first=first, second=second, q=q)
    print_overlap(record, Console())
    echo(f"figure and numbers in {record['folder']}")
    return record


def trace(
    model: Annotated[str, typer.Argument(help="atlas, a folder or a hub id.", show_default=False)],
    data: Annotated[str, typer.Option(help="Examples: a JSONL file, or atlas:facts.jsonl.", show_default=False)],
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
    norm: Annotated[str, typer.Option(help="What NAIE is normalised by: max or sum.")] = "max",
    output: Annotated[Path, typer.Option(help="Where trace.json, layers.png and heat.png go.")] = Path("trace"),
    max_length: Annotated[int, typer.Option(min=2, help="Longer examples are cut to this many tokens.")] = 512,
    store: Store = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens in a pass: memory against speed.")] = 2048,
) -> Any:
    """Trace which layers bring known answers back after noise (L2-LoRA Figs. 2 and 3), in one model or in two."""
    from keeptune.report.tables.analyses import print_trace
    from keeptune.statistics.layer_effect import LayerEffect
    from keeptune.studies.trace import TraceOptions, trace_models

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
        store=store,
        device=device,
        dtype=dtype,
        chunk=chunk,
    )
    checked_later: Any = {"reading": reading}
    request = LayerEffect("knowledge", fraction=fraction, scale=scale, seed=seed, **checked_later)
    record = trace_models(options, request, norm)
    print_trace(record, Console())
    echo(f"figures: {output / 'layers.png'}, {output / 'heat.png'}, numbers: {output / 'trace.json'}")
    return record


def _echo_files(figure: Path) -> None:
    echo(f"figure: {figure}, numbers: {figure.with_suffix('.json')}")
