"""The wheel: built from the sources alone, whole, and of use where nothing else of the clone is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]


def do(*words: object, at: Path) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=at, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of the source distribution, as it would be for an index."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    do(sys.executable, "-m", "build", "--no-isolation", at=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    package = ROOT / "src/keeptune"
    ours = {str(path.relative_to(ROOT / "src")) for path in package.rglob("*") if path.is_file()}
    with ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert held == {name for name in ours if "__pycache__" not in name}


def test_an_index_would_take_it(wheel: Path) -> None:
    said = do(sys.executable, "-m", "twine", "check", "--strict", *wheel.parent.iterdir(), at=wheel.parent)
    assert said.count("PASSED") == 2


def test_its_metadata_say_what_is_needed_for_what(wheel: Path) -> None:
    with ZipFile(wheel) as opened:
        (place,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        about: Message = Parser().parsestr(opened.read(place).decode())
    assert (about["Name"], about["License-Expression"]) == ("keeptune", "Apache-2.0")
    assert {"quantised", "benchmarks", "compare", "serve", "all"} <= set(about.get_all("Provides-Extra"))
    needed = about.get_all("Requires-Dist")
    core = {re.match(r"[\w-]+", need)[0] for need in needed if "extra ==" not in need}
    assert core.isdisjoint({"ray", "lm-eval", "bitsandbytes", "gguf", "xllamacpp", "mkdocs-material"})
    assert [need for need in needed if need.startswith("torch")] == [
        "torch>=2.9"
    ]  # the build is that of the user's index


def test_it_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    do(sys.executable, "-m", "venv", "--without-pip", fresh, at=tmp_path)
    python = fresh / "bin/python"
    do(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, at=tmp_path)
    (packages,) = fresh.glob("lib/*/site-packages")
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # the libraries, not our .pth
    where = do(python, "-c", "import keeptune; print(keeptune.__file__)", at=tmp_path)
    assert Path(where.strip()).is_relative_to(fresh)
    shares = json.loads(do(fresh / "bin/keeptune", "energy", "atlas", "--json", at=tmp_path))
    assert shares["rows"]
