"""Measurements in processes of their own, so that what one does not give back is not taken for another's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["command_peak", "numbers_of", "peak"]

_COMMAND = """
import atexit
from processes import peak
atexit.register(lambda: print(peak()))
from keeptune.cli.main import main
main()
"""


def peak() -> float:
    """Read the peak of this process's memory, MiB; ru_maxrss would begin at the size of the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def numbers_of(
    code: str, *words: str, timeout: float | None = None, env: Mapping[str, str] | None = None
) -> tuple[float, ...]:
    """Run Python in a process of its own.

    Args:
        code: What it runs; it can import the files of this folder.
        words: Its arguments.
        timeout: Seconds after which it is stopped.
        env: Variables of its environment besides those of this process.

    Returns:
        The numbers of the last line that it prints.
    """
    found = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", found, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return tuple(float(word) for line in done.stdout.splitlines()[-1:] for word in line.split())


def command_peak(*words: str) -> float:
    """Run a command of keeptune and return the peak of its process, MiB."""
    return numbers_of(_COMMAND, *words)[0]
