"""What the site needs beside the pages: links out of docs/, the reference, and Markdown as GitHub reads it."""

from __future__ import annotations

import ast
import fnmatch
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
SOURCE = "source/"  # where the site has files that lie beside docs/
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in `folder/*.md` in the navigation, and end it with the pages that it does not name."""
    named = set(_named(config.nav))
    pages = [path.relative_to(ROOT / DOCS).as_posix() for path in sorted((ROOT / DOCS).rglob("*.md"))]
    left = [page for page in pages if page not in named]

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {title: filled(below) for title, below in part.items()}
        if isinstance(part, list):
            return [one for below in part for one in (filled(below) if _is_pattern(below) else [filled(below)])]
        return fnmatch.filter(left, part) if _is_pattern(part) else part

    config.nav = filled(config.nav)
    shown = set(_named(config.nav))
    if more := [page for page in pages if page not in shown]:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and what pages link to outside of docs/."""
    files.append(File.generated(config, "reference.md", content=_reference()))
    waiting, seen = list((ROOT / DOCS).rglob("*.md")), set()
    while waiting:
        page = waiting.pop()
        for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = _target(page.relative_to(ROOT).as_posix(), link)
            if target.startswith(DOCS) or target in seen or not (ROOT / target).is_file():
                continue
            seen.add(target)
            files.append(File.generated(config, SOURCE + target, abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append(ROOT / target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to where the site has their files, and set lists and tables apart as GitHub does."""
    uri = page.file.src_uri
    if uri == "reference.md":
        return markdown
    own = uri.removeprefix(SOURCE) if uri.startswith(SOURCE) else DOCS + uri

    def placed(match: re.Match[str]) -> str:
        target = _target(own, match[1])
        there = target.removeprefix(DOCS) if target.startswith(DOCS) else SOURCE + target
        return posixpath.relpath(there, posixpath.dirname(uri) or ".")

    parts = _FENCE.split(markdown)
    parts[::2] = [_set_apart(_LINK.sub(placed, part)) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the roles off names in docstrings, `:class:` and the like."""
    return re.sub(r":(?:class|func|meth|mod):(?=<code>)", "", html)


def _named(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for below in part.values() if isinstance(part, dict) else part:
            yield from _named(below)


def _is_pattern(part: Any) -> bool:
    return isinstance(part, str) and "*" in part


def _target(page: str, link: str) -> str:
    """Return what a link of a page leads to, from the root; of a folder its README."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return f"{target}/README.md" if (ROOT / target).is_dir() else target


def _set_apart(text: str) -> str:
    lines: list[str] = []
    for line in text.split("\n"):
        before = lines[-1] if lines else ""
        starts = re.match(r"(- |\* |\d+\. )", line) and not re.match(r"( |- |\* |\d+\. )", before)
        table = line.startswith("|") and not before.startswith("|")
        lines += ["", line] if before and (starts or table) else [line]
    return "\n".join(lines)


def _reference() -> str:
    """Return the page of the public names: `__init__.pyi` says where each is."""
    stub = ast.parse((ROOT / "src/keeptune/__init__.pyi").read_text(encoding="utf-8"))
    places = {
        alias.asname or alias.name: f"keeptune.{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    intro = "# Reference\n\nThe names under `keeptune.`. Methods, penalties and losses have pages of their own."
    return "\n\n".join([intro, *(f"::: {place}" for _, place in sorted(places.items()))])
