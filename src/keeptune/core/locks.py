"""Locks between processes."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from keeptune.core.artefact import explain_full_disk, remove_leftovers
from keeptune.core.errors import ArtefactError

_OWNER = ".owner"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file, which is made; the system releases it when the process ends, however it ends.

    Only who holds it may remove the file: who waited for the one that is gone then locks the next.

    Yields:
        True while it is held; False where another process holds it and ``wait`` is not set.
    """
    import fcntl  # not on Windows, where nothing else of keeptune needs it

    with contextlib.ExitStack() as opened:
        held = False
        while not held:
            with explain_full_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context(path.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            with contextlib.suppress(FileNotFoundError):
                held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        yield held


@contextlib.contextmanager
def owned(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder for this process, without what killed writes left; it is free when the process ends, however.

    Raises:
        ArtefactError: Another process holds it and ``wait`` is not set, or it cannot be made.
    """
    path, now = folder / _OWNER, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with locked(path, wait=wait) as ours:
        if not ours:
            holder = "that is ending"
            with contextlib.suppress(FileNotFoundError):
                holder = path.read_text(encoding="utf-8") or "that is starting"
            raise ArtefactError(
                str(folder),
                got=f"a folder that another keeptune writes to ({holder})",
                wanted="one writer at a time",
                next_step="Wait for it to end, or choose another output.",
            )
        with explain_full_disk(path):
            path.write_text(f"process {os.getpid()} on {platform.node()} since {now}", encoding="utf-8")
        try:
            remove_leftovers(folder)
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # an error left nothing in it: neither does the lock
