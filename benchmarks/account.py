"""The account of a dry run against the peak of the process that runs: `python benchmarks/account.py [NAME ...]`.

Each setting is `keeptune run` of SmolLM2 (`python studies/models.py smollm2`) in a process of its own, of few steps and
few texts: memory does not grow with either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import processes

ROOT = Path(__file__).parents[1]
DATA = ROOT / "assets" / "data"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
METHODS: dict[str, dict[str, Any]] = {
    "keep": {"method": "keep"},
    "lora-null": {"method": {"name": "lora-null", "rank": 16}},
    "farss": {"method": {"name": "farss", "boundary": 10}},
    "loki": {"method": {"name": "loki", "q": 20}},
    "kl": {"method": {"name": "lora", "rank": 8}, "penalties": [{"name": "kl", "batch_size": 4}]},
}
SETTINGS = {f"{name}, bf16": values for name, values in METHODS.items()} | {
    f"{name}, nf4": {**METHODS[name], "quantization": NF4} for name in ("keep", "lora-null", "kl")
}
_COMMAND = [sys.executable, "-c", "from keeptune.cli.main import main; main()", "run"]


def recipe(model: Path, folder: Path, values: dict[str, Any]) -> Path:
    """Writes the recipe of a setting, as JSON, which is YAML."""
    text = {"text": "{text}", "examples": 16, "max_length": 256}
    scored = {"name": "gsm8k", "role": "task", "file": str(DATA / "gsm8k" / "test.jsonl"), "examples": 16}
    whole = {
        "model": str(model),
        "knowledge": {"file": str(DATA / "tinystories" / "stories.jsonl"), **text},
        "task": {
            "train": str(DATA / "gsm8k" / "train.jsonl"),
            "prompt": "{question}\nAnswer:",
            "completion": " {answer}",
            "examples": 16,
        },
        "train": {"max_steps": 2, "per_device_train_batch_size": 8, "max_length": 256},
        "evaluate": [{**scored, "text": "{question} {answer}", "metric": "cross_entropy", "batch_size": 16}],
        "output": str(folder / "run"),
        "store": str(folder / "store"),
        **values,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def compare(model: Path, values: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the account of a setting, and the peak memory of the process that runs it, bytes."""
    with tempfile.TemporaryDirectory() as name:
        path = recipe(model, Path(name), values)
        said = subprocess.run([*_COMMAND, str(path), "--dry-run", "--json"], check=True, capture_output=True, text=True)
        peak = processes.command_peak("run", str(path))
    account: dict[str, Any] = json.loads(said.stdout)
    return account, round(peak * 2**20)


def rows(names: list[str] | None = None) -> list[dict[str, str]]:
    """Measures settings one after the other."""
    model = Path(os.environ.get("KEEPTUNE_MODELS", ROOT / "models")) / "smollm2"
    found = []
    for name in names or SETTINGS:
        account, measured = compare(model, SETTINGS[name])
        peak = account["memory"]["peak"]
        found.append(
            {
                "benchmark": f"peak memory of a run of SmolLM2: {name}",
                "plain": f"{peak['total'] / 1e9:.2f} GB said, at {peak['stage']}",
                "keeptune": f"{measured / 1e9:.2f} GB measured",
                "ratio": f"{peak['total'] / measured:.2f}",
                "check": "0.75 to 1.25",
            }
        )
    return found


if __name__ == "__main__":
    for wanted in sys.argv[1:] or SETTINGS:
        print(*rows([wanted])[0].values(), sep=" | ", flush=True)
