"""A lock is one process's at a time, and nobody's when that process is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.models import full_disk

from keeptune.core.errors import ArtefactError
from keeptune.core.locks import locked

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


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", full_disk)
    with pytest.raises(ArtefactError, match="No space left"), locked(tmp_path / "lock"):
        pass
