"""Measure how plain LoRA learns the topic task on atlas, and what it forgets.

    python -m keeptune.atlas.measure --model DIR --data DIR --rates 5e-4 1e-3 2e-3 3e-3 --seeds 0 1 2

prints one line of a Markdown table for each run: exact match on the facts and on the task before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from .score import exact_match
from .wordings import QUESTION_FORM, TOPIC_FORM

ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Tuning:
    """One plain LoRA run."""

    rate: float
    steps: int = 120
    seed: int = 0
    batch: int = 32
    rank: int = 8
    alpha: int = 16
    linear: bool = True


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fact_pairs(path: Path) -> Pairs:
    """(prompt, answer) pairs of a file of questions."""
    return [(QUESTION_FORM.format(question=row["question"]), row["answer"]) for row in read_rows(path)]


def task_pairs(path: Path) -> Pairs:
    """(prompt, answer) pairs of a file of the topic task."""
    return [(TOPIC_FORM.format(text=row["text"]), row["topic"]) for row in read_rows(path)]


def encode(tokenizer: Any, pairs: Pairs) -> list[tuple[list[int], int]]:
    """Token ids of prompt, completion and end-of-text, with the length of the prompt."""
    coded = []
    for prompt, answer in pairs:
        ids = tokenizer(f"{prompt} {answer}")["input_ids"] + [tokenizer.eos_token_id]
        coded.append((ids, len(tokenizer(prompt)["input_ids"])))
    return coded


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded on the right, and labels that are -100 on prompt and padding."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor(
        [[-100] * cut + row[cut:] + [-100] * (longest - len(row)) for row, cut in rows], dtype=torch.long
    )
    return ids, labels


def tune(model: Any, coded: Sequence[tuple[list[int], int]], pad: int, tuning: Tuning) -> None:
    """Train the trainable weights of ``model`` on the completions, batches drawn with the seed."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=tuning.rate, weight_decay=0.0)
    draws = random.Random(tuning.seed)
    order: list[int] = []
    model.train()
    for step in range(tuning.steps):
        if len(order) < tuning.batch:
            order = draws.sample(range(len(coded)), len(coded))
        taken, order = order[: tuning.batch], order[tuning.batch :]
        ids, labels = collate([coded[i] for i in taken], pad)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = tuning.rate * (1.0 - step / tuning.steps if tuning.linear else 1.0)
        optimizer.step()
    model.eval()


def lora_run(model_folder: Path, data: Path, tuning: Tuning) -> dict[str, float]:
    """One LoRA run from the stored model: exact match after it, and the seconds of its training."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(
        r=tuning.rank, lora_alpha=tuning.alpha, target_modules=ROLES, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tuning.seed)
        model = get_peft_model(base, config)
    coded = encode(tokenizer, task_pairs(data / "topics.train.jsonl"))
    begun = time.time()
    tune(model, coded, tokenizer.pad_token_id, tuning)
    seconds = time.time() - begun
    merged = model.merge_and_unload()
    return {
        "facts": exact_match(merged, tokenizer, fact_pairs(data / "facts.jsonl")),
        "task": exact_match(merged, tokenizer, task_pairs(data / "topics.test.jsonl")),
        "seconds": seconds,
    }


def before(model_folder: Path, data: Path) -> dict[str, float]:
    """Exact match of the stored model on the facts, the calibration questions and the task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    return {
        "facts": exact_match(model, tokenizer, fact_pairs(data / "facts.jsonl")),
        "calibration": exact_match(model, tokenizer, fact_pairs(data / "calibration.jsonl")),
        "task": exact_match(model, tokenizer, task_pairs(data / "topics.test.jsonl")),
    }


def main() -> None:
    """Print the table for every rate, number of steps and seed given."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Plain LoRA on the atlas topic task.")
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--data", type=Path, default=here / "data")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 3e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[120])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--constant", action="store_true", help="constant learning rate instead of linear")
    given = parser.parse_args()
    start = before(given.model, given.data)
    print("before:", {name: round(value, 3) for name, value in start.items()})
    print("| rate | steps | seed | facts before | facts after | task before | task after | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for steps in given.steps:
        for rate in given.rates:
            for seed in given.seeds:
                tuning = Tuning(rate=rate, steps=steps, seed=seed, linear=not given.constant)
                got = lora_run(given.model, given.data, tuning)
                print(
                    f"| {rate:g} | {steps} | {seed} | {start['facts']:.3f} | {got['facts']:.3f} "
                    f"| {start['task']:.3f} | {got['task']:.3f} | {got['seconds']:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
