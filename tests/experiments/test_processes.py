"""Two processes of a launcher score, compare and go from stage to stage as one does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA
from tests.experiments.processes import error_of_first, main, work
from tests.forks import Forks
from tests.pipeline.support import values, write_data, write_recipe

from keeptune.core.artefact import read_json
from keeptune.experiments.engine import tasks_of
from keeptune.experiments.plan_runs import list_runs, load_comparison

pytest.importorskip("lm_eval")
LORA = {"name": "lora", "rank": 4}  # without dropout, which each process draws for its own texts
NAMED = {"name": "arc_easy", "data": str(DATA / "commonsense"), "examples": 3}
BOUND = 1e-4  # of scores after training that agrees to rounding
BENCHMARKS = ("stories", "sums", "animals", "arc_easy")


def _read_list(path: Path) -> list[Any]:
    return list(json.loads(path.read_text("utf-8")))


def _write(folder: Path, data: Path) -> Path:
    """Writes the recipes of a run, of a comparison with a variant, and of two stages."""
    given = values(data, folder / "run", folder / "store", method=LORA)
    given["evaluate"][0]["examples"] = 1  # fewer than the processes
    stories, sums, _ = given["evaluate"]
    folder.mkdir()
    write_recipe(folder / "run.yaml", given | {"evaluate": [*given["evaluate"], NAMED]})
    brief = given | {"evaluate": [stories, sums]}
    del brief["method"]
    mad = {"label": "mad", "method": "full", "learning_rate": [1e30]}  # fails, and the next cell goes on
    compare = {"methods": [LORA, mad, {"name": "full"}], "seeds": [0], "scales": [0.5], "learning_rate": [5e-3]}
    train = {key: value for key, value in given["train"].items() if key != "seed"} | {"save_strategy": "no"}
    cells = {"output": str(folder / "cells"), "train": train, "compare": compare | {"resources": None}}
    write_recipe(folder / "compare.yaml", brief | cells)
    task = brief.pop("task")
    stages = [{"name": name, "task": task, "method": LORA} for name in ("first", "second")]
    write_recipe(folder / "stages.yaml", brief | {"output": str(folder / "stages"), "stages": stages})
    return folder


@pytest.fixture(scope="module")
def both(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of one process and of two; the adapter that both score is that of the one."""
    folder = tmp_path_factory.mktemp("processes")
    data = write_data(folder / "data")
    one, two = (_write(folder / name, data) for name in ("one", "two"))
    work(one, one / "run" / "adapter")
    forks.together(main, 2, two, one / "run" / "adapter")
    return one, two


def _same(found: Any, wanted: Any, bound: float) -> bool:
    """Whether two records have equal texts and whole numbers, and others within a bound."""
    if isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key], bound) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(_same(*pair, bound) for pair in zip(found, wanted, strict=True))
    return abs(found - wanted) <= bound if isinstance(wanted, float) else bool(found == wanted)


def _items(folder: Path, name: str) -> list[Any]:
    (path,) = folder.glob(f"run/evaluation-*/{name}.items.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_two_processes_score_one_adapter_as_one_does(name: str, both: tuple[Path, Path]) -> None:
    wanted, found = (_items(folder, name) for folder in both)
    assert _same(found, wanted, 1e-5)  # log-likelihoods are sums of float32 in other batches
    for side in ("before", "after"):
        assert [item[side] for item in found] == pytest.approx([item[side] for item in wanted], abs=1e-6)
    assert len(found) == 1 or not _same(found[::-1], wanted, 1e-5)  # the order is that of the items


def test_each_process_scores_a_part(both: tuple[Path, Path]) -> None:
    """Without a division each would score all, twice what one process does."""
    (wanted,), found = (_read_list(folder / "texts.json") for folder in both)
    assert sum(found) == wanted
    assert max(found) <= 0.7 * wanted


def test_two_processes_make_the_run_the_cells_and_the_stages_of_one(both: tuple[Path, Path]) -> None:
    one, two = both
    for name in BENCHMARKS:
        summaries = [read_json(folder / "run" / "evaluation" / f"{name}.json")["summary"] for folder in both]
        assert _same(*summaries, BOUND), name
    rows = [read_json(folder / "cells" / "runs.json")["runs"] for folder in both]
    kept = ("name", "status", "message", "trained_parameters", "benchmarks", "learned", "forgotten")
    wanted, found = ([{key: row[key] for key in kept} for row in own] for own in rows)
    assert _same(found, wanted, BOUND)
    assert {row["name"]: row["status"] for row in found if row["status"] != "done"} == {"mad-lr1e+30-seed0": "failed"}
    assert any("scale-0.5" in row["name"] for row in found)
    answers = [{path.name: read_json(path)["answers"] for path in (f / "cells" / "base").glob("*.json")} for f in both]
    assert _same(answers[1], answers[0], 1e-5)
    assert answers[0]
    wanted, found = (read_json(folder / "stages" / "sequence.json") for folder in (one, two))
    assert _same(found["scores"], wanted["scores"], BOUND)
    assert (two / "stages" / "report.html").is_file()
    assert (two / "cells" / "report.html").is_file()


def test_one_process_takes_what_two_have_done(both: tuple[Path, Path]) -> None:
    comparison = load_comparison(both[1] / "compare.yaml")
    assert tasks_of(comparison, list_runs(comparison))[1] == {"mad-lr1e+30-seed0"}


def test_an_error_of_the_first_is_raised_on_all(both: tuple[Path, Path]) -> None:
    assert _read_list(both[1] / "errors.json") == [str(error_of_first())] * 2


def test_what_one_process_alone_meets_ends_all(both: tuple[Path, Path]) -> None:
    """What all meet is recorded, as the cell "mad" is, and the next goes on."""
    assert _read_list(both[1] / "met.json") == [False, False]


def test_the_first_process_alone_ends_with_the_code_of_a_failed_cell(both: tuple[Path, Path]) -> None:
    """A launcher ends all as soon as one has left with a code; the first has to say what failed."""
    assert [_read_list(folder / "codes.json") for folder in both] == [[1], [1, 0]]
