"""The account of a run of SmolLM2 against the peak memory of its process (benchmarks/account.py has more settings)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.assets import DATA

from keeptune.cli.dry_run import describe_file

# Its own peak, which unlike ru_maxrss does not begin at that of the process that started it.
COMMAND = """
import atexit, re, sys
from pathlib import Path
peak = Path(sys.argv.pop(1))
atexit.register(lambda: peak.write_text(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
from keeptune.cli.main import main
main()
"""


@pytest.mark.real
def test_a_run_takes_the_memory_that_is_said(smollm2: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(smollm2),
        "method": {"name": "lora", "rank": 8},
        "task": {
            "train": str(DATA / "gsm8k" / "train.jsonl"),
            "prompt": "{question}\nAnswer:",
            "completion": " {answer}",
            "examples": 4,
        },
        "train": {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 160},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    said = describe_file(path)[""][1]
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "peak"), "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured, stage = 1024 * int((tmp_path / "peak").read_text()), said.memory[said.peak]
    assert said.peak == "training"
    assert stage.total == pytest.approx(measured, rel=0.25)
    # A control: weights and their optimiser alone are far from it.
    assert stage.total - stage.parts["activations"] - stage.parts["logits"] < 0.6 * measured
    record = json.loads((tmp_path / "run" / "trained" / "train.json").read_text())
    assert said.train.numbers == record["trained_parameters"]
