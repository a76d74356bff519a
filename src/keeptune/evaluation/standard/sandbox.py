"""Programs that a model wrote, each run in a confined process of its own.

Everywhere: limits of processor time, memory, file size and open files (setrlimit), a wall clock after which the whole
process group is killed, an empty folder that is deleted afterwards, no environment, and Python's audit hooks against
sockets, other processes and changes to files outside the folder. The hooks stop accidents, not attacks. Where
bubblewrap (``bwrap``) works the kernel holds the program as well: the file system is read-only but for the folder, and
network and processes are its own; else only the network, where ``unshare`` works. The log says which holds. Reading
files is allowed.

lm-eval's task files of HumanEval and MBPP load ``code_eval`` and run it when they are merely read, so they are read
without their functions, which this module replaces: the program of an answer, and MBPP's examples.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.errors import ModelError
from keeptune.core.processes import by_first
from keeptune.data.sources import Row

_LOG = logging.getLogger(__name__)
_BWRAP = ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--dev", "/dev", "--proc", "/proc")
_UNSHARE = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
_CONFINED = Path(__file__).with_name("confined.py")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to run programs on this machine."""

    prefix: tuple[str, ...]  # command that confines the process; empty where there is none
    seconds: int = 5  # of processor time of a program
    wall: float = 60.0  # seconds by the clock, after which it is killed: a machine may be busy
    memory: int = 2**30  # bytes of address space
    file_size: int = 2**20  # bytes of the largest file

    def run(self, program: str) -> str:
        """Runs Python source in an empty folder; returns what stopped it, empty where it ran to its end."""
        # The process repeats the word when the program has run to its end: one that leaves early does not know it.
        word = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="keeptune-program-") as folder:
            limits = {"memory": self.memory, "seconds": self.seconds, "file_size": self.file_size}
            given = {"program": program, "word": word, "folder": folder, "limits": limits}
            bind = ("--bind", folder, folder, "--chdir", folder) if "--ro-bind" in self.prefix else ()
            command = [*self.prefix, *bind, sys.executable, "-I", "-B", str(_CONFINED)]
            text = self._output(command, folder, json.dumps(given).encode())
        try:
            report = json.loads(text)
        except ValueError:
            return f"stopped: over {self.seconds} s, over its memory, or ended by itself"
        return "" if report.get("word") == word else str(report.get("error", "ended by itself"))

    def _output(self, command: list[str], folder: str, given: bytes) -> bytes:
        with tempfile.TemporaryFile() as output:
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            ) as process:
                try:
                    process.communicate(given, timeout=self.wall)
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    # The whole group, so that nothing that the program started is left.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            return output.read(2**16)


def open_sandbox(where: str) -> Sandbox:
    """Returns the tightest sandbox that works on this machine, and logs which it is.

    Raises:
        ModelError: Not even an empty program runs.
    """
    bwrap, unshare = shutil.which("bwrap"), shutil.which("unshare")
    more = "by Python's audit hooks alone (install bubblewrap for more)"
    tight = "bubblewrap: no network, and no changes outside an empty folder"
    ways: list[tuple[tuple[str, ...], str]] = [((bwrap, "--ro-bind", "/", "/", *_BWRAP), tight)] if bwrap else []
    ways += [((unshare, *own), f"no network; files are kept {more}") for own in (_UNSHARE, ("--net",)) if unshare]
    for prefix, holds in [*ways, ((), f"network and files are kept {more}")]:
        sandbox = Sandbox(prefix)
        if not sandbox.run(""):
            level = logging.INFO if holds.startswith("bubblewrap") else logging.WARNING
            _LOG.log(level, "%s: programs run with limits of time and memory, and %s.", where, holds)
            return sandbox
    raise ModelError(
        f"{where}.run_code",
        got="no way to run even an empty program in a process of its own",
        wanted="a machine where Python can be started with limits",
        next_step="Leave this benchmark out here, or raise the limits of the container.",
    )


METRIC = "pass_at_1"
MBPP_EXAMPLES = (2, 3, 4)  # by task_id, as in lm-eval's list


def program_of(name: str, row: Row, answer: str) -> str:
    """Returns an answer with the tests that it has to pass, as in lm-eval's ``code_eval``."""
    if name == "humaneval":
        return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})"
    # MBPP's test_setup_code, of one item in 500, is left out there as well.
    return f"{answer}\n" + "\n".join(row["test_list"][:3])


class Runs:
    """Runs the answers of ``humaneval`` or ``mbpp`` and keeps what stopped each, in the order of the items."""

    def __init__(self, name: str, sandbox: Sandbox) -> None:
        self.name = name
        self.sandbox = sandbox
        self.stopped: list[str] = []

    def process(self, row: Row, results: Sequence[str]) -> dict[str, float]:
        """Runs the one answer to an item: lm-eval's ``process_results``."""
        program = program_of(self.name, row, results[0])
        self.stopped.append(by_first(lambda: self.sandbox.run(program)))
        return {METRIC: float(not self.stopped[-1])}


def task_overrides(name: str, process: Callable[[Row, Sequence[str]], dict[str, float]]) -> dict[str, Any]:
    """Returns fields of a task's configuration in place of those that run programs in this process."""
    fields: dict[str, Any] = {
        "unsafe_code": False,
        "filter_list": None,
        "process_results": process,
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    if name == "mbpp":
        fields["fewshot_config"] = {
            "sampler": "first_n",
            "split": "prompt",
            "process_docs": lambda rows: [row for row in rows if row["task_id"] in MBPP_EXAMPLES],
            "doc_to_target": "{{code}}\n[DONE]",
        }
    return fields
