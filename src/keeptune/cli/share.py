"""Commands that take a finished adapter further: merge, push, compare-served."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import echo

from keeptune.cli.shared import Base, Dtype, numbers_in
from keeptune.core.errors import RecipeError


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(help="An adapter, and where the model goes; with --weights: adapters.", show_default=False),
    ],
    output: Annotated[Path | None, typer.Option(help="Where the result goes; with --weights: joined.")] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    original: Annotated[str | None, typer.Option(help="What a quantised base was before; merged into it.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Join several adapters into one: a weight for each, such as 0.7,0.3.")
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="With --weights: svd (the weighted sum), linear, ties, dare_linear or dare_ties.")
    ] = "svd",
    density: Annotated[float, typer.Option(help="With ties and dare: share of the entries that are kept.")] = 0.5,
    rank: Annotated[int | None, typer.Option(help="With --weights: of the result, by an SVD.")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare draws.")] = 0,
) -> Any:
    """Merge an adapter into its base (of a quantised one the original), or, with --weights, adapters into one."""
    if weights is not None:
        from keeptune.posthoc.weighted_merge import Merging
        from keeptune.posthoc.weighted_merge import merge as join

        how = Merging(numbers_in("--weights", weights, float, "0.7,0.3"), scheme, density, rank, seed)  # type: ignore[arg-type]
        record = join(adapters, output or Path("joined"), how, base=base)
        export = record["export"]
        echo(f"joined adapter ({record['scheme']}) in {export['folder']}, rank {export['rank']}")
        if record["distance"] is not None:
            echo(f"distance to the weighted sum of the changes: {record['distance']:.2%} of it (Frobenius)")
        echo(f"serve: {export['serve']}")
        return record
    from keeptune.pipeline.merge import merge_adapter

    folder = output or Path(adapters[-1])
    if len(adapters) + (output is not None) != 2 or (folder / "adapter_config.json").is_file():
        raise RecipeError(
            "keeptune merge",
            got=f"{len(adapters)} adapter(s) or folder(s) and no --weights",
            wanted="an adapter, and where the whole model goes",
            next_step="Join several adapters into one with --weights 0.7,0.3 --output FOLDER.",
        )
    gap = merge_adapter(Path(adapters[0]), folder, base=base, dtype=dtype, original=original)
    echo(f"merged model in {folder}; largest difference in logits {gap.gap:.1e}, {gap.relative:.1e} relative")
    return {"folder": str(folder), "gap": gap.gap, "relative_gap": gap.relative}


def push(
    run: Annotated[str, typer.Argument(help="A run folder, or an adapter of keeptune.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="The repository, org/name.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base on the hub, org/name or org/name@revision.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and print the card.")] = False,
) -> Any:
    """Upload an adapter to the hub, with a card that says what was kept and lost."""
    from keeptune.pipeline.push import push as push_to_hub

    done = push_to_hub(run, repo, base=base, private=private, dry=dry)
    for name, size in done["files"].items():
        echo(f"{size:>12,} {name}")
    echo(f"\n{done['card']}\nnot uploaded (--dry-run) to {repo}" if dry else f"uploaded: {done['url']}")
    return done


def compare_served(
    url: Annotated[str, typer.Argument(help="Address of the server of the tuned model.", show_default=False)],
    base_url: Annotated[str, typer.Option(help="Address of the server of the base; it may be the same.")],
    suite: Annotated[Path, typer.Option(help="A YAML file with an `evaluate` list, as a recipe has.")],
    model: Annotated[str | None, typer.Option(help="The tuned model's name there; default: the only one.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base's name there; default: the only one.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; default: the base's name.")] = None,
) -> Any:
    """Score two running OpenAI-compatible servers on the same items: what was lost as served."""
    from keeptune.experiments.gate import compare_served as compare
    from keeptune.report.tables.analyses import print_check

    record = compare(url, base_url, suite, model=model, base_model=base_model, tokenizer=tokenizer)
    print_check(record, Console())
    return record
