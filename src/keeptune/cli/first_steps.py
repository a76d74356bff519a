"""The commands that come first: init writes a recipe that runs, doctor says what is missing."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from packaging.requirements import Requirement
from rich.console import Console
from typer import echo

from keeptune.cli.dry_run import describe_file
from keeptune.cli.shared import Ended, ExitCode, overrides_of
from keeptune.core.errors import KeeptuneError, RecipeError

_KEEP = "own: texts that the base writes; general: a mixture that ships; or a file"
_CARD = "memory of the GPU, such as 24GB; auto: what is free here"


def init(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Where the recipe goes.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="A folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="What to learn: a file, a folder, or org/name on the hub.")] = None,
    keep: Annotated[str | None, typer.Option(help=f"What to keep: {_KEEP}.")] = None,
    card: Annotated[str | None, typer.Option(help=f"{_CARD.capitalize()}.")] = None,
    output: Annotated[str | None, typer.Option(help="The folder of the run.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
) -> dict[str, Any]:
    """Write a commented recipe that runs, from --model, --data and what they leave open, asked for at a terminal."""
    from keeptune.core.artefact import write_text
    from keeptune.pipeline.first_recipe import first_recipe

    asks, there = sys.stdin.isatty(), recipe.exists()
    if there and not force and not (asks and typer.confirm(f"{recipe} is there. Overwrite it?", err=True)):
        raise RecipeError(str(recipe), got="a file", wanted="none yet", next_step="Name another, or add --force.")

    def answer(option: str, value: str | None, question: str, default: str | None = None) -> str:
        if value is None and asks:
            return str(typer.prompt(question, default=default, err=True))
        if value is None and default is None:
            wanted = "a value, where there is no terminal to ask at"
            raise RecipeError(f"init {option}", got="nothing", wanted=wanted, next_step=f"Add {option} VALUE.")
        return str(default if value is None else value)

    given = {
        "model": answer("--model", model, "model (a folder or a hub id)"),
        "task.train": answer("--data", data, "data to learn (a file, a folder, or org/name on the hub)"),
    }
    keep = answer("--keep", keep, f"what to keep ({_KEEP})", "own")
    card = answer("--card", card, _CARD, "auto")
    given["output"] = answer("--output", output, "folder of the run", f"runs/{recipe.stem}")
    text, memory = first_recipe(given | overrides_of(context), keep=keep, card=card)
    write_text(recipe, text)
    echo(f"{recipe} {'overwritten' if there else 'written'}: {memory}")
    echo(f"what is learned: keeptune data {recipe}\nall of it: keeptune run {recipe}")
    return {"recipe": recipe, "overwritten": there, "memory": memory}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what there is, and what mends it."""

    what: str
    found: str
    mend: str = ""
    missing: bool = False


def doctor(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="A recipe: what is missing for it.")] = None,
) -> Any:
    """Show versions, devices and memory, and what is missing for a recipe; exit code 1 where something is."""
    from keeptune.report.tables.terminal import table

    found = examine(recipe, overrides_of(context))
    heads = ("", "what", "found", "to mend it")
    rows = [("MISSING" if one.missing else "", one.what, one.found, one.mend) for one in found]
    Console().print(table(heads, rows, heads))
    missing = [one.what for one in found if one.missing]
    echo(f"missing: {', '.join(missing) or 'nothing'}")
    record = {"missing": missing, "findings": [asdict(one) for one in found]}
    return Ended(record, ExitCode.FAILED) if missing else record


