"""The account of a run of SmolLM2 against the peak memory of its process (benchmarks/account.py has more settings)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from benchmarks.processes import command_peak
from tests.assets import DATA

from keeptune.cli.dry_run import describe_file


@pytest.mark.real
def test_a_run_takes_the_memory_that_is_said(smollm2_short: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(smollm2_short),
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
    measured, stage = 2**20 * command_peak("run", str(path)), said.memory[said.peak]
    assert said.peak == "training"
    assert sum(stage.values()) == pytest.approx(measured, rel=0.25)
    # A control: weights and their optimiser alone are too little.
    assert sum(stage.values()) - stage["activations"] - stage["logits"] < 0.75 * measured
    record = json.loads((tmp_path / "run" / "trained" / "train.json").read_text())
    assert said.train.numbers == record["trained_parameters"]
