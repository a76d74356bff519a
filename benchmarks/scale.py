"""Two processes against one: what a step of training and a text of statistics take, and whether the result is the same.

`python benchmarks/scale.py [MODEL]`. Processor seconds of all processes together, so that 1 in the last column is a
perfect division: of a long and a short run each, whose difference has neither start nor loading. Also a check that
two processes train what one trains, in bfloat16 (float32: tests/training/test_distributed.py).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

DATA = Path(__file__).parent.parent / "assets" / "data"
LENGTHS = {"stats": (8, 56), "train": (2, 14)}  # texts of knowledge, and steps of 8 examples


def seconds(command: str, recipe: Path, processes: int) -> float:
    """Return the processor seconds of a command, of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *words, "-m", "keeptune", command, str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def written(folder: Path, model: str, texts: int, steps: int) -> Path:
    """Write a recipe."""
    values: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "method": {"name": "keep", "rank": 8, "alpha": 16},
        "knowledge": {
            "file": str(DATA / "c4_text" / "c4.jsonl"),
            "text": "{text}",
            "examples": texts,
            "max_length": 128,
        },
        "task": {"train": str(DATA / "gsm8k" / "train.jsonl"), "prompt": "{question}\n", "completion": "{answer}"},
        "train": {"max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"},
        "output": str(folder / "run"),
        "store": str(folder / "store"),
        "device": "cpu",
    }
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def rows(model: str) -> list[dict[str, str]]:
    """Measure."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        taken: dict[tuple[str, int], list[float]] = {}
        for processes in (1, 2):
            for long in (0, 1):
                recipe = written(
                    Path(place, f"{processes}-{long}"), model, LENGTHS["stats"][long], LENGTHS["train"][long]
                )
                for command in LENGTHS:
                    taken.setdefault((command, processes), []).append(seconds(command, recipe, processes))
        for command, (short, long) in LENGTHS.items():
            one, two = ((b - a) / (long - short) for a, b in (taken[command, n] for n in (1, 2)))
            unit = "text" if command == "stats" else "step"
            found.append(
                {
                    "what": f"{command}, a {unit}",
                    "one": f"{one:.2f} s",
                    "two": f"{two:.2f} s",
                    "ratio": f"{one / two:.2f}",
                }
            )
        ends = [load_file(Path(place, f"{n}-1", "run", "trained", "factors.safetensors")) for n in (1, 2)]
        size = max(float(value.abs().max()) for value in ends[0].values())
        gap = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0])
        logs = [json.loads(Path(place, f"{n}-1", "run", "trained", "train.json").read_text())["loss"] for n in (1, 2)]
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(*logs, strict=True))
        found.append({"what": "trained factors", "one": f"{size:.3g} at most", "two": f"{gap:.1e} apart", "ratio": ""})
        found.append({"what": "loss", "one": f"{logs[0][-1]['loss']:.3f}", "two": f"{apart:.1e} apart", "ratio": ""})
    return found


if __name__ == "__main__":
    for row in rows(sys.argv[1] if len(sys.argv) > 1 else "atlas"):
        print(*row.values(), sep=" | ")
