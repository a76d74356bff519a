"""The commands that give results to servers: export, serve."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import echo

from keeptune.cli.shared import job_of, load
from keeptune.core.errors import RecipeError, need_known

BaseFile = Annotated[str | None, typer.Option(help="The GGUF file of the base; default: the one trained on.")]


def export(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe; with --to a run folder.", show_default=False)],
    to: Annotated[str | None, typer.Option(help="gguf: for llama.cpp, Ollama and LM Studio.")] = None,
    base: BaseFile = None,
    merged: Annotated[bool, typer.Option("--merged", help="With --to: the whole model.")] = False,
    quantise: Annotated[str | None, typer.Option(help="With --to: f32 (an adapter), f16 (a model) or q8_0.")] = None,
) -> Any:
    """Write the trained adapter and check it on a freshly loaded base; or, with --to, as another server reads it."""
    if to is not None:
        from keeptune.pipeline.gguf_export import GgufOptions, export_gguf

        need_known(to, ["gguf"], "--to", "gguf")
        run = recipe if recipe.is_dir() else load(recipe, context).output
        made = export_gguf(run, GgufOptions(base, merged, quantise))  # type: ignore[arg-type]
        echo(f"{made['file']} ({made['quantise']}), with a Modelfile for Ollama")
        what = "difference in logits to the merged model" if made["merged"] else "rounding of the factors"
        against = made["base"]
        checked = f"checked against {against}" if against else "not checked against a file of the base (--base)"
        echo(f"{what}: {made['error']:.1e} relative; {checked}\nserve: {made['serve']}")
        return made
    for option, value in {"--base": base, "--merged": merged, "--quantise": quantise}.items():
        if value:
            raise RecipeError(option, got="no --to", wanted="--to gguf with it", next_step="Add --to gguf.")
    from keeptune.pipeline.export import export_stage
    from keeptune.pipeline.run import plan_stage

    job = job_of(recipe, context)
    done = export_stage(job, plan_stage(job))
    echo(f"{done.format} in {done.folder}, rank {done.rank}")
    echo(f"gap to the trained model on a fresh base: {done.gap:.1e} in logits, {done.relative_gap:.1e} relative")
    if done.error:
        echo(f"cut to a smaller rank: {done.error:.2%} of the trained change (Frobenius) is left out")
    echo(f"serve: {done.serve}")
    return done


def serve(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run folder, or what it exported.", show_default=False)],
    using: Annotated[str, typer.Option(help="vllm or llama.cpp; auto: the first that is installed.")] = "auto",
    base: BaseFile = None,
    host: Annotated[str, typer.Option(help="Address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    wait: Annotated[float, typer.Option(help="Seconds until a server that does not answer is given up.")] = 600.0,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Print the server's command; write and start nothing.")
    ] = False,
) -> dict[str, Any]:
    """Serve a run, OpenAI-compatible, under the name `tuned`; further options go to the server as they are."""
    from keeptune.pipeline.serving import ServeOptions, server_line
    from keeptune.pipeline.serving import serve as serve_until_ended

    options = ServeOptions(using, base, host, port, wait, context.args)  # type: ignore[arg-type]
    words = server_line(run, options, write=not dry)
    echo(shlex.join(words))
    if not dry:
        serve_until_ended(words, options, lambda url: echo(f"ready: {url}/v1, model `tuned`"))
    return {"command": words, "url": f"http://{host}:{port}/v1"}
