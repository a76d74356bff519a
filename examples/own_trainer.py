"""DoRA, which trains more than two factors, and L2-LoRA, which holds them back, with a trainer of your own.

Run it: `python examples/own_trainer.py` (half a minute on two cores, nothing is downloaded).
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


def main(output: Path, steps: int = 12) -> None:
    base = str(atlas.model_path())
    tokenizer = AutoTokenizer.from_pretrained(base)
    task = [
        {"prompt": f"{row['text']}\nTopic:", "completion": f" {row['topic']}"} for row in rows("topics.train.jsonl")
    ]
    for method in (keeptune.Dora(rank=8), keeptune.L2Lora(rank=8)):
        model = AutoModelForCausalLM.from_pretrained(base)
        plan = keeptune.plan(model, tokenizer, method)
        tuned = keeptune.install(model, plan)
        folder = output / method.name
        config = SFTConfig(
            str(folder / "checkpoints"),
            max_steps=steps,
            logging_steps=steps,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            bf16=False,
            activation_checkpointing=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(tuned, args=config, train_dataset=Dataset.from_list(task), processing_class=tokenizer)
        # L2-LoRA's penalty enters the loss here, once per step; DoRA asks for nothing, and the call checks that.
        keeptune.attach(trainer, plan)
        trainer.train()
        log = trainer.state.log_history[0]
        print(f"{method.name}: loss {log.get('task_loss', log['loss']):.2f}, penalty {log.get('penalty', 0.0):.4f}")

        # L2-LoRA's result is a LoRA for the untouched base; DoRA's is none, and is merged with a word of why.
        done = keeptune.export(tuned, plan, folder / "result", base=base, tokenizer=tokenizer)
        print(f"{method.name}: {done.format}, gap {done.relative_gap:.0e}. {done.note or 'To serve: ' + done.serve}")

        # As an adapter, DoRA goes to whoever loads it with PEFT.
        if method.name == "dora":
            done = keeptune.export(tuned, plan, folder / "adapter", keeptune.ExportOptions("peft"), base=base)
            print(f"{method.name}: {done.format} of rank {done.rank}, gap {done.relative_gap:.0e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_trainer"))
