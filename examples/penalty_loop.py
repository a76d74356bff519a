"""A training loop written by hand, with LoRA held where its knowledge sits: `keeptune.Penalties` in a loop of your own.

Run it: `python examples/penalty_loop.py` (half a minute on two cores, nothing is downloaded).
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


def main(output: Path, steps: int = 20, pieces: int = 2) -> None:
    base = str(atlas.model_path())  # or any hub id
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)

    # LoRA, held where it would move what the targets put out on knowledge texts.
    knowledge = [f"{row['question']}\nAnswer: {row['answer']}" for row in rows("calibration.jsonl")[:200]]
    held = keeptune.Laplace(strength=20.0, curvature="delta-act")
    plan = keeptune.plan(model, tokenizer, keeptune.Lora(rank=8), knowledge=knowledge, penalties=[held])
    tuned = keeptune.install(model, plan).train()
    penalties = keeptune.Penalties(tuned, plan)

    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    texts = [f"{row['text']}\nTopic: {row['topic']}{tokenizer.eos_token}" for row in rows("topics.train.jsonl")]
    size = 16
    for step in range(steps):
        for piece in range(pieces):
            start = (step * pieces + piece) * size % (len(texts) - size)
            batch = tokenizer(texts[start : start + size], return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = tuned(**batch, labels=labels).loss
            (loss / pieces).backward()
        penalties.step()  # once per optimiser step: after the last backward pass, before clipping
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            told = penalties.read()  # means since the last reading, and where each layer is now
            print(f"step {step + 1}: loss {loss.item():.3f}, penalty {told['penalty']:.4f}")
    print(keeptune.export(tuned.eval(), plan, output / "adapter", base=base, tokenizer=tokenizer))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/penalty_loop"))
