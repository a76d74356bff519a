"""Two starting points on one model: MiLoRA, which looks at the weights alone, and CorDA, which looks at data.

Run it: `python examples/starting_points.py` (half a minute on two cores, nothing is downloaded).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keeptune
from keeptune import atlas


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in atlas.data_path(name).read_text(encoding="utf-8").splitlines()]


def main(output: Path, steps: int = 20) -> None:
    base = str(atlas.model_path())  # or any hub id
    tokenizer = AutoTokenizer.from_pretrained(base)
    knowledge = [f"{row['question']}\nAnswer: {row['answer']}" for row in rows("calibration.jsonl")[:200]]
    task = [f"{row['text']}\nTopic: {row['topic']}" for row in rows("topics.train.jsonl")[: 16 * steps]]
    targets = keeptune.PlanOptions(targets=["q_proj", "v_proj", "down_proj"])

    for method in (keeptune.Milora(rank=8), keeptune.Corda(rank=8, mode="kpm")):
        model = AutoModelForCausalLM.from_pretrained(base)
        plan = keeptune.plan(model, tokenizer, method, knowledge=knowledge, options=targets)
        tuned = keeptune.install(model, plan)  # a stock PeftModel that computes what the base does

        # Any loop will do; examples/python_api.py uses TRL.
        optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for first in range(0, len(task), 16):
            batch = tokenizer(task[first : first + 16], return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"{method.name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")

        # The change relative to the original base, as plain LoRA of twice the rank, checked on a fresh copy.
        print(keeptune.export(tuned, plan, output / method.name, base=base, tokenizer=tokenizer))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/starting_points"))
