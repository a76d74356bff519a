"""Cells on a Ray cluster of two nodes: failures, lost workers, resumption, shared work, and a real run's numbers.

Every worker loads torch and Transformers once, which is what the time goes on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, values, write_data, write_recipe

from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError
from keeptune.core.locks import locked
from keeptune.experiments.comparison import engine
from keeptune.experiments.comparison.cell import attempt, finished
from keeptune.experiments.comparison.cells import Cell, Comparison, grid, load_comparison
from keeptune.experiments.comparison.engine import run_cells, works_of
from keeptune.pipeline.run import run

Load = Callable[..., tuple[Comparison, tuple[Cell, ...]]]
pytestmark = [
    # Of Ray 2.60 itself: sockets and files that it leaves to the garbage collector, and its own deprecations.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, on this machine; the tests of a session share them."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def load(data: Path, tmp_path: Path) -> Load:
    def make(*methods: Any, **section: Any) -> tuple[Comparison, tuple[Cell, ...]]:
        given = values(data, tmp_path / "out", tmp_path / "store")
        del given["method"], given["train"]["seed"]
        given["train"] |= {"max_steps": 2, "save_strategy": "no"}
        given["compare"] = {"methods": list(methods), "seeds": [0], "baselines": False, **section}
        loaded = load_comparison(write_recipe(tmp_path / "compare.yaml", given))
        return loaded, grid(loaded)

    return make


NULL = {"name": "lora-null", "rank": 4, "variant": "v1"}
SMALL = {"name": "lora", "rank": 4}
TOO_MUCH = {"label": "too much", "method": {"name": "lora", "rank": 4000}}


def no_ray(*_: Any) -> Any:
    raise AssertionError("Ray was started")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_cells_run_on_both_nodes_a_failing_one_is_told_and_finished_ones_are_not_repeated(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    comparison, cells = load(SMALL, TOO_MUCH, NULL, seeds=[0, 1])
    first = run_cells(comparison, cells)
    assert list(first) == [cell.name for cell in cells]
    statuses = {name: outcome.status for name, outcome in first.items()}
    failed = {name for name in first if name.startswith("too-much")}
    assert statuses == {name: "failed" if name in failed else "done" for name in first}
    assert all("method lora, target" in first[name].message and "rank 4000" in first[name].message for name in failed)
    assert len({outcome.node for outcome in first.values()}) == 2
    mark = read_json(tmp_path / "out/cells" / min(failed) / "cell.json")
    assert (mark["status"], mark["message"]) == ("failed", first[min(failed)].message)
    assert "export" not in mark

    one = next(cell for cell in cells if cell.label == "lora-null-v1" and cell.seed == 1)
    alone = run(one.recipe.model_copy(update={"output": tmp_path / "alone", "store": tmp_path / "other"}))
    for b in alone["methods"][0]["benchmarks"]:
        assert read_json(one.recipe.output / "evaluation" / f"{b['name']}.json")["summary"] == b

    log = (one.recipe.output / "log.txt").read_text(encoding="utf-8")
    assert "evaluate: the base's answers taken from" in log
    assert len(list((tmp_path / "out/base").glob("*.json"))) == 2  # sums and animals; stories has no answers to keep

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("train.json")}
    again = run_cells(comparison, cells)
    assert {name: outcome.status for name, outcome in again.items()} == statuses
    assert {name for name, outcome in again.items() if outcome.seconds} == failed, "failed cells are tried again"
    assert {path: path.stat().st_mtime_ns for path in written} == written
    done, left = [cell for cell in cells if cell.name not in failed], [cell for cell in cells if cell.name in failed]
    monkeypatch.setattr(engine, "started_ray", no_ray)
    assert all(outcome.status == "done" for outcome in run_cells(comparison, done).values())
    with pytest.raises(AssertionError, match="Ray was started"):
        run_cells(comparison, [*done, *left])


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("deaths", "status"), [(1, "done"), (2, "failed")])
def test_a_cell_whose_worker_is_killed_is_tried_once_more(load: Load, deaths: int, status: str, tmp_path: Path) -> None:
    comparison, cells = load(SMALL, {"name": "pissa", "rank": 4})
    log = tmp_path / "out/cells" / cells[0].name / "log.txt"
    stop = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < deaths and not stop.wait(0.02):
            for pid in holders(log):
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = run_cells(comparison, cells)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == deaths
    assert found[cells[0].name].status == status
    assert found[cells[1].name].status == "done"
    if status == "failed":
        assert "its worker process died 2 times" in found[cells[0].name].message
        assert run_cells(comparison, cells)[cells[0].name].status == "done"


def holders(path: Path) -> list[int]:
    """Find the processes other than this one that have a file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            held = link.resolve(strict=False) == path
        except OSError:
            continue
        if held and int(link.parts[2]) != os.getpid():
            found.append(int(link.parts[2]))
    return sorted(set(found))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_node_that_does_not_see_the_folder_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, cells = load(SMALL)
    monkeypatch.setattr(engine, "write_bytes", lambda *_: None)  # the marker is not where the worker looks
    (found,) = run_cells(comparison, cells).values()
    assert found.status == "failed"
    assert "is not the folder that the comparison was started in" in found.message
    assert "one shared folder" in found.message


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_no_node_has_is_refused_and_not_waited_for(load: Load) -> None:
    comparison, cells = load(SMALL, resources={"cpus": 2})
    with pytest.raises(RecipeError, match=r"got 2 CPUs and 0 GPUs for each cell, wanted what one node has: 1 CPUs"):
        run_cells(comparison, cells)
    comparison, cells = load(SMALL, resources={"gpus": 1})
    with pytest.raises(RecipeError, match=r"got 1 CPUs and 1 GPUs for each cell"):
        run_cells(comparison, cells)


