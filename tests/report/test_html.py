"""The page is one well-formed file without outside references."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from keeptune.core.errors import ArtefactError
from keeptune.report.html import render_html, write_html


def parsed(text: str) -> ElementTree.Element:
    """Parse a page strictly.

    Args:
        text: The page.

    Returns:
        Its root.
    """
    return ElementTree.XML(text.replace("<!DOCTYPE html>", ""))


def headings(text: str) -> list[str]:
    """List the second-level headings of a page.

    Args:
        text: The page.

    Returns:
        The headings.
    """
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_full_page(page: str) -> None:
    text = page
    assert text.startswith("<!DOCTYPE html>")
    assert headings(text) == [
        "Learned against kept",
        "Forgetting by benchmark",
        "Forgetting by relation",
        "Training loss",
        "Plan: ranks",
        "Plan: evidence",
        "Details",
        "How to read this",
    ]
    assert "lora-null-v1 uses rank 8 everywhere." in text
    # Both methods with a plan have the same spectra, which are drawn once.
    assert text.count("<figcaption>Spectrum: lora-null-v1 and milora</figcaption>") == 1


def test_page_is_well_formed_with_unique_ids(page: str) -> None:
    root = parsed(page)
    ids = [item.get("id") for item in root.iter() if item.get("id")]
    assert len(ids) == len(set(ids))
    assert ids


def test_references_inside_the_page_resolve(page: str) -> None:
    text = page
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert used
    assert used <= ids


def test_nothing_from_outside(page: str) -> None:
    text = page
    assert not re.search(r'(?:src|href)="(?!#|data:image/png;base64,)', text)
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_minimal_page(minimal: dict[str, Any]) -> None:
    text = render_html(minimal)
    parsed(text)
    assert headings(text) == ["Forgetting by benchmark", "Details", "How to read this"]
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
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<i>" not in text and "<u>" not in text


def test_bytes_repeat(full: dict[str, Any], page: str, tmp_path: Path) -> None:
    write_html(json.loads(json.dumps(full)), tmp_path / "one.html")
    assert (tmp_path / "one.html").read_text(encoding="utf-8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["one.html"]


def test_unwritable_path_is_an_artefact_error(minimal: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="absent"):
        write_html(minimal, tmp_path / "absent" / "report.html")


def test_malformed_report_leaves_the_old_file(minimal: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    del minimal["methods"][0]["adapter"]
    with pytest.raises(ArtefactError, match='"adapter"'):
        write_html(minimal, path)
    assert path.read_text() == "old"
