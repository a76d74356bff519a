"""Write docs/fits.md, what fits into which card, from accounts of dry runs: nothing in it is entered by hand.

`python docs/fits.py` writes, `python docs/fits.py --check` fails when the page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keeptune.data import hub
from keeptune.pipeline.dry_run.describe import DryRun, describe
from keeptune.pipeline.dry_run.estimate import ModelShape
from keeptune.recipe.schema import make_recipe

PAGE = Path(__file__).parent / "fits.md"
MODELS = {
    "1B": "meta-llama/Llama-3.2-1B",
    "3B": "meta-llama/Llama-3.2-3B",
    "8B": "meta-llama/Llama-3.1-8B",
    "14B": "Qwen/Qwen2.5-14B-Instruct",
    "32B": "Qwen/Qwen2.5-32B-Instruct",
    "70B": "meta-llama/Llama-3.3-70B-Instruct",
}
# Memory (GB), a card of that size, and its operations a second in bfloat16, dense, as NVIDIA's data sheets print them.
CARDS = {16: ("RTX 4080", 97e12), 24: ("RTX 4090", 165e12), 48: ("L40S", 362e12), 80: ("A100", 312e12)}
SHARE = 0.35  # of a card's rate that a run is taken to reach
FREE = 0.95  # of a card's memory
SHARDS = (2, 4, 8, 16)  # cards that a base is shared out over
LENGTH, TOKENS = 2048, 10_000_000
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "rank": 16}},
    "lora-null": {"method": {"name": "lora-null", "rank": 16}},
    "kl": {"method": {"name": "lora", "rank": 16}, "penalties": [{"name": "kl", "batch_size": 1}]},
    "keep": {"method": {"name": "keep", "rank": 16}},
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SAVING = {"activation_checkpointing": True}
PAGED = {**SAVING, "optim": "paged_adamw_8bit"}
# From the fastest to the thriftiest: texts at once, of `train`, of the recipe.
SETTINGS: Mapping[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "bf16, 8 texts": (8, {}, {}),
    "bf16, checkpointing, 4 texts": (4, SAVING, {}),
    "bf16, checkpointing, 1 text": (1, SAVING, {}),
    "nf4, checkpointing, 4 texts": (4, PAGED, {"quantization": NF4}),
    "nf4, checkpointing, 1 text": (1, PAGED, {"quantization": NF4}),
    "nf4, checkpointing, 1 text, blockwise": (1, PAGED, {"quantization": NF4, "memory": "blockwise"}),
}


def account(size: str, method: str, setting: str, shapes: dict[str, ModelShape]) -> DryRun:
    """Returns the account of a run on a GPU."""
    batch, train, more = SETTINGS[setting]
    values = {
        "model": MODELS[size],
        "knowledge": {
            "file": "hf://datasets/org/knowledge/keep.jsonl",
            "text": "{text}",
            "examples": 256,
            "max_length": 1024,
        },
        "task": {
            "train": "hf://datasets/org/task/train.jsonl",
            "prompt": "{question}",
            "completion": "{answer}",
            "examples": TOKENS // LENGTH,
        },
        "train": {
            "num_train_epochs": 1,
            "max_length": LENGTH,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 16 // batch,
            **train,
        },
        "evaluate": [{"name": "mmlu", "batch_size": 1, "max_length": LENGTH}],
        "dtype": "bfloat16",
        "device": "cuda",
        "output": "runs/fits",
        **METHODS[method],
        **more,
    }
    recipe = make_recipe(values, folder=Path(), where="fits", fetch=hub.cached)
    found = describe(recipe, shapes.get(size))
    shapes[size] = found.shape
    return found


def page() -> str:
    """Returns the page."""
    shapes: dict[str, ModelShape] = {}
    runs = {
        (size, method, setting): account(size, method, setting, shapes)
        for size in MODELS
        for method in METHODS
        for setting in SETTINGS
    }
    parts = [*_fitting(runs), *_peaks(runs), *_stages(runs), *_times(runs), *_sharded(runs), *_moved(runs)]
    return "\n".join([_INTRODUCTION, *parts]) + "\n"


_INTRODUCTION = f"""# What fits

Written by `docs/fits.py` from accounts of `keeptune run --dry-run`; nothing here is entered by hand, nothing was run.

Models: {", ".join(MODELS.values())}.
Texts of {LENGTH:,} tokens, rank 16 on all linear maps, knowledge of 256 texts of 1,024 tokens, scoring one text at a
time. `nf4` is bitsandbytes in 4 bits with double quantisation and `optim: paged_adamw_8bit`; a text is what passes
through the model at once (`per_device_train_batch_size`). A run fits where its largest stage takes at most
{FREE:.0%} of the card; a dash: no setting here fits. For your own recipe:

