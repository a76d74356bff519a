"""What repair wins back on atlas, three seeds: docs/results/repair-tables.md, to which docs/guides/repair.md refers.

Run it: `make study`, or `python studies/repair.py [folder]` (about ten minutes on two cores). Killed and started again,
it goes on with the next seed. A LoRA of rank 8 that was trained at 2e-3 and has forgotten is repaired at several μ, in
one round and in two, with and without task data, and scaled down, which needs no idea.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import each, spread
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import keeptune
from keeptune import atlas
from keeptune.core.artefact import read_json, write_bytes, write_json
from keeptune.pipeline.demo import demo_recipe
from keeptune.pipeline.run import run
from keeptune.posthoc.repair_files import Files, read_files
from keeptune.recipe.schema import make_recipe

RATE = 2e-3
SEEDS = (0, 1, 2)
MUS = (0.03, 0.1, 0.3, 1.0, 3.0)
SCALES = (0.8, 0.7, 0.6)
WAYS: dict[str, dict[str, Any]] = {
    "repair": {},
    "repair, two rounds": {"rounds": 2},
    "repair, no task data": {"task": "none"},
}
_HEAD = """# Repair on atlas: all figures

Made by `python studies/repair.py` (in `make study`); [repair.md](../guides/repair.md) says what they mean. A LoRA of
rank 8, 120 steps at 2e-3; mean ± standard deviation over seeds 0 to 2, in per cent. The second round of every μ takes
the inputs of the model that was repaired at the least μ.

| | facts | topics |
| --- | ---: | ---: |"""


def main(output: Path, docs: Path) -> None:
    """Train, repair and score, seed by seed; then write the page."""
    found = each(partial(scores_of, output), SEEDS)
    write_bytes(docs / "results" / "repair-tables.md", page(found).encode())


def scores_of(output: Path, seed: int) -> dict[str, list[float]]:
    """Score everything that starts from the adapter of one seed.

    Args:
        output: Where runs go.
        seed: Training seed.

    Returns:
        Label to facts and topics.
    """
    kept, folder = output / f"scores-seed{seed}.json", output / f"lora-seed{seed}"
    if kept.is_file():
        scores: dict[str, list[float]] = read_json(kept)
        return scores
    values = demo_recipe({"name": "lora", "rank": 8}, RATE, folder, seed=seed, store=output / "store")
    recipe = make_recipe(values | {"evaluate": values["evaluate"][:2]}, folder=Path(), where="study repair")
    run(recipe)
    found: dict[str, list[float]] = {}
    for way, options in WAYS.items():
        data = read_files(str(folder), Files(task=options.get("task")))
        record = keeptune.repair(
            folder,
            output / f"{way}-seed{seed}".replace(" ", "_").replace(",", ""),
            keeptune.Repair(mu=MUS[0], rounds=options.get("rounds", 1), sweep=MUS, store=output / "store"),
            knowledge=data.knowledge,
            task=data.task,
            benchmarks=recipe.evaluate,
        )
        facts, topics = ({m["label"]: m["score"] for m in row["models"]} for row in record["scores"])
        found["the adapter"] = [facts["adapter"], topics["adapter"]]
        # The repaired adapter itself is that of the first μ, in the sweep once more.
        labels = [label for label in facts if label not in ("adapter", "repaired")]
        found |= {
            f"{way}, μ {mu:g}": [facts[label], topics[label]] for mu, label in zip(sorted(MUS), labels, strict=True)
        }
    for scale in SCALES:
        copy = output / f"scaled-{scale:g}-seed{seed}"
        found[f"scaled by {scale:g}"] = scaled(folder / "adapter", copy, scale, recipe.evaluate)
    print(seed, found, flush=True)
    write_json(kept, found)
    return found


def scaled(adapter: Path, copy: Path, scale: float, benchmarks: Sequence[Any]) -> list[float]:
    """Score an adapter of which only a part is applied.

    Args:
        adapter: The whole adapter.
        copy: Where the scaled one goes.
        scale: The part.
        benchmarks: What to score.

    Returns:
        A score for each benchmark.
    """
    shutil.copytree(adapter, copy, dirs_exist_ok=True)
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * scale}), encoding="utf-8")
    base = str(atlas.model_path())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), copy)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [result.after for result in keeptune.measure(keeptune.AdapterPair(model), tokenizer, benchmarks)]


def page(found: Sequence[dict[str, list[float]]]) -> str:
    """Write the page.

    Args:
        found: Scores, seed by seed.

    Returns:
        Markdown.
    """
    lines = [_HEAD]
    repaired = [f"{way}, μ {mu:g}" for way in WAYS for mu in MUS]
    for label in ["the adapter", *repaired, *(f"scaled by {scale:g}" for scale in SCALES)]:
        cells = [spread([100 * v for v in values]) for values in zip(*(scores[label] for scores in found), strict=True)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/repair"), Path(__file__).parents[1] / "docs")
