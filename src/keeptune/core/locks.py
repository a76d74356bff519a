"""Locks between processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from keeptune.core.artefact import explain_full_disk


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file, which is made; the system releases it when the process ends, however it ends.

    The file stays: removing it would let a third process lock another file of the same name.

    Yields:
        True while it is held; False where another process holds it and ``wait`` is not set.
    """
    import fcntl  # not on Windows, where nothing else of keeptune needs it

    with contextlib.ExitStack() as opened:
        with explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(path.open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
