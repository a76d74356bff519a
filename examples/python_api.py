"""Tune a model you already have with TRL, keep its knowledge, and get an adapter for the untouched base.

Run it: `python examples/python_api.py` (half a minute on two cores, nothing is downloaded).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import keeptune
from keeptune import atlas


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in atlas.data_path(name).read_text(encoding="utf-8").splitlines()]


def main(output: Path, steps: int = 20) -> None:
    base = str(atlas.model_path())  # or any hub id
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)

    # What to keep, and what to learn.
    knowledge = [f"{row['question']}\nAnswer: {row['answer']}" for row in rows("calibration.jsonl")]
    task = [
        {"prompt": f"{row['text']}\nTopic:", "completion": f" {row['topic']}"} for row in rows("topics.train.jsonl")
    ]

    # Statistics on the knowledge, a plan from them, and the plan put into the model: a stock PeftModel.
    plan = keeptune.plan(model, tokenizer, keeptune.LoraNull(rank=8), knowledge=knowledge)
    tuned = keeptune.install(model, plan)

    # Any trainer will do; Guard checks that what should be frozen is.
    config = SFTConfig(
        str(output / "checkpoints"),
        max_steps=steps,
        learning_rate=2e-3,
        per_device_train_batch_size=32,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = SFTTrainer(tuned, args=config, train_dataset=Dataset.from_list(task), callbacks=[keeptune.Guard(plan)])
    trainer.train()

    # The change relative to the original base, checked on a fresh copy of it.
    print(keeptune.export(tuned, plan, output / "adapter", base=base, tokenizer=tokenizer))

    # What was lost: the same model with the adapter off and on, on the same items.
    from peft import PeftModel

    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(output / "adapter"))
    facts = keeptune.FileBenchmark(
        name="facts",
        role="knowledge",
        file=str(atlas.data_path("facts.jsonl")),
        metric="exact_match",
        prompt="{question}\nAnswer:",
        answer="{answer}",
        examples=100,
        max_new_tokens=16,
    )
    for result in keeptune.measure(keeptune.AdapterPair(served), tokenizer, [facts]):
        print(f"{result.name}: {result.before:.3f} -> {result.after:.3f}, 95% interval {result.interval}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/python_api"))
