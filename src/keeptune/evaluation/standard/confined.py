"""The process that a generated program runs in; started by the sandbox, imported by none.

It reads one JSON object from its input (the program, limits, and a word to say at the end), confines itself, runs the
program, and writes what happened to the descriptor it was given. The word is written only if the program ran to its
end, so that a program which leaves early (``os._exit(0)``) has failed.
"""

import ctypes
import json
import os
import resource
import sys
import types

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_NO_NEW_PRIVILEGES = 38
_WRITE = 1 << 1
_CHANGE = _WRITE | 0x1FF0  # remove and make files of all kinds: Landlock's first version, but for execute and read
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15
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
    "webbrowser.",
    "urllib.",
    "ftplib.",
    "smtplib.",
    "http.",
    "syslog.",
    "signal.pthread_kill",
)
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


class _Rules(ctypes.Structure):
    _fields_ = [("handled_fs", ctypes.c_uint64), ("handled_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def limit(memory: int, seconds: int, size: int) -> None:
    """Set the limits of this process, which it cannot raise again.

    Args:
        memory: Bytes of address space.
        seconds: Of processor time.
        size: Bytes of the largest file.
    """
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CPU: seconds,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


def shut_files(folder: str) -> bool:
    """Forbid this process to change files outside a folder, by the kernel's Landlock.

    Args:
        folder: The folder.

    Returns:
        Whether the kernel has Landlock.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    handled = _CHANGE
    handled |= _REFER if version >= 2 else 0
    handled |= _TRUNCATE if version >= 3 else 0
    handled |= _IOCTL if version >= 5 else 0
    net = 3 if version >= 4 else 0  # bind and connect, TCP
    scoped = 3 if version >= 6 else 0  # signals and abstract sockets
    rules = _Rules(handled, net, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    for path in (folder, "/dev/null"):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = handled if path == folder else _WRITE | (_TRUNCATE & handled)
        rule = _Beneath(allowed, opened)
        done = libc.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(opened)
        if done:
            return False
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return bool(libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)) == 0)


def shut_python(folder: str) -> None:
    """Forbid Python's own ways to the network, to other processes and to files outside a folder.

    It stops accidents, and is all there is where the kernel helps with nothing; a program that means harm gets past.

    Args:
        folder: The folder.
    """
    inside = os.path.realpath(folder)  # noqa: PTH118 - pathlib is more to import in every process

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes):
            return False
        found = os.path.realpath(os.fsdecode(path))  # noqa: PTH118
        return found != "/dev/null" and os.path.commonpath([found, inside]) != inside

    def refuse(event: str, given: tuple[object, ...]) -> None:
        writes = event == "open" and given and _is_write(given)
        if event.startswith(_FORBIDDEN) or ((writes or event.startswith(_CHANGES)) and outside(given[0])):
            raise PermissionError(f"{event} is not allowed to a generated program")

    sys.addaudithook(refuse)


def _is_write(given: tuple[object, ...]) -> bool:
    mode, flags = given[1], given[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


def main() -> None:
    """Run what is given."""
    given = json.loads(sys.stdin.buffer.read())
    report = int(sys.argv[1])
    program = compile_or_say(given["program"], report)
    files = shut_files(given["folder"])
    limit(given["memory"], given["seconds"], given["size"])
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - the program's, to its end
    sys.argv = ["program"]
    os.environ.clear()  # of what Python itself put there
    shut_python(given["folder"])
    word = given["word"]
    del given
    try:
        exec(program, {"__name__": "__main__"})  # what this process is for
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are failures too
        _say(report, {"error": f"{type(error).__name__}: {error}"[:300], "files": files})
        return
    _say(report, {"word": word, "files": files})


def compile_or_say(text: str, report: int) -> types.CodeType:
    """Compile a program, or report that it is none.

    Args:
        text: The program.
        report: Where to.

    Returns:
        The code.
    """
    try:
        return compile(text, "program", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        _say(report, {"error": f"{type(error).__name__}: {error}"[:300], "files": None})
        os._exit(0)


def _say(report: int, what: dict[str, object]) -> None:
    os.write(report, json.dumps(what).encode())


if __name__ == "__main__":
    main()
    os._exit(0)  # threads and exit handlers of the program have no say
