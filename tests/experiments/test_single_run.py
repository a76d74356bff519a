"""One run of a comparison: its log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from keeptune.experiments.single_run import _held


def test_a_bug_leaves_no_log_handlers_and_its_warnings_are_kept(tmp_path: Path) -> None:
    logger = logging.getLogger("keeptune")
    before, level, warned = list(logger.handlers), logger.level, list[str]()
    with pytest.raises(ZeroDivisionError), _held(tmp_path, warned):
        logger.warning("almost out of memory")
        logger.info("logged in as https://me:%s@host", "pass-word")
        raise ZeroDivisionError
    assert (logger.handlers, logger.level) == (before, level)
    assert warned == ["almost out of memory"]
    written = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "almost out of memory" in written
    assert "https://***@host" in written
