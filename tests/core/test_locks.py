"""A lock is one process's at a time, and nobody's when that process is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.models import full_disk

from keeptune.core.errors import ArtefactError
from keeptune.core.locks import locked, owned

HOLDER = """
import sys
from pathlib import Path
from keeptune.core.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with locked(path, wait=False) as ours:
            assert not ours
        other.kill()
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


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    holder = HOLDER.replace("locked", "owned")
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ArtefactError, match=f"another keeptune writes to .process {other.pid} on "), owned(folder):
            pass
        other.kill()
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
