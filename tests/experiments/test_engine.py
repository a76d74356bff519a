"""Runs on a Ray cluster of two nodes: failures, lost workers, resumption, shared work, and a real run's numbers.

Every worker loads torch and Transformers once, which is what the time goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tests.pipeline.support import keeptune

from keeptune.core.artefact import read_json
from keeptune.core.errors import ArtefactError, RecipeError
from keeptune.core.locks import owned
from keeptune.experiments import engine
from keeptune.experiments.compare_section import Resources
from keeptune.experiments.engine import run_all, tasks_of
from keeptune.experiments.plan_runs import Comparison, list_runs
from keeptune.experiments.run_comparison import run_comparison
from keeptune.experiments.single_run import RunTask, attempt, finished
from keeptune.pipeline.run import run

Load = Callable[..., Comparison]
pytestmark = [
    # Of Ray 2.60 itself: sockets and files that it leaves to the garbage collector, and its own deprecations.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]


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


NULL = {"name": "lora-null", "rank": 4, "variant": "v1"}
SMALL = {"name": "lora", "rank": 4}
TOO_MUCH = {"label": "too much", "method": {"name": "lora", "rank": 4000}}


@contextlib.contextmanager
def meanwhile(act: Callable[[threading.Event], None]) -> Iterator[None]:
    """Acts beside the block, until it ends."""
    stop = threading.Event()
    beside = threading.Thread(target=act, args=(stop,))
    beside.start()
    try:
        yield
    finally:
        stop.set()
        beside.join()


def run_every(comparison: Comparison) -> dict[str, Any]:
    return run_all(comparison, list_runs(comparison))


def only_task(comparison: Comparison) -> RunTask:
    (task,) = tasks_of(comparison, list_runs(comparison))[0].values()
    return task


def no_workers(*_: Any, **__: Any) -> Any:
    raise AssertionError("workers were started")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_runs_go_to_both_nodes_a_failing_one_is_reported_and_finished_ones_are_not_repeated(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = load(TOO_MUCH, NULL, seeds=[0, 1])
    specs = list_runs(comparison)
    first = run_all(comparison, specs)
    assert list(first) == [spec.name for spec in specs]
    failed = {name for name in first if name.startswith("too-much")}
    statuses = {name: "failed" if name in failed else "done" for name in first}
    assert {name: outcome.status for name, outcome in first.items()} == statuses
    assert all("method lora, target" in first[name].message and "rank 4000" in first[name].message for name in failed)
    assert len({outcome.node for outcome in first.values()}) == 2
    mark = read_json(tmp_path / "out/runs" / min(failed) / "run.json")
    assert (mark["status"], mark["message"]) == ("failed", first[min(failed)].message)

    one = specs[-1]
    alone = run(one.recipe.model_copy(update={"output": tmp_path / "alone", "store": tmp_path / "other"}))
    for b in alone["methods"][0]["benchmarks"]:
        assert read_json(one.recipe.output / "evaluation" / f"{b['name']}.json")["summary"] == b
    logs = [(spec.recipe.output / "log.txt").read_text(encoding="utf-8") for spec in specs if spec.name not in failed]
    assert sum("evaluate: the base's answers taken from" in log for log in logs) == 1, "the first run asks the base"
    assert len(list((tmp_path / "out/base").glob("*.json"))) == 1  # sums; stories has no answers to keep

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("train.json")}
    again = run_all(comparison, specs)
    assert {name: outcome.status for name, outcome in again.items()} == statuses
    assert {name for name, outcome in again.items() if outcome.seconds} == failed, "failed runs are tried again"
    assert {path: path.stat().st_mtime_ns for path in written} == written
    monkeypatch.setattr(engine, "_on_ray", no_workers)
    done = run_all(comparison, [spec for spec in specs if spec.name not in failed])
    assert all(outcome.status == "done" for outcome in done.values())
    with pytest.raises(AssertionError, match="workers were started"):
        run_all(comparison, specs)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_whose_worker_is_killed_is_tried_once_more_and_again_the_next_time(load: Load, tmp_path: Path) -> None:
    comparison = load(SMALL, {"name": "pissa", "rank": 4})
    first, other = (spec.name for spec in list_runs(comparison))
    log = tmp_path / "out/runs" / first / "log.txt"
    killed: list[int] = []

    def kill(stop: threading.Event) -> None:
        while len(killed) < 2 and not stop.wait(0.02):
            for pid in holders(log):
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    with meanwhile(kill):
        outcomes = run_every(comparison)
    assert len(killed) == 2
    assert (outcomes[first].status, outcomes[other].status) == ("failed", "done")
    assert "its worker process died 2 times" in outcomes[first].message
    assert run_every(comparison)[first].status == "done"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_runs_of_two_processes_each_on_both_nodes(load: Load, tmp_path: Path) -> None:
    comparison = load(TOO_MUCH, NULL, resources={"cpus": 1, "processes": 2})
    failed, done = (spec.name for spec in list_runs(comparison))
    ranks: dict[int, str] = {}

    def watch(stop: threading.Event) -> None:
        while not stop.wait(0.05):
            for process in psutil.process_iter(["cmdline"]):
                if "keeptune.experiments.cell" in (process.info["cmdline"] or ()) and process.pid not in ranks:
                    with contextlib.suppress(psutil.Error, KeyError):
                        ranks[process.pid] = process.environ()["RANK"]

    with meanwhile(watch):
        outcomes = run_every(comparison)
    assert sorted(ranks.values()) == ["0", "0", "1", "1"]
    assert not any(psutil.pid_exists(pid) for pid in ranks)
    assert len({outcome.node for outcome in outcomes.values()}) == 2
    assert {name: outcome.status for name, outcome in outcomes.items()} == {failed: "failed", done: "done"}
    assert outcomes[failed].message.startswith("method lora, target") and "rank 4000" in outcomes[failed].message
    assert read_json(tmp_path / "out/runs" / failed / "run.json")["message"] == outcomes[failed].message
    one = list_runs(comparison)[1].recipe
    alone = run(one.model_copy(update={"output": tmp_path / "alone", "store": tmp_path / "other"}))
    for b in alone["methods"][0]["benchmarks"]:
        found = read_json(one.output / "evaluation" / f"{b['name']}.json")["summary"]
        assert (found["before"], found["after"]) == pytest.approx((b["before"], b["after"]), abs=1e-4)


@pytest.mark.parametrize(
    ("given", "processes", "sharding"),
    [({}, 1, None), ({"gpus": 0.5}, 1, None), ({"gpus": 4}, 4, None), ({"gpus": 4, "processes": 1}, 1, None)]
    + [({"processes": 2, "sharding": "fsdp2"}, 2, "fsdp2")],
)
def test_a_run_has_a_process_for_each_whole_gpu(
    load: Load, given: dict[str, Any], processes: int, sharding: str | None
) -> None:
    resources = load(SMALL, resources=given).section.resources
    assert resources is not None
    assert (resources.launch.processes, resources.launch.sharding) == (processes, sharding)
    with pytest.raises(RecipeError, match=r"compare.resources.sharding: got \"fsdp3\""):
        load(SMALL, resources=given | {"sharding": "fsdp3"})


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
    monkeypatch.setattr(engine, "write_bytes", lambda *_: None)  # the marker is not where the worker looks
    (outcome,) = run_every(load(SMALL)).values()
    assert outcome.status == "failed"
    assert "is not the folder that the comparison was started in" in outcome.message
    assert "one shared folder" in outcome.message


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_no_node_has_is_refused_and_not_waited_for(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"got 2 CPUs and 0 GPUs for each run, wanted what one node has: 1 CPUs"):
        run_every(load(SMALL, resources={"cpus": 2}))
    with pytest.raises(RecipeError, match=r"got 1 CPUs and 1 GPUs for each run"):
        run_every(load(SMALL, resources={"gpus": 1}))


def test_a_second_comparison_in_the_same_folder_is_refused(load: Load, tmp_path: Path) -> None:
    with (
        owned(tmp_path / "out"),
        pytest.raises(ArtefactError, match=rf"another keeptune writes to .process {os.getpid()}"),
    ):
        run_comparison(load(SMALL), "keeptune compare")


def test_a_run_is_finished_only_while_its_files_and_all_it_depends_on_are_the_same(
    load: Load, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = only_task(load(SMALL))
    assert not finished(task)
    assert attempt(task).status == "done"
    assert finished(task)
    trained = (task.recipe.output / "trained/train.json").stat().st_mtime_ns
    assert attempt(task).seconds == 0, "another worker that had the same run finds it done"
    assert (task.recipe.output / "trained/train.json").stat().st_mtime_ns == trained
    assert finished(only_task(load(SMALL, resources={"cpus": 2}))), "resources change no result"
    assert not finished(only_task(load({"label": "lora", "method": {"name": "lora", "rank": 4, "alpha": 3}})))
    rows = (data / "test.jsonl").read_bytes()
    (data / "test.jsonl").write_bytes(rows + b'{"question": "one more", "answer": "1"}\n')
    try:
        assert not finished(only_task(load(SMALL)))
    finally:
        (data / "test.jsonl").write_bytes(rows)
    assert finished(task)

    load(SMALL, NULL, seeds=[0, 1])
    said = keeptune("compare", tmp_path / "compare.yaml", "--dry-run", capsys=capsys)
    assert said.code == 0
    assert f"4 runs below {tmp_path / 'out/runs'}, 1 done" in said.out
    assert not (tmp_path / "out/.owner").exists()

    (task.recipe.output / "evaluation/sums.json").rename(tmp_path / "sums.json")
    assert not finished(task)
    (tmp_path / "sums.json").rename(task.recipe.output / "evaluation/sums.json")
    (task.recipe.output / "run.json").write_text("{", encoding="utf-8")
    assert not finished(task)


def test_a_full_disk_is_a_failure_of_the_run_and_what_was_there_stays(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = only_task(load(SMALL))

    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    for place in ("keeptune.pipeline.scoring.write_text", "keeptune.experiments.single_run.write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            outcome = attempt(task)
        assert (outcome.status, "No space left on device" in outcome.message) == ("failed", True)
        assert not finished(task), "its scores or its mark could not be written"
    trained = (task.recipe.output / "trained/train.json").stat().st_mtime_ns
    assert attempt(task).status == "done"
    assert (task.recipe.output / "trained/train.json").stat().st_mtime_ns == trained


def test_ray_on_one_machine_binds_to_the_loopback_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def init(**how: Any) -> None:
        seen.update(how, **{name: value for name, value in os.environ.items() if name.startswith("RAY_")})

    fake = SimpleNamespace(is_initialized=bool, init=init, nodes=lambda: [{"Alive": True, "Resources": {"CPU": 1}}])
    fake.shutdown = lambda: None
    monkeypatch.setitem(__import__("sys").modules, "ray", fake)
    monkeypatch.setattr(os, "environ", {})
    with engine._started_ray(Resources(cpus=1)):
        pass
    assert (seen["address"], seen["include_dashboard"], seen["RAY_AUTH_MODE"]) == ("local", False, "token")
    assert seen["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"  # Ray's own way to bind to 127.0.0.1


def test_without_ray_the_error_says_how_to_install_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(RecipeError, match=r'no Ray in this Python.*pip install "keeptune\[compare\]"'):
        run_every(load(SMALL))
