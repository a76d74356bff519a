"""The commands of the store of statistics: store lists what is there, store clear removes it."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer import echo

from keeptune.cli.shared import Commands, Store, with_json
from keeptune.core.errors import RecipeError

if TYPE_CHECKING:
    from keeptune.statistics.store import StatStore

app = Commands(invoke_without_command=True)
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@app.callback()
@with_json
def show(context: typer.Context, store: Store = None) -> Any:
    """List the store of statistics: sizes by model, data and kind, and when each was last used."""
    if context.invoked_subcommand is not None:
        context.obj = store
        return None
    from keeptune.report.tables.terminal import table
    from keeptune.statistics.store_use import listing, size_text

    at = _store_at(store)
    rows = listing(at.folder)
    total = sum(row["bytes"] for row in rows)
    if rows:
        cells = [
            (Path(row["name"]).name or "–", row["model"][:8], row["data"][:8] or "–", row["kind"], str(row["entries"]))
            + (size_text(row["bytes"]), f"{_moment(row['used']):%Y-%m-%d}" if row["used"] else "–")
            for row in rows
        ]
        heads = ("model", "key", "data", "statistic", "entries", "size", "last used")
        Console().print(table(heads, cells, ("model", "key", "data", "statistic", "last used")))
    echo(f"{size_text(total)} of {size_text(at.limit)} in {at.folder}")
    parts = [row | {"used": _moment(row["used"]).isoformat() if row["used"] else None} for row in rows]
    return {"folder": at.folder, "bytes": total, "limit": at.limit, "parts": parts}


@app.command()
def clear(
    context: typer.Context,
    older_than: Annotated[str | None, typer.Option(help="Only what was not used for this long: 30d, 12h, 2w.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Only what is of this model: its name as listed, or digits its key starts with.")
    ] = None,
    store: Store = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> dict[str, int]:
    """Remove what the store holds, or a part of it; what a running command uses stays."""
    from keeptune.statistics.store_use import Entry, entries, is_of, model_names, size_text

    at = _store_at(store or context.obj)
    if model is not None and not model.strip():
        raise RecipeError("--model", got="nothing", wanted="a name or a key", next_step="Leave it out to clear all.")
    before = time.time()
    if older_than is not None:
        age = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mhdw])", older_than.strip())
        if age is None:
            asked = "a time such as 30d, 12h or 2w"
            raise RecipeError("--older-than", got=older_than, wanted=asked, next_step="Correct it.")
        before -= float(age[1]) * _SECONDS[age[2]]
    names = model_names(at.folder)

    def wanted(entry: Entry) -> bool:
        return (older_than is None or entry.used < before) and (model is None or is_of(entry, model, names))

    chosen = [entry for entry in entries(at.folder) if wanted(entry)]
    if not chosen:
        echo(f"nothing to remove in {at.folder}")
        return {"removed": 0, "bytes": 0, "in_use": 0}
    size = size_text(sum(entry.bytes for entry in chosen))
    if not yes:
        typer.confirm(f"Remove {len(chosen)} entries ({size}) from {at.folder}?", abort=True, err=True)
    gone, kept = at.use.remove(wanted)
    freed = sum(entry.bytes for entry in gone)
    in_use = f"; {len(kept)} are in use and stay" if kept else ""
    echo(f"{len(gone)} entries removed, {size_text(freed)}{in_use}")
    return {"removed": len(gone), "bytes": freed, "in_use": len(kept)}


def _store_at(folder: Path | None) -> StatStore:
    from keeptune.pipeline.machine import check_folder, statistics_store

    found = statistics_store(folder)
    check_folder("--store", found.folder)
    return found


def _moment(used: float) -> datetime:
    return datetime.fromtimestamp(used).astimezone()
