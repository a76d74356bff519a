"""keeptune launch: what starts, one message for what is wrong on any process, and nothing left of what was killed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.forks import Forks
from tests.pipeline.support import METHODS, keeptune, values, write_recipe

from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError
from keeptune.core.locks import owned
from keeptune.pipeline.launching import SHARDINGS, Launch, configured

Values = Callable[..., dict[str, Any]]
AT = """
import os, signal
from keeptune.core.errors import DataError
import keeptune.pipeline.run as run
def now(job, plan):
    if rank in {ranks}:
        {do}
    whole(job, plan)
whole, run.train_stage = run.train_stage, now
"""
WRONG = 'raise DataError("train", got=f"process {rank}", wanted="none", next_step="Go on.")'
ELSEWHERE = "import os\nif rank == 1: os.chdir('elsewhere')"
BLIND = """
from pathlib import Path
stat = Path.stat
def without(self, **how):
    if rank == 1 and "stories260k" in str(self).lower():
        raise FileNotFoundError(2, "No such file", str(self))
    return stat(self, **how)
Path.stat = without
"""


def at_training(do: str, *ranks: int) -> str:
    return AT.format(ranks=set(ranks), do=do)


def left(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    at = str(folder)
    return [p.pid for p in psutil.process_iter(["cwd"]) if (p.info["cwd"] or "").startswith(at)]


@pytest.mark.parametrize(
    ("changes", "before", "code", "said"),
    [
        ({}, at_training(WRONG, 1), 2, "error: train: got process 1, wanted none. Go on."),
        ({}, at_training(WRONG, 0), 2, "error: train: got process 0, wanted none. Go on."),
        ({}, at_training(WRONG, 0, 1), 2, r"error: train: got process \d, wanted none. Go on."),
        ({"method": {"name": "lora", "rank": 4000}}, "", 2, "error: method lora, target .* rank 4000.*"),
        ({}, at_training('raise LookupError("of a library")', 1), 1, "Traceback .*LookupError: of a library"),
        ({}, at_training("os.kill(os.getpid(), signal.SIGKILL)", 1), 2, "error: process 1 of 2: got .* SIGKILL.*"),
        ({}, at_training("os.kill(os.getpid(), signal.SIGKILL)", 0), 2, "error: process 0 of 2: got .* SIGKILL.*"),
        ({}, at_training("os.kill(os.getpid(), signal.SIGSTOP)", 1), 2, "error: process 0 of 2: got no answer.*"),
        ({}, "import sys\nif rank: sys.argv += ['--train.seed', '5']", 2, "error: recipe: got another on process 1.*"),
        ({}, "import os; os.environ['KEEPTUNE_TIMEOUT'] = 'soon'", 2, "error: KEEPTUNE_TIMEOUT: got soon, .*"),
        ({"output": "out"}, ELSEWHERE, 2, "error: output: got out, which process 1 of 2 does not share .*"),
        ({}, BLIND, 2, "error: model .*"),
        ({"train": {"per_device_train_batch_size": 3}}, "", 2, "error: train.* 3 .*2 processes.*"),
        ({"device": "cuda"}, "", 2, "error: .*device.*"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_any_process_is_said_once(
    forks: Forks,
    recipe_values: Values,
    tmp_path: Path,
    changes: dict[str, Any],
    before: str,
    code: int,
    said: str,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(**changes))
    started = time.monotonic()
    pid = forks.start(
        "launch", recipe, "--processes", 2, "--timeout", 0.1 if "STOP" in before else 2,
        out=tmp_path / "said.txt", folder=tmp_path, before=before,
    )  # fmt: skip
    ended, output = forks.wait(pid), (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert ended == code, output
    assert time.monotonic() - started < 40
    config, _, rest = output.partition("\n")
    assert re.fullmatch(
        r"KEEPTUNE_TIMEOUT=[\d.]+ accelerate launch --config_file .*multi_gpu.yaml -m keeptune run .*recipe.yaml",
        config,
    )
    lines = [line for line in rest.splitlines() if not re.match(r"(stats|statistics|plan|train)\b", line)]
    assert re.fullmatch(said, "\n".join(lines), re.DOTALL), rest
    assert not left(tmp_path)
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} - {"multi_gpu.yaml"}
    assert bool(written) == ("train_stage" in before), "what is wrong at the start leaves nothing"
    assert (tmp_path / "out").exists() == bool(written)
    with owned(tmp_path / "out"):  # the lock is free
        pass


# Where a launch is killed: by which of its processes, after how many calls of what.
AFTER = """
import os, signal
from {module} import {name} as place
def counted(*args, **kwargs):
    global calls
    calls += 1
    if rank == {rank} and calls == {calls}:
        os.kill({whom}, signal.SIGKILL)
    return whole(*args, **kwargs)
