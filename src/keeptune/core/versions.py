"""The versions of what keeptune runs on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("keeptune", "torch", "transformers", "peft", "trl")


def versions() -> dict[str, str]:
    """Returns the versions of Python, of installed packages, of the platform, and keeptune's commit in a repository."""
    known = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).parent)
    return known | ({"git commit": commit} if commit else {}) | {"platform": platform.platform()}


def _commit(folder: Path) -> str:
    """Returns the commit of the repository that tracks a folder, not of one that only surrounds it."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
        return _git(folder, "rev-parse", "HEAD") + (" (with changes)" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
