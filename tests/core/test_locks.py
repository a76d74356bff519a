"""A lock is one process's at a time, and nobody's when that process is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.forks import Forks
from tests.models import full_disk

from keeptune.core.errors import ArtefactError
from keeptune.core.locks import locked, owned


def hold(how: str, path: str) -> None:
    """Holds a lock until it is killed."""
    with {"locked": locked, "owned": owned}[how](Path(path)):
        print("held", flush=True)
        signal.pause()


@contextmanager
def another(forks: Forks, how: str, path: Path, out: Path) -> Iterator[int]:
    """A process that holds a lock, by its number."""
    pid = forks.call(hold, how, path, out=out)
    while not out.exists() or out.read_text(encoding="utf-8") != "held\n":
        assert forks.code(pid) is None
        time.sleep(0.01)
    yield pid
    os.kill(pid, signal.SIGKILL)
    assert forks.wait(pid) == -signal.SIGKILL


def test_a_lock_is_held_by_one_process_and_ends_with_it(forks: Forks, tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with another(forks, "locked", path, tmp_path / "said"), locked(path, wait=False) as ours:
        assert not ours
    with locked(path) as ours:
        assert ours
    with locked(path, wait=False) as ours:
        assert ours, "it was let go of"


def test_a_removed_lock_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        path.unlink()
        with locked(path, wait=False) as other:
            assert other
            with locked(path, wait=False) as third:
                assert not third


def test_a_folder_has_one_writer(forks: Forks, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with (
        another(forks, "owned", folder, tmp_path / "said") as pid,
        pytest.raises(ArtefactError, match=f"another keeptune writes to .process {pid} on "),
        owned(folder),
    ):
        pass
    with owned(folder):
        assert [path.name for path in folder.iterdir()] == [".owner"]
    assert not folder.exists(), "nothing was written"
    with owned(folder):
        (folder / "plan").mkdir()
    assert [path.name for path in folder.iterdir()] == ["plan"]


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", full_disk)
    with pytest.raises(ArtefactError, match="No space left"), locked(tmp_path / "lock"):
        pass
