"""Processes of one command, started by a configuration for accelerate as TRL has them, and how they ended."""

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import yaml

from keeptune.core.artefact import explain_full_disk, write_text
from keeptune.core.errors import ProcessError, RecipeError, nearest
from keeptune.core.processes import LAUNCHER, TIMEOUT

Sharding = Literal["single_gpu", "multi_gpu", "fsdp2", "zero1", "zero2", "zero3"]  # of TRL's `accelerate_configs`
SHARDINGS: tuple[str, ...] = get_args(Sharding)
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by the launcher, which leaves it at that
_IN_ALL = "--processes counts those of all machines together."
_NO_GPU = "Start fewer, or set `device: cpu`."
_TWO = "Example of the second of two machines: --machines 2 --machine-rank 1 --address 10.0.0.1:29500"


@dataclass(frozen=True)
class Launch:
    """The processes of one command.

    Args:
        processes: How many there are, on all machines together; None: one for each GPU.
        sharding: One of ``SHARDINGS``; None: multi_gpu where there are several processes.
        machines: How many machines there are.
        machine: Which of them this is, from 0.
        address: ``host:port`` of the first machine, of several.
        minutes: After how many a process that does not answer is taken for hung; None: as the environment says.
        cpu: Whether they run on the CPU though there are GPUs.
    """

    processes: int | None = None
    sharding: str | None = None
    machines: int = 1
    machine: int = 0
    address: str | None = None
    minutes: float | None = None
    cpu: bool = False

    def checked(self) -> Self:
        """Returns it with the number of processes and the sharding set; RecipeError where it does not fit."""
        from accelerate.utils import is_port_in_use

        gpus = 0 if self.cpu else torch.cuda.device_count()
        count = max(1, gpus) * self.machines if self.processes is None else self.processes
        name = self.sharding or ("multi_gpu" if count > 1 else "single_gpu")
        host, _, port = (self.address or "").rpartition(":")
        several, known = self.machines > 1, bool(host) and port.isdecimal() and int(port) < 2**16
        here = f"{count} on {self.machines} machine{'s' * several}"
        for wrong, where, got, wanted, next_step in (
            (name not in SHARDINGS, "--sharding", name, "a configuration that TRL ships", nearest(name, SHARDINGS)),
            (name == "zero3", "--sharding", "zero3, whose processes hold no factor whole", "fsdp2", "Take fsdp2."),
            (self.machines < 1 or count < 1 or count % self.machines, "--processes", here, "as many on each", _IN_ALL),
            (0 < gpus * self.machines < count, "--processes", f"{here} with {gpus} GPUs", "a GPU for each", _NO_GPU),
            ((count > 1) == (name == "single_gpu"), "--sharding", f"{name} for {here}", "single_gpu for one", _IN_ALL),
            (not 0 <= self.machine < self.machines, "--machine-rank", f"{self.machine}", "its number, from 0", _TWO),
            (several and not known, "--address", self.address, "host:port of machine 0", _TWO),
        ):
            if wrong:
                raise RecipeError(where, got=str(got), wanted=wanted, next_step=next_step)
        if several and self.machine == 0 and is_port_in_use(int(port)):
            raise RecipeError("--address", got=f"{port}, in use", wanted="a free port", next_step="Take another one.")
        return replace(self, processes=count, sharding=name)

    def configuration(self) -> dict[str, Any]:
        """Returns accelerate's configuration of checked processes, the same on all machines."""
        host, _, port = (self.address or "127.0.0.1:0").rpartition(":")  # port 0: one that is free
        shipped = resources.files("trl") / "accelerate_configs" / f"{self.sharding}.yaml"
        values: dict[str, Any] = yaml.safe_load(shipped.read_text(encoding="utf-8"))
        return values | {
            "num_processes": self.processes,
            "num_machines": self.machines,
            "main_process_ip": host,
            "main_process_port": int(port),
            "mixed_precision": "no",  # the recipe says what a training computes in
            "use_cpu": self.cpu or not torch.cuda.is_available(),
        }

    def words(self, config: Path, command: Sequence[str]) -> list[str]:
        """Returns what one types to start a module and its words with a configuration."""
        machine = ["--machine_rank", str(self.machine)] if self.machines > 1 else []
        return ["accelerate", "launch", "--config_file", str(config), *machine, "-m", *command]


@contextlib.contextmanager
def configured(launch: Launch, folder: Path) -> Iterator[Path]:
    """Yields the configuration of checked processes in a folder, where it stays beside what a command writes there."""
    path = folder / f"{launch.sharding}.yaml"
    with explain_full_disk(path):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(launch.configuration()))
    try:
        yield path
    finally:
        if {*folder.iterdir()} == {path}:  # an error left nothing
            path.unlink()
            folder.rmdir()


def start(launch: Launch, config: Path, command: Sequence[str]) -> int:
    """Starts a module and its words in checked processes, and waits for them.

    Returns:
        The exit code: 2 where a process said what was wrong.

    Raises:
        ProcessError: One was killed, or the machines did not find each other.
        RecipeError: What the sharding needs is not installed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = torch.get_num_threads() * launch.machines // (launch.processes or 1)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, threads)))}
    environment |= {LAUNCHER: str(os.getpid())} | ({TIMEOUT: str(launch.minutes)} if launch.minutes is not None else {})
    wait = ["--rdzv_conf", f"timeout={max(1, round(launch.minutes * 60))}"] if launch.minutes else []
    before, handlers = logging.root.manager.disable, {number: signal.getsignal(number) for number in _HANDLED}
    logging.disable()  # the launcher's own reports: the process has said what it was
    try:
        with tempfile.TemporaryDirectory() as logs, patch_environment(**environment):
            words = launch.words(config, command)[2:]
            launch_command(launch_command_parser().parse_args(["--log_dir", logs, *wait, *words]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and 2 not in codes:  # it could not say why it ended
                where, got = f"process {rank} of {launch.processes}", f"ended by {failure.signal_name()}"
                next_step = "SIGKILL is often the system's, out of memory. The same command goes on where it was."
                raise ProcessError(where, got=got, wanted="its own end", next_step=next_step) from None
        return 2 if 2 in codes else int(codes[0])
    except SignalException as error:
        return 128 + int(error.sigval)
    except ImportError as error:
        where, got = f"--sharding {launch.sharding}", str(error).partition(" =>")[0]
        next_step = "Install it, or take fsdp2."
        raise RecipeError(where, got=got, wanted="the library that it needs", next_step=next_step) from error
    except (torch.distributed.DistError, TimeoutError) as error:
        where, wanted = f"--address {launch.address}", f"all {launch.machines} machines there"
        next_step = "Start the same command on each, with its own --machine-rank; see that the port is open."
        raise ProcessError(where, got=str(error).splitlines()[0], wanted=wanted, next_step=next_step) from error
    finally:
        logging.disable(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
