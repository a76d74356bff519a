"""Processes as forks of one that has loaded all libraries: a launch of three of them then takes seconds.

python -m tests.forks; on stdin a line of JSON for each command, on stdout one for each answer.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Forks:
    """The process that forks, as tests see it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"TORCH_CPP_LOG_LEVEL": "FATAL"},
        )  # fmt: skip

    def start(
        self, *words: object, folder: Path, out: Path, env: Mapping[str, str] | None = None, before: str = ""
    ) -> int:
        """Starts ``keeptune WORDS``, with what it prints in a file; returns its number.

        Args:
            words: The command.
            folder: Where it runs.
            out: What it prints goes here, stdout and stderr of all of its processes.
            env: Variables that it gets.
            before: Python that each process of a launcher runs first.
        """
        question = {"words": [*map(str, words)], "folder": str(folder), "out": str(out), "env": dict(env or {})}
        return int(self._ask(question | {"before": before}))

    def call(
        self, function: Callable[..., None], *words: object, out: Path, env: Mapping[str, str] | None = None
    ) -> int:
        """Starts a function of a module with words, as a program of its own would be; returns its number."""
        question = {"function": [function.__module__, function.__name__], "words": [*map(str, words)]}
        return int(self._ask(question | {"folder": str(ROOT), "out": str(out), "env": dict(env or {})}))

    def together(self, function: Callable[..., None], size: int, *words: object) -> None:
        """Calls a function in several processes, as a launcher starts them, and waits for them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, str(rank)) for rank in range(size)]
            ranks = [{"RANK": path.name, "LOCAL_RANK": path.name} for path in said]
            numbers = [self.call(function, *words, out=said[n], env=env | own) for n, own in enumerate(ranks)]
            codes = [self.wait(number, 900) for number in numbers]
            assert not any(codes), "\n".join(path.read_text(encoding="utf-8")[-3000:] for path in said)

    def code(self, pid: int) -> int | None:
        """Returns how a command ended, if it has."""
        code: int | None = self._ask({"pid": pid})
        return code

    def wait(self, pid: int, seconds: float = 120) -> int:
        """Returns how a command ends."""
        until = time.monotonic() + seconds
        while (code := self.code(pid)) is None:
            assert time.monotonic() < until, "it hangs"
            time.sleep(0.02)
        return code

    def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process; commands that run are ended by their tests."""
        self.process.communicate()


def _is_new(question: Mapping[str, Any]) -> None:
    """Has a folder, outputs and variables of its own from here on."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    random.seed()
    os.chdir(question["folder"])
    file = os.open(question["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(question["env"])


def _command(question: Mapping[str, Any]) -> None:
    """Is a command from here on; a launcher's processes are forks too."""
    import torch.distributed.run as launcher
    from torch.multiprocessing.spawn import ProcessContext

    from keeptune.cli.main import main

    waits = ProcessContext._join_procs_with_timeout  # for 30 seconds, until what does not end by SIGTERM is killed
    ProcessContext._join_procs_with_timeout = lambda self, _: waits(self, 2)  # type: ignore[method-assign]
    real = launcher.elastic_launch

    def forked(config: Any, entrypoint: str) -> Any:
        assert entrypoint == sys.executable
        config.start_method = "fork"

        def process(*words: str) -> None:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # as a new program has them
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            sys.argv = [*words[words.index("-m") + 1 :]]
            exec(question["before"], {"rank": int(os.environ["RANK"])})  # noqa: S102
            try:
                main()
            except Exception:  # noqa: BLE001 - as Python itself does with what is not caught
                traceback.print_exc()
                sys.exit(1)

        return real(config, process)

    launcher.elastic_launch = forked
    sys.argv = ["keeptune", *question["words"]]
    main()


def _serve() -> None:
    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            pid, status = os.waitpid(question["pid"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        if "function" in question:
            importlib.import_module(question["function"][0])
            gc.freeze()
        if (pid := os.fork()) == 0:
            _is_new(question)
            if "function" in question:
                module, name = question["function"]
                getattr(sys.modules[module], name)(*question["words"])
            else:
                _command(question)
            return
        print(pid, flush=True)


if __name__ == "__main__":
    import torch

    import keeptune.pipeline.run  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()
    _serve()
