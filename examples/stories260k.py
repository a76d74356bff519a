"""A model trained by somebody else: teach stories260K the text of GSM8K, and measure what its stories lose.

Run it: `python examples/stories260k.py` (half a minute on two cores).
It writes a recipe and its data files, then does what `keeptune run recipe.yaml` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe

ASSETS = Path(__file__).parents[1] / "assets"


def stories(path: Path, count: int) -> list[dict[str, str]]:
    # stories260K was trained on text with single newlines; blank lines would raise its loss from the start.
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [{"text": text.replace("\n\n", "\n")} for text in texts]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def main(output: Path, steps: int = 40) -> None:
    output.mkdir(parents=True, exist_ok=True)
    problems = (ASSETS / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    train = [json.loads(line) for line in problems[:320]]
    held_out = [{"text": f"{row['question']}\n{row['answer']}"} for row in map(json.loads, problems[320:350])]
    calibration = stories(ASSETS / "data/tinystories_train_piece/stories.jsonl", 64)
    values = {
        "model": str(ASSETS / "models/stories260K"),
        "method": {"name": "lora-null", "rank": 8},
        "knowledge": {"file": write(output / "knowledge.jsonl", calibration), "max_length": 256},
        "task": {
            "train": write(output / "task.jsonl", train),
            "prompt": "{question}\n",
            "completion": "{answer}",
        },
        "train": {"learning_rate": 2e-3, "max_steps": steps, "per_device_train_batch_size": 8, "max_length": 256},
        "evaluate": [
            {
                "name": name,
                "role": role,
                "file": write(output / f"{name}.jsonl", rows),
                "text": "{text}",
                "metric": "cross_entropy",
                "max_length": 256,
                "batch_size": 8,
            }
            for name, role, rows in (
                ("stories", "knowledge", stories(ASSETS / "data/tinystories/stories.jsonl", 30)),
                ("problems", "task", held_out),
            )
        ],
        "output": str(output / "run"),
        "store": str(output / "store"),
    }
    report = run(make_recipe(values, folder=output, where="example"))
    for benchmark in report["methods"][0]["benchmarks"]:
        print(
            f"{benchmark['name']}: {benchmark['before']:.3f} -> {benchmark['after']:.3f} nats per token, "
            f"KL to the base {benchmark['kl_to_base']:.3f}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/stories260k"))
