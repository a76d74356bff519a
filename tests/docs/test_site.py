"""The documentation as a site: it builds strictly, every page is in its navigation, and every link in it leads on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


class Links(HTMLParser):
    """What a page links to, and the names in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        if target := found.get("src" if tag in ("img", "script") else "href"):
            self.links.append(target)


def broken(site: Path) -> list[tuple[str, str]]:
    """Returns the links of a folder of pages that lead nowhere in it, each with its page."""
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    wrong = []
    for page, held in pages.items():
        for link in held.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].names if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known | {"__skip"}):
                wrong.append((str(page.relative_to(site)), link))
    return wrong


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_link_leads_on(site: Path, tmp_path: Path) -> None:
    assert broken(site) == []
    (tmp_path / "index.html").write_text('<a href="gone/">x</a><a href="#gone">y</a><a id="here" href="#here">z</a>')
    assert broken(tmp_path) == [("index.html", "gone/"), ("index.html", "#gone")]  # the control


def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = site / "index.html"
    linked = {(start.parent / urlsplit(link).path).resolve() for link in Links(start).links}
    pages = {site / path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    pages = {page.parent if page.name == "README" else page for page in pages} | {site / "reference"}
    assert pages <= linked


def test_the_reference_has_every_public_name(site: Path) -> None:
    import keeptune

    html = (site / "reference/index.html").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r'<h2 id="(keeptune\.[\w.]+)"', html)}
    assert shown == set(dir(keeptune))
    assert ":class:" not in html
