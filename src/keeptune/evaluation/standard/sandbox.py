"""Programs that a model wrote, each run in a process of its own that can do little harm.

What holds a program, on Linux: limits of processor time, memory, file size and processes (setrlimit); a wall clock
after which its whole process group is killed; no network, in a network namespace of its own; no change of files but in
an empty folder that is deleted afterwards (Landlock); no environment; and Python's audit hooks against sockets and
other processes. Where the kernel gives no namespace or no Landlock, the audit hooks alone stand in for it, and the log
says so: they stop accidents, not a program that means harm. Reading files is not prevented.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.errors import ModelError

__all__ = ["Limits", "Outcome", "Sandbox", "open_sandbox"]

_LOG = logging.getLogger(__name__)
_NAMESPACES = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
_CONFINED = Path(__file__).with_name("confined.py")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Args:
        seconds: Of processor time.
        wall: Seconds by the clock, after which it is killed; more than ``seconds``, since a machine may be busy.
        memory: Bytes of address space.
        file_size: Bytes of the largest file.
    """

    seconds: int = 5
    wall: float = 60.0
    memory: int = 2**30
    file_size: int = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program.

    Args:
        passed: Whether it ran to its end without an error.
        said: What stopped it; empty where nothing did.
    """

    passed: bool
    said: str


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to run programs on this machine.

    Args:
        prefix: Command that gives the process namespaces of its own; empty where there are none.
        limits: What each program may use.
    """

    prefix: tuple[str, ...]
    limits: Limits

    def run(self, program: str) -> Outcome:
        """Run a program.

        Args:
            program: Python source.

        Returns:
            Whether it ran to its end.
        """
        word = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="keeptune-program-") as folder:
            told = self._started(program, word, folder)
        if told is None:
            return Outcome(False, f"stopped: over {self.limits.seconds} s, over its memory, or ended by itself")
        if told.get("word") == word:
            return Outcome(True, "")
        return Outcome(False, str(told.get("error", "ended by itself")))

    def _started(self, program: str, word: str, folder: str) -> dict[str, Any] | None:
        """Run the process and read what it reports; None where it reports nothing."""
        limits = self.limits
        given = json.dumps(
            {
                "program": program,
                "word": word,
                "folder": folder,
                "memory": limits.memory,
                "seconds": limits.seconds,
                "size": limits.file_size,
            }
        )
        read, write = os.pipe()
        command = [*self.prefix, sys.executable, "-I", "-B", str(_CONFINED), str(write)]
        try:
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                pass_fds=(write,),
                start_new_session=True,
            ) as process:
                os.close(write)
                try:
                    process.communicate(given.encode("utf-8", "surrogatepass"), timeout=limits.wall)
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    # Whatever the program started belongs to its group, and is in the way of nobody else.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            os.set_blocking(read, False)
            with contextlib.suppress(BlockingIOError):
                text = os.read(read, 2**16)
                return json.loads(text) if text else None
        except json.JSONDecodeError:
            return None
        finally:
            os.close(read)
        return None


def open_sandbox(where: str, limits: Limits | None = None) -> Sandbox:
    """Find out how programs can be held on this machine, and check that one runs.

    Args:
        where: The recipe key, for messages.
        limits: What each program may use; None takes the usual.

    Returns:
        The sandbox.

    Raises:
        ModelError: Not even an empty program runs.
    """
    limits = Limits() if limits is None else limits
    unshare = shutil.which("unshare")
    for prefix in ([(unshare, *_NAMESPACES), (unshare, "--net")] if unshare else []) + [()]:
        sandbox = Sandbox(prefix, limits)
        with tempfile.TemporaryDirectory(prefix="keeptune-program-") as folder:
            told = sandbox._started("", "word", folder)
        if told is None or told.get("word") != "word":
            continue
        if not prefix:
            _LOG.warning("%s: no network namespace here; only Python's own ways to the network are shut.", where)
        if not told.get("files"):
            _LOG.warning("%s: no Landlock here; only Python's own ways to other files are shut.", where)
        return sandbox
    raise ModelError(
        f"{where}.run_code",
        got="no way to run even an empty program in a process of its own",
        wanted="a machine where Python can be started with limits",
        next_step="Leave this benchmark out here, or raise the limits of the container.",
    )