```sh
keeptune run recipe.yaml --dry-run          # by stage and part; with --json as bytes
```
"""


def _largest(run: DryRun) -> float:
    return sum(run.memory[run.peak].values()) / 1e9


def _table(heads: list[str], rows: Iterator[list[str]] | list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(heads) - 1)])} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _fits(runs: Mapping[Any, DryRun], size: str, method: str, card: int) -> str | None:
    fitting = (setting for setting in SETTINGS if _largest(runs[size, method, setting]) <= FREE * card)
    return next(fitting, None)


def _fitting(runs: Mapping[Any, DryRun]) -> Iterator[str]:
    yield "## The fastest setting that fits\n"
    for method in METHODS:
        yield f"### {method}\n"
        rows = [[size, *(_fits(runs, size, method, card) or "-" for card in CARDS)] for size in MODELS]
        yield from _table(["", *(f"{card} GB" for card in CARDS)], rows)


def _peaks(runs: Mapping[Any, DryRun]) -> Iterator[str]:
    yield "## Peak memory, GB\n"
    rows = [
        [f"{size}, {method}", *(f"{_largest(runs[size, method, setting]):.1f}" for setting in SETTINGS)]
        for size in MODELS
        for method in METHODS
    ]
    yield from _table(["", *SETTINGS], rows)


def _stages(runs: Mapping[Any, DryRun]) -> Iterator[str]:
    thrifty = list(SETTINGS)[-1]
    yield f"## By stage and on disk, GB ({thrifty})\n"
    stages = ["statistics", "plan", "training", "export", "scoring"]
    rows = []
    for size in MODELS:
        for method in METHODS:
            run = runs[size, method, thrifty]
            memory = [sum(run.memory.get(stage, {}).values()) for stage in stages]
            disk = [sum(run.disk[part].values()) for part in ("store", "plan")]
            rows.append([f"{size}, {method}", *(f"{number / 1e9:.1f}" for number in [*memory, *disk])])
    yield from _table(["", *stages, "store (disk)", "plan (disk)"], rows)


def _times(runs: Mapping[Any, DryRun]) -> Iterator[str]:
    yield f"## Hours for {TOKENS / 1e6:.0f} million tokens, with keep\n"
    rates = ", ".join(f"{name} {rate / 1e12:.0f}e12" for name, rate in CARDS.values())
    yield f"Operations of the whole run but for scoring, at {SHARE:.0%} of the cards' operations a second ({rates}).\n"
    rows = []
    for size in MODELS:
        row = [size]
        for card, (_, rate) in CARDS.items():
            setting = _fits(runs, size, "keep", card)
            work = runs[size, "keep", setting].work if setting else {}
            known = [work[part] or 0 for part in ("statistics", "train")] if work else []
            row.append(f"{sum(known) / rate / SHARE / 3600:.1f}" if known else "-")
        rows.append(row)
    yield from _table(["", *(f"{name} ({card} GB)" for card, (name, _) in CARDS.items())], rows)


def _on_each(run: DryRun, cards: int) -> float:
    """Returns the GB of training on each of some cards: weights, factors and their states in equal shards.

    Whole are a block while it runs, and the next one, which is fetched meanwhile; what penalties hold; and activations.
    """
    parts = dict(run.memory["training"])
    block = parts["weights"] / run.shape.blocks
    sharded = sum(parts.pop(name, 0) for name in ("weights", "adapter", "gradients", "optimiser"))
    return (sharded / cards + 2 * block + sum(parts.values())) / 1e9


def _sharded(runs: Mapping[Any, DryRun]) -> Iterator[str]:
    setting = "bf16, checkpointing, 1 text"
    yield "## Several cards: training with FSDP2, GB on each\n"
    yield f"Of a step of 16 texts each card has its share ({setting}). Statistics and plan are made"
    yield "`blockwise` then, as above; exporting and scoring need the base whole: on one card, or on several with"
    yield "`device_map: auto`.\n"
    rows = [
        [f"{size}, {method}", *(f"{_on_each(runs[size, method, setting], cards):.1f}" for cards in SHARDS)]
        for size in ("8B", "14B", "32B", "70B")
        for method in METHODS
    ]
    yield from _table(["", *(f"{cards} cards" for cards in SHARDS)], rows)


def _moved(runs: Mapping[Any, DryRun]) -> Iterator[str]:
    setting = "bf16, checkpointing, 1 text"
    yield "## What several processes send, 70B, GB on each\n"
    yield "A step of one micro-batch under DDP (a base in 4 bits on each card) and under FSDP2, which fetches each"
    yield "weight in the forward and in the backward pass. What keep sends is that of the steps at which it measures,"
    yield "every k-th one, and a few numbers more for its budget."
    yield "`tests/training/test_launched.py` counts what is sent.\n"
    rows = []
    for method in METHODS:
        run = runs["70B", method, setting]
        gradient, weights = 4 * run.train.numbers / 1e9, run.memory["training"]["weights"] / 1e9
        answers = method in ("kl", "keep")
        sums = run.memory["statistics"]["sums"] / 1e9 if "statistics" in run.memory else 0
        sent = [sums, gradient, gradient * answers, 2 * weights + gradient, 2 * weights * answers]
        rows.append([method, *(f"{number:.2f}" for number in sent)])
    heads = ["statistics, once", "DDP: gradients", "penalties", "FSDP2: weights and gradients", "penalties"]
    yield from _table(["", *heads], rows)


def main() -> None:
    """Write the page, or check it."""
    text = page().rstrip() + "\n"
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/fits.md is out of date: run `python docs/fits.py`")


if __name__ == "__main__":
    main()
