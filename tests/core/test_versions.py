"""The versions of what keeptune runs on, and its commit."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from keeptune.core.versions import _commit, versions


def test_versions_are_those_installed() -> None:
    known = versions()
    assert known["torch"] == version("torch")
    assert torch.__version__.startswith(known["torch"])  # of a CUDA build +cu130 is in the module alone
    assert {"python", "transformers", "peft", "trl", "keeptune", "platform"} <= set(known)


def test_a_commit_is_told_only_where_the_code_is_tracked(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        flags = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *flags, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "src" / "report"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert _commit(package) == ""
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert _commit(package) == "", "an environment inside someone's repository"
    git("add", ".")
    git("commit", "-q", "-m", "y")
    assert _commit(package) == git("rev-parse", "HEAD").strip()
    (package / "__init__.py").write_text("1")
    assert _commit(package).endswith(" (with changes)")
