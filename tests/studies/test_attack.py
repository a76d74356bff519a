"""What the attacks take for a failure: their laws do fail where something is wrong, and tries are kept as they come."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from studies import attack
from studies.attack_kills import moment
from studies.attack_runs import Ended, Limits, differences, leftovers, told
from studies.attack_texts import MARK, PAYLOADS, injected

FILES = {
    "out/adapter/adapter_model.safetensors": "weights",
    "out/evaluation/facts.json": '{"after": 0.5, "seconds": 1.0}',
    "out/report.json": '{"created": "2026-01-01"}',
    "out/report.html": "<html>2026-01-01</html>",
}


def changed(name: str, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return change


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        changed(f"whole/{name}", text)(tmp_path)
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("out/evaluation/facts.json", '{"after": 0.5, "seconds": 2.5}'), []),
        (changed("out/evaluation/facts.json", '{"after": 0.6, "seconds": 1.0}'), ["out/evaluation/facts.json: other"]),
        (changed("out/adapter/adapter_model.safetensors", "weightt"), ["out/adapter/adapter_model.safetensors: other"]),
        (lambda folder: (folder / "out/report.json").unlink(), ["report.json: missing", "report.html: not whole"]),
        (changed("out/.report.json.0123abcd", "{"), ["out/.report.json.0123abcd: left over"]),
        (changed("store/01/.02.0123abcd/value.safetensors", ""), ["value.safetensors: left over"]),
        (changed("out/report.html", "<html>2026-01-01"), ["report.html: not whole"]),
        (changed("out/report.html", "<html>2025-12-31</html>"), ["report.html: not whole, or not of its record"]),
    ],
)
def test_what_differs_from_the_run_that_nobody_attacked_is_found(
    reference: Path, tmp_path: Path, change: Callable[[Path], object], said: list[str]
) -> None:
    found = Path(shutil.copytree(reference, tmp_path / "found"))
    change(found)
    problems = differences(found, reference)
    assert len(problems) == len(said)
    assert all(part in problem for part, problem in zip(said, problems, strict=True))
    assert bool(leftovers(found)) == any("left over" in part for part in said)


@pytest.mark.parametrize("code", [0, 1, -9])
@pytest.mark.parametrize("said", ["error: a: got b, wanted c. Do d.", "Traceback (most recent call last)", ""])
def test_a_refusal_is_one_message_and_its_exit_code(code: int, said: str) -> None:
    assert told(Ended(code, said, 0, 0, 0))
    assert bool(told(Ended(2, said, 0, 0, 0))) == (not said.startswith("error: "))


def test_what_a_browser_would_run_is_found() -> None:
    raw = [f"<p>{text}</p><textarea>" for text in PAYLOADS[:3]]
    assert all(injected(text) for text in raw)
    assert not any(injected(text.replace("<", "&lt;").replace(">", "&gt;")) for text in raw)
    assert not injected(f'<script type="application/json">{{"text": "{MARK}()"}}</script>')


def test_tries_are_recorded_at_once_and_made_once(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    row = attack.attempt("YAML", 5, 0, tmp_path, attack.ATTACKS)
    assert row["held"], row

    def broken(number: int, seed: int, work: Path) -> attack.attack_kills.Found:
        raise OSError("gone") if number else ValueError

    attacks = {"YAML": attack.ATTACKS["YAML"], "broken": attack.Attack(broken, 2, "a law")}
    attack.attempt("broken", 1, 0, tmp_path, attacks)
    assert list(attack.attempts(tmp_path, "YAML", 0)) == [5] and not attack.attempts(tmp_path, "YAML", 1)
    record = attack.summary(tmp_path, 0, attacks)
    assert [(found["tries"], found["held"]) for found in record["attacks"].values()] == [(1, 1), (1, 0)]
    assert "--numbers 1" in record["attacks"]["broken"]["failures"][0]["reproduce"]
    page = attack.page(record)
    assert "| broken | 1 of 2 | 0 |" in page and "- broken, 1: `the attack itself: OSError: gone`" in page


def test_moments_are_drawn_over_the_whole_course() -> None:
    import random

    drawn, of = random.Random(0), Ended(0, "", 2.0, 50, 0)
    moments = [moment(drawn, of, 1) for _ in range(200)]
    changes = [one.change for one in moments if one.change is not None]
    times = [one.cpu for one in moments if one.cpu is not None]
    assert min(changes) <= 3 and max(changes) >= 48 and min(times) < 0.1 and max(times) > 1.9
    assert isinstance(moments[0], Limits) and len(changes) > 70 and len(times) > 70
