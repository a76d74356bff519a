"""The page is one well-formed file without outside references."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from keeptune.core.errors import ArtefactError
from keeptune.report.pages.run_page import render_html, write_html


def parsed(text: str) -> ElementTree.Element:
    """Parse a page strictly, but for its scripts."""
    return ElementTree.XML(without_scripts(text).replace("<!DOCTYPE html>", ""))


def without_scripts(text: str) -> str:
    """Empty the script elements of a page."""
    return re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", text, flags=re.DOTALL)


def island(text: str) -> dict[str, Any]:
    """Read the data of a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def headings(text: str) -> list[str]:
    """List the second-level headings of a page."""
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


def test_full_page(page: str) -> None:
    text = page
    assert text.startswith("<!DOCTYPE html>")
    assert headings(text) == [
        "Change by benchmark",
        "Learned against kept",
        "Forgetting by relation",
        "Training loss",
        "Plan: ranks",
        "Plan: evidence",
        "Details",
        "How to read this",
    ]
    # Both methods with a plan have the same spectra, which are drawn once.
    assert text.count("<figcaption>Spectrum: lora-null-v1 and milora</figcaption>") == 1


def test_page_is_well_formed_with_unique_ids(page: str) -> None:
    root = parsed(page)
    ids = [item.get("id") for item in root.iter() if item.get("id")]
    assert len(ids) == len(set(ids))
    assert ids


def test_nothing_from_outside(page: str) -> None:
    text = without_scripts(page)
    assert not re.search(r'(?:src|href)="(?!#|data:image/png;base64,)', text)
    assert text.count("<script") == 3, "plotly.js, the page's own script and its data"
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_policy_allows_the_page_s_own_scripts_and_no_request(page: str) -> None:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found is not None
    policy = found[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy and "http" not in policy and "unsafe-eval" not in policy
    for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_minimal_page(minimal: dict[str, Any]) -> None:
    text = render_html(minimal)
    parsed(text)
    assert headings(text) == ["Change by benchmark", "Details", "How to read this"]
    assert "trained with one seed" in text


def test_page_without_runs(minimal: dict[str, Any]) -> None:
    minimal["methods"] = []
    text = render_html(minimal)
    parsed(text)
    assert headings(text) == ["How to read this"]


def test_names_are_escaped(full: dict[str, Any]) -> None:
    for run in full["methods"][:2]:
        run["name"] = "<script>alert(1)</script>"
        run["options"] = {"<i>": "<b>"}
    full["base"] = "/models/<u>"
    text = render_html(full)
    parsed(text)
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    assert "<i>" not in text and "<u>" not in text
    hovered = [trace["hovertext"] for trace in island(text)["figures"]["tradeoff"]["data"]]
    assert any("&lt;i&gt;: &lt;b&gt;" in words for texts in hovered for words in texts), "plotly.js reads markup"


def test_bytes_repeat(full: dict[str, Any], page: str, tmp_path: Path) -> None:
    write_html(json.loads(json.dumps(full)), tmp_path / "one.html")
    assert (tmp_path / "one.html").read_text(encoding="utf-8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["one.html"]


def test_unwritable_path_is_an_artefact_error(minimal: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ArtefactError, match="report.html"):
        write_html(minimal, tmp_path / "report.html")


def test_malformed_report_leaves_the_old_file(minimal: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    del minimal["methods"][0]["adapter"]
    with pytest.raises(ArtefactError, match="adapter: got nothing"):
        write_html(minimal, path)
    assert path.read_text() == "old"
