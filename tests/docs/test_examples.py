"""The examples run from the command line and say what they found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder: Path, code: str) -> str:
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); {code}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_python_api(tmp_path: Path) -> None:
    out = run(tmp_path, "import python_api, pathlib; python_api.main(pathlib.Path('out'), steps=5)")
    assert re.search(r"facts: 0\.9\d\d -> 0\.\d+", out)


def test_farss(tmp_path: Path) -> None:
    out = run(tmp_path, "import farss, pathlib; farss.main(pathlib.Path('out'), steps=5)")
    assert "7 targets in blocks below 1 are shallow: 42 of 42 ranks" in out
    ranks = [int(rank) for rank in re.findall(r"importance \S+, rank (\d+)", out)]
    assert sum(ranks) == 42
    assert re.search(r"facts: 0\.9\d\d -> 0\.\d+", out)


def test_stories260k(tmp_path: Path) -> None:
    out = run(tmp_path, "import stories260k, pathlib; stories260k.main(pathlib.Path('out'), steps=20)")
    found = re.search(r"problems: (\d\.\d+) -> (\d\.\d+) nats", out)
    assert found is not None
    assert float(found[2]) < float(found[1]) - 0.3, "the task is learned"
    stories = re.search(r"stories: (\d\.\d+) -> (\d\.\d+) nats", out)
    assert stories is not None
    assert 1.0 < float(stories[1]) < 1.5, "the base knows its stories"


def test_beyond_two_factors(tmp_path: Path) -> None:
    code = "import beyond_two_factors, pathlib; beyond_two_factors.main(pathlib.Path('out'), steps=4)"
    out = run(tmp_path, code)
    assert re.search(r"dora: loss \d+\.\d+, penalty 0\.0000\n", out)
    assert re.search(r"dora: merged, gap \de[-+]0\d\. New lengths for a weight's rows", out)
    assert re.search(r"dora: peft of rank 8, gap \de[-+]0\d\n", out)
    assert re.search(r"kasa: loss \d+\.\d+, penalty 0\.\d*[1-9]\d*\n", out)
    assert re.search(r"kasa: portable, gap \de[-+]0\d\. To serve: .*--max-lora-rank 16 ", out)


def test_encoder(tmp_path: Path) -> None:
    out = run(tmp_path, "import encoder, pathlib; encoder.main(pathlib.Path('out'), steps=10)")
    assert re.search(r"lora, relations-accuracy: 0\.\d\d\d -> 0\.\d\d\d, change \[[+-]", out)
    assert re.search(r"lora-null, relations-matthews: -?0\.\d\d\d -> -?0\.\d\d\d", out)
    assert "AutoModelForSequenceClassification.from_pretrained(" in out
    assert (tmp_path / "out" / "report.html").is_file()


def test_starting_points(tmp_path: Path) -> None:
    out = run(tmp_path, "import starting_points, pathlib; starting_points.main(pathlib.Path('out'), steps=6)")
    for name in ("milora", "corda"):
        found = re.search(rf"{name}: loss (\d\.\d+) -> (\d\.\d+)", out)
        assert found is not None
        assert float(found[2]) < float(found[1]) - 0.1, "the task is learned"
        assert (tmp_path / "out" / name / "adapter_model.safetensors").is_file()


def test_penalty_loop(tmp_path: Path) -> None:
    out = run(tmp_path, "import penalty_loop, pathlib; penalty_loop.main(pathlib.Path('out'), steps=10)")
    found = re.findall(r"step \d+: loss (\d\.\d+), penalty (\d\.\d+)", out)
    assert len(found) == 2
    assert float(found[1][0]) < float(found[0][0]), "the task is learned"
    assert float(found[1][1]) > 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