def examine(recipe: Path | None = None, overrides: Mapping[str, Any] | None = None) -> list[Finding]:
    """Looks at the machine, and at a recipe, a YAML file with dotted overrides, on it; nothing is fetched."""
    from keeptune.recipe.reading import read_values

    values: dict[str, Any] = {}
    found: list[Finding] = []
    if recipe is not None:
        try:
            values = read_values(recipe, overrides)
            found = list(_runs(recipe, overrides))
        except KeeptuneError as error:
            found = [Finding(error.where, f"{error.got}; wanted {error.wanted}", error.next_step, missing=True)]
    needs = {
        "quantised": "quantization" in values or str(values.get("model")).endswith(".gguf"),
        "benchmarks": any(not isinstance(one, dict) or "metric" not in one for one in values.get("evaluate") or ()),
        "compare": "compare" in values,
        "serve": False,
    }
    return [*_machine(needs), *found]


def _machine(extras: Mapping[str, bool]) -> Iterator[Finding]:
    import torch

    from keeptune.core.versions import versions
    from keeptune.pipeline.originals import free_bytes
    from keeptune.statistics.store_use import size_text

    yield from (Finding(name, number) for name, number in versions().items())
    for need in _lacking(""):
        yield Finding(need, "not installed, or in another version", f"pip install '{need}'", missing=True)
    for extra, needed in extras.items():
        lacking = ", ".join(_lacking(extra))
        mend = f"pip install 'keeptune[{extra}]'" if lacking else ""
        found = f"without {lacking}" if lacking else "installed"
        yield Finding(f"keeptune[{extra}]", found, mend, missing=needed and bool(lacking))
    for device in (torch.device("cuda", number) for number in range(torch.cuda.device_count())):
        free, name = free_bytes(device), torch.cuda.get_device_properties(device).name
        yield Finding(str(device), f"{name}, {size_text(free)} of memory free")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        build = "a build of torch for it: https://pytorch.org/get-started/locally"
        yield Finding("cuda", f"a driver, but no card that torch {torch.__version__} can use", build)
    yield Finding("cpu", f"{os.cpu_count()} cores, {size_text(free_bytes(torch.device('cpu')))} of memory free")


def _lacking(extra: str) -> Iterator[str]:
    """Yields what keeptune, or one of its extras, requires and this Python lacks."""
    for need in map(Requirement, metadata.requires("keeptune") or ()):
        core, asked = (need.marker is None or need.marker.evaluate({"extra": name}) for name in ("", extra))
        numbers = [one.version for one in metadata.distributions(name=need.name)][:1]
        fits = any(need.specifier.contains(number, prereleases=True) for number in numbers)
        if asked and not (extra and core) and not fits:
            yield f"{need.name}{need.specifier}"


def _runs(recipe: Path, overrides: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Yields what the runs of a recipe would fetch, hold and write, against what there is."""
    import torch

    from keeptune.core.out_of_memory import KEYS, Stage
    from keeptune.pipeline.machine import device_named
    from keeptune.pipeline.originals import free_bytes
    from keeptune.statistics.store_use import size_text

    runs = describe_file(recipe, overrides)
    for need in dict.fromkeys(need for _, account in runs.values() for need in account.needs if not need.at_hand):
        size = "" if need.size is None else f", {size_text(need.size)}"
        yield Finding(need.what, f"{need.name}{size}: not here yet", "the run fetches it")
    recipe_of = next(iter(runs.values()))[1].job.recipe
    free, stages = (
        free_bytes(torch.device(device_named(recipe_of.device))),
        {"training": "train", "scoring": "evaluate"},
    )
    for name, (_, account) in runs.items():
        peak, stage = sum(account.memory[account.peak].values()), stages.get(account.peak, account.peak)
        found = f"{size_text(peak)} at its peak ({account.peak}), {size_text(free)} free"
        mend = f"turn {', '.join(KEYS[cast(Stage, stage)])}" if peak > free else ""
        yield Finding(f"memory {name}".strip(), found, mend, missing=peak > free)
    written = sum(times * sum(sum(parts.values()) for parts in one.disk.values()) for times, one in runs.values())
    folder = recipe_of.output.absolute()
    room = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    mend = "set output and store to a larger disk" if written > room else ""
    yield Finding("disk", f"{size_text(written)} to write, {size_text(room)} free", mend, missing=written > room)
