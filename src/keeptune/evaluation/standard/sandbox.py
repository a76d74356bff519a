"""Programs that a model wrote, each run in a confined process of its own.

Everywhere: limits of processor time, memory, file size and open files (setrlimit), a wall clock after which the whole
process group is killed, an empty folder that is deleted afterwards, no environment, and Python's audit hooks against
sockets, other processes and changes to files outside the folder. The hooks stop accidents, not attacks. Where
bubblewrap (``bwrap``) works the kernel holds the program as well: the file system is read-only but for the folder, and
network and processes are its own; else only the network, where ``unshare`` works. The log says which holds. Reading
files is allowed.
"""

from __future__ import annotations

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keeptune.core.errors import ModelError

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
    for prefix, holds in _prefixes():
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


def _prefixes() -> Iterator[tuple[tuple[str, ...], str]]:
    bwrap, unshare = shutil.which("bwrap"), shutil.which("unshare")
    if bwrap:
        yield (bwrap, "--ro-bind", "/", "/", *_BWRAP), "bubblewrap: no network, and no changes outside an empty folder"
    if unshare:
        held = "no network; files are kept by Python's audit hooks alone (install bubblewrap for more)"
        yield (unshare, *_UNSHARE), held
        yield (unshare, "--net"), held
    yield (), "network and files are kept by Python's audit hooks alone (install bubblewrap for more)"