calls, whole = 0, place.{function}
place.{function} = counted
"""


def killed_at(rank: int, whom: str, module: str, name: str, function: str, calls: int) -> str:
    return AFTER.format(**locals())


class Launched:
    """A recipe's run on one machine, or on two that are this one."""

    def __init__(self, forks: Forks, folder: Path, given: dict[str, Any], machines: int) -> None:
        self.forks, self.folder, self.machines = forks, folder, machines
        self.output = folder / "out"
        self.recipe = write_recipe(folder / "recipe.yaml", given)

    def start(self, before: str = "") -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words = ["--machines", self.machines, "--address", f"127.0.0.1:{free.getsockname()[1]}"]
        return [
            self.forks.start(
                "launch", self.recipe, "--processes", 2, *(words if self.machines > 1 else ()), "--machine-rank", rank,
                folder=self.folder, out=self.folder / f"said-{rank}.txt", before=before,
            )
            for rank in range(self.machines)
        ]  # fmt: skip

    def codes(self, before: str = "") -> list[int]:
        return [self.forks.wait(pid) for pid in self.start(before)]

    def said(self) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("said-*.txt")))

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "adapter" / "adapter_model.safetensors")

    def scores(self) -> list[Any]:
        return [read_json(path)["summary"] for path in sorted((self.output / "evaluation").glob("*.json"))]


@pytest.fixture(scope="module")
def whole(forks: Forks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    train = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "seed": 0}
    given = values(data, folder / "out", folder / "store", method=METHODS["lora-null-v1"], train=train)
    launched = Launched(forks, folder, given, 1)
    assert launched.codes() == [0], launched.said()
    return launched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "before"),
    [
        (1, killed_at(0, "os.getppid()", "torch", "distributed", "all_reduce", 5)),  # the launcher, in statistics
        (1, killed_at(1, "os.getpid()", "transformers", "Trainer", "training_step", 3)),
        (2, killed_at(1, "os.getppid()", "transformers", "Trainer", "training_step", 4)),  # the second machine
        (2, killed_at(0, "os.getppid()", "transformers.generation", "GenerationMixin", "generate", 1)),
    ],
)
def test_killed_it_leaves_nothing_and_goes_on(whole: Launched, tmp_path: Path, machines: int, before: str) -> None:
    given = read_json(whole.recipe) | {"output": str(tmp_path / "out"), "store": str(tmp_path / "store")}
    launched = Launched(whole.forks, tmp_path, given, machines)
    codes = launched.codes(before)
    assert all(codes), launched.said()
    if machines == 2:
        assert sorted(codes) == [-signal.SIGKILL, 2]
        assert launched.said().count("error: ") == 1
    until = time.monotonic() + 10
    while left(tmp_path):
        assert time.monotonic() < until, launched.said()
    assert not (launched.output / "report.json").exists()
    assert launched.codes() == [0] * machines, launched.said()
    wanted, found = whole.adapter(), launched.adapter()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert launched.scores() == whole.scores()


