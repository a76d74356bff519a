"""Write docs/methods/*.md and docs/penalties/*.md from the code's own docstrings; text below the marker is kept.

recipes/PUBLISHED.md is written from the recipes of the papers' tables, docs/architecture.md from the modules'
docstrings; text above their markers is kept.

`python docs/generate.py` writes, `python docs/generate.py --check` fails when a page is out of date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path

from keeptune.methods.base import methods
from keeptune.penalties.base import penalties
from keeptune.recipe.reading import parse_yaml

MARKER = "<!-- written by hand below this line -->"
TABLES = "<!-- written by docs/generate.py from recipes/ below this line -->"
DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "recipes"
SOURCE = DOCS.parent / "src" / "keeptune"
MODULES = "<!-- written by docs/generate.py from the modules' docstrings below this line -->"


def page(cls: type, old: str, example: str = "method: {{{}}}") -> str:
    """Write the page of one method or penalty.

    Args:
        cls: The method or the penalty.
        old: The page as it is; what stands below the marker is kept.
        example: How a recipe names it.

    Returns:
        The page.
    """
    module = inspect.getmodule(cls)
    assert module is not None
    notes = old.partition(MARKER)[2].strip()
    told = _told(cls)
    options = [
        f"| `{field.name}` | `{_yaml(field.default)}` | {told[field.name]} |" for field in dataclasses.fields(cls)
    ]
    recipe = ", ".join([f"name: {cls.name}", *(f"{f.name}: {_yaml(f.default)}" for f in dataclasses.fields(cls))])
    parts = [
        f"# `{cls.name}`",
        "```text\n" + inspect.getdoc(module).strip() + "\n```",
        "## Options",
        "| option | default | |\n| --- | --- | --- |\n" + "\n".join(options) if options else "None.",
        "```yaml\n" + example.format(recipe) + "\n```",
        f"Source: `src/{module.__name__.replace('.', '/')}.py`",
        MARKER,
    ]
    return "\n\n".join(parts) + "\n" + (f"\n{notes}\n" if notes else "")


def _told(cls: type) -> dict[str, str]:
    """Read what the docstrings of the class and of its bases tell of each option."""
    told: dict[str, str] = {}
    for base in reversed(inspect.getmro(cls)[:-1]):
        text = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        entries = re.split(r"\n(?=    \w+: )", "\n" + text)
        pairs = [entry.strip().partition(": ") for entry in entries if entry.strip()]
        told |= {name: " ".join(words.split()).replace("``", "`") for name, _, words in pairs}
    return told


def _yaml(value: object) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return f"{{{', '.join(f'{name}: {_yaml(part)}' for name, part in fields)}}}"
    words = {"None": "null", "True": "true", "False": "false"}
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return words.get(text, text)


def tables(old: str) -> str:
    """Write the page of the papers' tables from the recipes that stand for them.

    Args:
        old: The page as it is; what stands above the marker is kept.

    Returns:
        The page.
    """
    head = old.partition(TABLES)[0].rstrip()
    return "\n\n".join([head, TABLES, *map(_table, sorted(RECIPES.glob("*-table*.yaml"), key=_place))]) + "\n"


def _place(path: Path) -> tuple[str, int, str]:
    paper, _, rest = path.stem.partition("-table")
    number, _, part = rest.partition("-")
    return paper, int(number), part


def _table(path: Path) -> str:
    values = parse_yaml(path.read_text(encoding="utf-8"))
    told = values["published"]
    columns = {"": "method", **{name: name for row in told["rows"] for name in row.get("scores", {})}}
    others = dict.fromkeys(name for row in told["rows"] for name in row.get("others", {}))
    heads = [*columns.values(), *(f"*{name}*" for name in others)]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in told["rows"]:
        name = row["method"] + (f" ({row['parameters']})" if "parameters" in row else "")
        cells = [row.get("scores", {}).get(column) for column in list(columns)[1:]]
        cells += [row.get("others", {}).get(column) for column in others]
        lines.append(f"| {' | '.join([name, *('' if cell is None else f'{cell:g}' for cell in cells)])} |")
    parts = [
        f"## {told['source']}",
        f"`recipes/{path.name}`: {values['model']}, "
        + (
            f"{len(values['compare']['methods'])} methods" if "compare" in values else f"{len(values['stages'])} stages"
        ),
        "\n".join(lines),
    ]
    for key, title in (("differs", "What differs:"), ("unknown", "What could not be known:")):
        if told.get(key):
            parts.append("\n".join([title, *(f"- {note}" for note in told[key])]))
    return "\n\n".join(parts)


def tree(old: str) -> str:
    """Write the page of the architecture from the first line of every module.

    Args:
        old: The page as it is; what stands above the marker is kept.

    Returns:
        The page.
    """
    parts = [old.partition(MODULES)[0].rstrip(), MODULES]
    for folder in sorted(path.parent for path in SOURCE.rglob("__init__.py")):
        name = folder.relative_to(SOURCE.parent).as_posix()
        rows = [f"| `{path.name}` | {_headline(path)} |" for path in sorted(folder.glob("[!_]*.py"))]
        parts.append(f"### `{name}/`\n\n{_headline(folder / '__init__.py')}")
        if rows:
            parts[-1] += "\n\n| file | |\n| --- | --- |\n" + "\n".join(rows)
    return "\n\n".join(parts) + "\n"


def _headline(path: Path) -> str:
    """Read a module's first line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")


def main() -> None:
    """Write or check every page."""
    stale = []
    for path, write in ((RECIPES / "PUBLISHED.md", tables), (DOCS / "architecture.md", tree)):
        written = path.read_text(encoding="utf-8")
        if write(written) != written:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(write(written), encoding="utf-8")
    pages = [("methods", cls, "method: {{{}}}") for cls in methods().values()]
    pages += [("penalties", cls, "penalties: [{{{}}}]") for cls in penalties().values()]
    for folder, cls, example in pages:
        path = DOCS / folder / f"{cls.name}.md"
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = page(cls, old, example)
        if new != old:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(map(str, stale))}; run `python docs/generate.py`")


if __name__ == "__main__":
    main()
