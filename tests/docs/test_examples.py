"""The examples, with fewer steps, print what they promise and leave the files they name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., str]

pytestmark = pytest.mark.filterwarnings("default")  # as where the examples are started from the command line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Returns a function that runs an example in this process, in a folder of its own, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run_example(name: str, steps: int) -> str:
        importlib.import_module(name).main(Path("out"), steps=steps)
        return capsys.readouterr().out

    verbosity = logging.get_verbosity()
    yield run_example
    logging.set_verbosity(verbosity)


def losses(out: str, name: str) -> tuple[float, float]:
    """Before and after, of a line ``name: before -> after``."""
    found = re.search(rf"{name}: (\d\.\d+) -> (\d\.\d+)", out)
    assert found is not None, out
    return float(found[1]), float(found[2])


def test_python_api(run: Run) -> None:
    assert re.search(r"facts: 0\.9\d\d -> 0\.\d+", run("python_api", 5))


def test_farss(run: Run) -> None:
    out = run("farss", 5)
    assert "7 targets in blocks below 1 are shallow: 30 of 42 ranks" in out
    assert sum(int(rank) for rank in re.findall(r"importance \S+, rank (\d+)", out)) == 30
    assert re.search(r"facts: 0\.9\d\d -> 0\.\d+", out)


def test_stories260k(run: Run) -> None:
    out = run("stories260k", 8)
    before, after = losses(out, "problems")
    assert after < before - 0.3, "the task is learned"
    assert 1.0 < losses(out, "stories")[0] < 1.5, "the base knows its stories"


def test_own_trainer(run: Run) -> None:
    out = run("own_trainer", 2)
    assert re.search(r"dora: loss \d+\.\d+, penalty 0\.0000\n", out)
    assert re.search(r"dora: merged, gap \de[-+]0\d\. New lengths for a weight's rows", out)
    assert re.search(r"dora: peft of rank 8, gap \de[-+]0\d\n", out)
    assert re.search(r"l2-lora: loss \d+\.\d+, penalty 0\.\d*[1-9]\d*\n", out)
    assert re.search(r"l2-lora: portable, gap \de[-+]0\d\. To serve: .*--max-lora-rank 8 ", out)


def test_encoder(run: Run) -> None:
    out = run("encoder", 4)
    assert re.search(r"lora, relations-accuracy: 0\.\d\d\d -> 0\.\d\d\d, change \[[+-]", out)
    assert re.search(r"lora-null, relations-matthews: -?0\.\d\d\d -> -?0\.\d\d\d", out)
    assert "AutoModelForSequenceClassification.from_pretrained(" in out
    assert Path("out/report.html").is_file()


def test_starting_points(run: Run) -> None:
    out = run("starting_points", 6)
    for name in ("milora", "corda"):
        before, after = losses(out.replace(": loss ", ": "), name)
        assert after < before - 0.1, "the task is learned"
        assert Path(f"out/{name}/adapter_model.safetensors").is_file()


def test_penalty_loop(run: Run) -> None:
    found = re.findall(r"step \d+: loss (\d\.\d+), penalty (\d\.\d+)", run("penalty_loop", 10))
    assert len(found) == 2
    assert float(found[1][0]) < float(found[0][0]), "the task is learned"
    assert float(found[1][1]) > 0
    assert Path("out/adapter/adapter_model.safetensors").is_file()


@pytest.mark.real
def test_conversations_teach_a_habit(
    smollm2_short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    chat = importlib.import_module("chat")
    chat.main(tmp_path, str(smollm2_short), steps=1, items=2, methods={"lora": chat.METHODS["lora"]})
    out = capsys.readouterr().out
    assert re.search(
        r"lora: numbers 0\.00 -> \d\.\d\d, arc_easy \d\.\d\d -> \d\.\d\d, c4 \d+\.\d\d -> \d+\.\d\d", out
    ), out
    assert "How many are there?" in (tmp_path / "report.html").read_text(encoding="utf-8")
