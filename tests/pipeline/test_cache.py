"""A stored result is taken under its key while it is whole, and else computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keeptune.pipeline.cache import Stored, take

FILE = "items.txt"


@pytest.fixture
def compute(tmp_path: Path) -> tuple[list[int], Callable[[], dict[str, Any]]]:
    calls: list[int] = []

    def score() -> dict[str, Any]:
        calls.append(len(calls))
        (tmp_path / FILE).write_text("items", encoding="utf-8")
        return {"score": (1.5, len(calls))}

    return calls, score


def test_a_result_is_computed_once_per_key(tmp_path: Path, compute: Any) -> None:
    calls, score = compute
    stored = Stored("score", tmp_path / "record.json", "a")
    assert stored.read() is None
    first = stored.get(score, files=[FILE])
    assert first["score"] == [1.5, 1], "as it is read, not as it was computed"
    assert stored.get(score, files=[FILE]) == stored.read() == first
    assert len(calls) == 1
    assert Stored("score", tmp_path / "record.json", "b").get(score, files=[FILE])["score"] == [1.5, 2]


@pytest.mark.parametrize("damaged", ["record.json", FILE])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_damaged_result_is_computed_again(
    tmp_path: Path, compute: Any, damaged: str, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    calls, score = compute
    stored = Stored("score", tmp_path / "record.json", "a")
    stored.get(score, files=[FILE])
    if content is None:
        (tmp_path / damaged).unlink()
    else:
        (tmp_path / damaged).write_text(content, encoding="utf-8")
    assert stored.get(score, files=[FILE])["score"] == [1.5, 2]
    assert len(calls) == 2
    assert ("is damaged" in caplog.text) == ((damaged, content) != ("record.json", None))


def test_a_reader_of_its_own(tmp_path: Path) -> None:
    assert take("value", tmp_path / "missing", "a", lambda: ("a", 1)) is None
    assert take("value", tmp_path, "a", lambda: ("a", 1)) == 1
    assert take("value", tmp_path, "b", lambda: ("a", 1)) is None
