"""The house rules that a linter does not hold: where modules lie, what they are called, and how large they may be."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/keeptune"
FILES = [path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
# A base class in each package of plugins; a command, or a stage, named as what it does.
SHARED = {"base", "export", "repair"}


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - function.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)


def test_one_module_lies_at_the_root() -> None:
    assert {path.name for path in SOURCE.glob("[a-z]*.py")} == {"api.py"}


def test_no_base_name_stands_in_two_folders() -> None:
    names = Counter(path.stem for path in FILES)
    assert {name for name, count in names.items() if count > 1} <= SHARED


def test_files_and_functions_are_small() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert not {path.name: count for path, count in lines.items() if count >= 400}
    functions = [node for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    assert not [f.name for f in functions if isinstance(f, ast.FunctionDef) and body_lines(f) > 60]
    assert sum(lines.values()) <= 38_000
