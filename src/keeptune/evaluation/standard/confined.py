"""The process that a generated program runs in; started by the sandbox, imported by none.

It reads one JSON object from its input, limits itself, runs the program and writes one JSON object to its output: the
word it was given only if the program ran to its end, so that one which leaves early (``os._exit(0)``) has failed.
"""

import ctypes  # noqa: F401 - NumPy imports it, and its import opens the interpreter, which the hooks forbid
import json
import os
import resource
import sys

_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.kill",
    "pty.",
    "ctypes.",
    "shutil.chown",
    "signal.pthread_kill",
)
# Events that change files: how many paths they begin with, and from where on they have the folders (open ones, -1 for
# none) that relative paths start at.
_CHANGES = {
    "os.remove": (1, 1),
    "os.removexattr": (1, 2),
    "os.rmdir": (1, 1),
    "os.mkdir": (1, 2),
    "os.chmod": (1, 2),
    "os.truncate": (1, 2),
    "os.rename": (2, 2),
    "os.link": (2, 2),
    "os.symlink": (2, 2),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _limit(memory: int, seconds: int, file_size: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CPU: seconds,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


def _hook(folder: str) -> None:
    """Forbids Python's own ways to the network, to other processes and to files outside a folder."""
    inside = os.path.realpath(folder)  # noqa: PTH118 - pathlib is more to import in every process

    def outside(path: object, start: str = "") -> bool:
        if not isinstance(path, str | bytes):
            return False
        real = os.path.realpath(os.path.join(start, os.fsdecode(path)))  # noqa: PTH118
        return real != "/dev/null" and os.path.commonpath([real, inside]) != inside

    def changes_outside(event: str, given: tuple[object, ...]) -> bool:
        if event == "open":  # path, mode (None where flags decide), flags
            return isinstance(given[2], int) and bool(given[2] & _WRITING) and outside(given[0])
        paths, folders = _CHANGES.get(event, (0, 0))
        starts = ["", *(os.readlink(f"/proc/self/fd/{fd}") for fd in given[folders:] if paths and fd != -1)]  # noqa: PTH115
        return any(outside(path, start) for path in given[:paths] for start in starts)

    def refuse(event: str, given: tuple[object, ...]) -> None:
        if event.startswith(_FORBIDDEN) or changes_outside(event, given):
            raise PermissionError(f"{event} is not allowed to a generated program")

    sys.addaudithook(refuse)


def main() -> None:
    """Runs the program of the input."""
    given = json.loads(sys.stdin.buffer.read())
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.argv = ["program"]
    os.environ.clear()  # of what Python itself put there
    _limit(**given["limits"])
    _hook(given["folder"])
    program, word = given["program"], given["word"]
    del given
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})  # what this process is for
        outcome = {"word": word}
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are failures too
        outcome = {"error": f"{type(error).__name__}: {error}"[:300]}
    os.write(report, json.dumps(outcome).encode())
    os._exit(0)  # threads and exit handlers of the program have no say


if __name__ == "__main__":
    main()