def test_an_error_on_the_second_machine_ends_the_first(whole: Launched, tmp_path: Path) -> None:
    launched = Launched(whole.forks, tmp_path, read_json(whole.recipe) | {"output": str(tmp_path / "out")}, 2)
    assert launched.codes(at_training(WRONG, 1)) == [2, 2]
    assert launched.said().count("error: ") == 1
    assert "error: train: got process 1" in (tmp_path / "said-1.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_is_alone_says_so_in_time(forks: Forks, tmp_path: Path, machine: int) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", {"output": "out"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--machines", 2, "--machine-rank", machine, "--address", f"127.0.0.1:{port}", "--timeout", 0.03]
    pid = forks.start("launch", recipe, "--processes", 2, *words, folder=tmp_path, out=tmp_path / "said.txt")
    assert forks.wait(pid, 30) == 2
    _, *said = (tmp_path / "said.txt").read_text(encoding="utf-8").splitlines()
    assert len(said) == 1 and said[0].startswith(f"error: --address 127.0.0.1:{port}: got "), said
    assert "wanted all 2 machines there" in said[0]
    assert not (tmp_path / "out").exists()


def test_control_c_ends_all(whole: Launched, tmp_path: Path) -> None:
    launched = Launched(whole.forks, tmp_path, read_json(whole.recipe) | {"output": str(tmp_path / "out")}, 1)
    (pid,) = launched.start(at_training("import time; time.sleep(60)", 0, 1))
    until = time.monotonic() + 60
    while not (launched.output / "plan").is_dir():
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    assert launched.forks.wait(pid, 20) == 130
    assert not left(tmp_path)
    assert "Traceback" not in launched.said()


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch(2, "fsdp3"), '--sharding: got fsdp3, .* Did you mean "fsdp2"?'),
        (Launch(2, "zero3"), "--sharding: got zero3, .* Take fsdp2"),
        (Launch(2, "single_gpu"), "--sharding: got single_gpu for 2 on 1 machine, "),
        (Launch(1, "fsdp2"), "--sharding: got fsdp2 for 1 on 1 machine, "),
        (Launch(0), "--processes: got 0 on 1 machine, wanted as many on each"),
        (Launch(3, machines=2, address="a:1"), "--processes: got 3 on 2 machines"),
        (Launch(2, machines=0), "--processes: got 2 on 0 machine"),
        (Launch(4, machines=2, machine=2, address="a:1"), "--machine-rank: got 2, wanted its number, from 0"),
        (Launch(4, machines=2), "--address: got None, wanted host:port"),
        (Launch(4, machines=2, address="host"), "--address: got host, wanted host:port"),
        (Launch(4, machines=2, address="host:70000"), "--address: got host:70000, wanted host:port"),
    ],
)
def test_a_launch_that_is_none_is_refused(launch: Launch, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        launch.checked()


def test_a_launch_fits_the_gpus_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Launch().checked() == Launch(1, "single_gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Launch().checked() == Launch(4, "multi_gpu")
    assert Launch(machines=2, machine=1, address="a:1").checked().processes == 8
    assert Launch(8, cpu=True).checked().processes == 8
    with pytest.raises(RecipeError, match="--processes: got 5 on 1 machine with 4 GPUs"):
        Launch(5).checked()


@pytest.mark.parametrize("name", SHARDINGS[1:])
def test_accelerate_reads_every_configuration(name: str, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    with configured(Launch(4, name, 2, address="10.0.0.1:29500"), tmp_path) as path:
        (tmp_path / "result").touch()
    assert path == tmp_path / f"{name}.yaml"
    read = load_config_from_file(str(path))
    assert (read.num_processes, read.num_machines, read.main_process_ip) == (4, 2, "10.0.0.1")
    assert (read.main_process_port, read.mixed_precision, read.use_cpu) == (29500, "no", True)
    assert read.distributed_type == {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    with configured(Launch(4, name), tmp_path / "new" / "one") as path:
        assert path.is_file()
    assert not (tmp_path / "new" / "one").exists(), "an error left nothing"


def test_a_port_in_use_is_refused_where_it_would_be_opened() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = Launch(2, machines=2, address=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RecipeError, match=f"--address: got {taken.getsockname()[1]}, in use"):
            given.checked()
        assert replace(given, machine=1).checked().processes == 2


@pytest.mark.slow
def test_the_command_that_is_printed_does_what_was_started(forks: Forks, recipe_values: Values, tmp_path: Path) -> None:
    """It is accelerate's own, with the configuration that was written."""
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values())
    words = ["launch", recipe, "--processes", 2, "--command", "plan"]
    assert forks.wait(forks.start(*words, folder=tmp_path, out=tmp_path / "said.txt")) == 0
    printed, said = (tmp_path / "said.txt").read_text(encoding="utf-8").split("\n", 1)
    first, *more = shlex.split(printed)
    program = [str(Path(sys.executable).with_name(first)), *more]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.count("35 targets") == 1
    assert said.endswith(done.stdout)


def test_zero_without_deepspeed_says_what_to_do(
    recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: False)
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values())
    said = keeptune("launch", recipe, "--processes", 2, "--sharding", "zero2", capsys=capsys)
    assert said.code == 2
    _, message = said.err.splitlines()
    assert message.startswith("error: --sharding zero2: got DeepSpeed is not installed, wanted the library")
    assert not (tmp_path / "out").exists()


def test_one_process_is_this_one(recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values())
    said = keeptune("launch", recipe, "--processes", 1, "--command", "plan", "--method.rank", 2, capsys=capsys)
    assert (said.code, said.err) == (0, f"keeptune plan {recipe} --method.rank 2\n")
    assert "35 targets" in said.out
    assert not (tmp_path / "out" / "single_gpu.yaml").exists()
