"""FARSS from Python: statistics of the task, ranks by importance, and what they cost the knowledge.

Run it: `python examples/farss.py` (half a minute on two cores, nothing is downloaded).
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import keeptune
from keeptune import atlas


def main(output: Path, steps: int = 20) -> None:
    base = str(atlas.model_path())  # or any hub id
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    lines = atlas.data_path("topics.train.jsonl").read_text(encoding="utf-8").splitlines()
    task = [(f"{row['text']}\nTopic:", f" {row['topic']}") for row in map(json.loads, lines)]

    # The first block is shallow: its targets share a budget of 6 ranks each, more to the less important ones.
    method = keeptune.Farss(rank=8, boundary=1, r_avg=6, r_max=8)
    plan = keeptune.plan(model, tokenizer, method, task=task[:256])
    for note in plan.provenance["notes"]:
        print(note)
    for row in plan.summary():
        if "importance" in row["evidence"]:
            print(f"{row['target']}: importance {row['evidence']['importance'][0]:.2e}, rank {row['rank']}")

    tuned = keeptune.install(model, plan)  # a stock PeftModel, unchanged in what it computes
    config = SFTConfig(
        str(output / "checkpoints"),
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    examples = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in task])
    SFTTrainer(tuned, args=config, train_dataset=examples, callbacks=[keeptune.Guard(plan)]).train()
    print(keeptune.export(tuned, plan, output / "adapter", base=base, tokenizer=tokenizer))

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
        print(f"{result.name}: {result.before:.3f} -> {result.after:.3f}")


if __name__ == "__main__":
    main(Path("runs/farss"))
