"""A clone stands alone: nothing in it names what lies beside it, and its data are few and have their sources."""

from __future__ import annotations

import re
from pathlib import Path

from tests.assets import ASSETS, DATA

ROOT = Path(__file__).parents[2]
HERE = ("assets", "benchmarks", "docs", "examples", "recipes", "src", "studies", "tests", ".ci")
BESIDE = re.compile(rb"\.\./shared|shared[/\\]data|shared[/\\]models|/ ?.shared.")


def test_no_file_names_a_folder_beside_the_clone() -> None:
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for name in HERE for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".pyc" and path != Path(__file__)]
    assert [str(path.relative_to(ROOT)) for path in files if BESIDE.search(path.read_bytes())] == []


def test_data_are_small_and_each_file_has_a_source() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    text = (ASSETS / "SOURCE.md").read_text(encoding="utf-8")
    named = {
        f"{folder}{part}{end}"
        for folder, parts, end in re.findall(r"`([\w/.-]+)\{([\w,]+)\}([\w.]+)`", text)
        for part in parts.split(",")
    } | set(re.findall(r"`([\w/-]+/[\w.-]+\.jsonl)`", text))
    assert {str(path.relative_to(DATA)) for path in files} <= named