def test_a_second_comparison_in_the_same_folder_is_refused(load: Load, tmp_path: Path) -> None:
    comparison, cells = load(SMALL)
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out/.lock"), pytest.raises(RecipeError, match="a comparison at work in this folder"):
        run_cells(comparison, cells)


def test_a_cell_is_finished_only_while_its_files_and_all_it_depends_on_are_the_same(
    load: Load, data: Path, tmp_path: Path
) -> None:
    comparison, cells = load(SMALL)
    works, missing = works_of(comparison, cells)
    (work,) = works.values()
    assert missing == {work.name}
    assert attempt(work).status == "done"
    assert finished(work)
    moved, _ = load(SMALL, resources={"cpus": 2})
    assert works_of(moved, grid(moved))[1] == frozenset(), "resources change no result"
    other, changed = load({"label": "lora", "method": {"name": "lora", "rank": 4, "alpha": 3}})
    assert works_of(other, changed)[1] == {work.name}
    rows = (data / "test.jsonl").read_bytes()
    (data / "test.jsonl").write_bytes(rows + b'{"question": "one more", "answer": "1"}\n')
    try:
        assert works_of(comparison, cells)[1] == {work.name}
    finally:
        (data / "test.jsonl").write_bytes(rows)
    assert finished(work)
    (work.recipe.output / "evaluation/sums.json").rename(tmp_path / "sums.json")
    assert not finished(work)
    (tmp_path / "sums.json").rename(work.recipe.output / "evaluation/sums.json")
    (work.recipe.output / "cell.json").write_text("{", encoding="utf-8")
    assert not finished(work)


def test_a_full_disk_is_a_failure_of_the_cell_and_what_was_there_stays(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, cells = load(SMALL)
    (work,) = works_of(comparison, cells)[0].values()
    evaluate = "keeptune.pipeline.scoring.write_bytes"

    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, full)
        found = attempt(work)
    assert (found.status, "No space left on device" in found.message) == ("failed", True)
    assert not finished(work)
    trained = (work.recipe.output / "trained/train.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("keeptune.experiments.comparison.cell.write_json", full)
        found = attempt(work)
    assert (found.status, "No space left on device" in found.message) == ("failed", True)
    assert not finished(work), "its mark could not be written"
    assert attempt(work).status == "done"
    assert (work.recipe.output / "trained/train.json").stat().st_mtime_ns == trained


def test_a_bug_is_not_swallowed_and_leaves_no_handlers(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    comparison, cells = load(SMALL)
    (work,) = works_of(comparison, cells)[0].values()
    monkeypatch.setattr("keeptune.experiments.comparison.cell.start", lambda _: {}["no such key"])
    before = list(logging.getLogger("keeptune").handlers)
    with pytest.raises(KeyError):
        attempt(work)
    assert logging.getLogger("keeptune").handlers == before


def test_without_ray_the_way_to_install_it_is_told(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, cells = load(SMALL)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(RecipeError, match=r'no Ray in this Python.*pip install "keeptune\[compare\]"'):
        run_cells(comparison, cells)


def test_dry_run_lists_the_cells_and_how_many_are_done(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison, cells = load(SMALL, NULL, seeds=[0, 1])
    works, _ = works_of(comparison, cells)
    attempt(next(iter(works.values())))
    said = keeptune("compare", tmp_path / "compare.yaml", "--dry-run", capsys=capsys)
    assert said.code == 0
    assert f"4 cells below {tmp_path / 'out/cells'}, 1 done" in said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["lora", "0.005", "2", "1"] in rows
    assert ["lora-null-v1", "0.005", "2", "0"] in rows
    assert not (tmp_path / "out/.lock").exists()
