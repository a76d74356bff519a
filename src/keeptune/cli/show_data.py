"""The command that shows training data as the model sees them: data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from keeptune.cli.shared import RecipeFile, load


def show_data(
    context: typer.Context,
    recipe: RecipeFile,
    show: Annotated[int, typer.Option(min=0, help="How many examples are printed.")] = 3,
    rows_file: Annotated[
        Path | None, typer.Option("--rows", help="Write input_ids, labels and the text of every example, a line each.")
    ] = None,
) -> Any:
    """Show what is trained on as the model sees it: ⟦learned⟧ text is marked, what teaches nothing is counted."""
    from keeptune.core.artefact import write_text
    from keeptune.core.errors import RecipeError
    from keeptune.data.examples import LanguageExamples, labels_of
    from keeptune.pipeline.job import Job

    job = Job(load(recipe, context))
    if not isinstance(job.trained_examples, LanguageExamples):
        raise RecipeError(
            "recipe, key task.kind",
            got=job.recipe.task.kind,
            wanted="examples of a language model, of which tokens are learned",
            next_step="Look at the file itself: of each text its label is learned.",
        )
    account, rows = job.data_account(show)
    for number, example in enumerate(account["shown"], start=1):
        Console().print(Text(f"── example {number} ──", "dim"))
        text = Text()
        for part, learned in example:  # in brackets too, which a file keeps
            text.append(f"⟦{part}⟧" if learned else part, style="green" if learned else "")
        Console().print(text, soft_wrap=True)
    _print_account(account)
    if rows_file is not None:
        lines = [
            {"input_ids": row.ids, "labels": labels_of(row), "text": job.tokenizer.decode(row.ids)} for row in rows
        ]
        write_text(rows_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        typer.echo(f"{len(rows)} examples in {rows_file}")
    return account


def _print_account(account: Mapping[str, Any]) -> None:
    share = account["learned"] / account["tokens"]
    typer.echo(
        "{kept} of {examples} examples, {tokens} tokens, {learned} of them learned ({share:.0%}); {lengths[shortest]} "
        "to {lengths[longest]} tokens, median {lengths[median]:g}".format(share=share, **account)
    )
    for reason, numbers in {**account["lost"], **account["noted"]}.items():
        some = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        typer.echo(f"{len(numbers)} examples {reason} (numbers {some})")
