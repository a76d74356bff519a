"""What the studies share: cells in processes of their own, scores that are kept, rows of files, means with spread."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from keeptune.core.artefact import read_json, write_bytes, write_json
from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe

__all__ = ["each", "kept", "read_rows", "run_once", "spread", "write_rows"]

T = TypeVar("T")


def each(function: Callable[..., T], *cells: Iterable[Any]) -> list[T]:
    """Do something for every cell, in processes of one thread each: two, or as many as ``WORKERS`` says.

    Args:
        function: What to do; it can be pickled.
        *cells: Its arguments, as ``map`` takes them.

    Returns:
        The results in the order of the cells.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(int(os.environ.get("WORKERS", "2")), mp_context=spawn, initializer=_one_thread) as pool:
        return list(pool.map(function, *cells))


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("keeptune").setLevel(logging.WARNING)


def run_once(values: Mapping[str, Any], label: str) -> Path:
    """Run a recipe, or what is left of it.

    Args:
        values: As a YAML file holds them.
        label: For messages.

    Returns:
        The run folder.
    """
    run(make_recipe(values, folder=Path(), where=f"study {label}"))
    return Path(values["output"])


def kept(values: Mapping[str, Any], label: str, read: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """Take the scores of a run from where they are kept, or run it and keep them.

    Args:
        values: The recipe as a YAML file holds it.
        label: For messages.
        read: Gives the scores of a finished run folder.

    Returns:
        The scores.
    """
    path = Path(values["output"]) / "scores.json"
    if path.is_file() and read_json(path)["recipe"] == values:
        scores: dict[str, float] = read_json(path)["scores"]
        return scores
    found = read(run_once(values, label))
    write_json(path, {"recipe": values, "scores": found})
    print(f"{label}: {found}", flush=True)
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Write mean ± standard deviation; of one value the value, of none a dash."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"
