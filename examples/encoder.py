"""Tune a sequence classifier: tell from a sentence which relation it is about, with LoRA and with LoRA-Null.

Run it: `python examples/encoder.py` (half a minute on two cores, nothing is downloaded). The encoder is a tiny
RoBERTa with random weights, so that there is nothing to forget; with a real one, put its name in `model`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel
from transformers.utils import logging

from keeptune import atlas
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe

FACTS = Path(__file__).parent / "data" / "facts.jsonl"


def make_encoder(folder: Path, texts: list[str]) -> None:
    """Save a small tokenizer made from the texts, and an encoder without a head."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False))
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, cls_token="<s>", sep_token="</s>", **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        initializer_range=0.1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


def main(output: Path, steps: int = 120, examples: int = 300) -> None:
    logging.set_verbosity_error()  # Transformers tells each time that the head is drawn
    output.mkdir(parents=True, exist_ok=True)
    lines = FACTS.read_text(encoding="utf-8").splitlines(keepends=True)
    train, test = output / "train.jsonl", output / "test.jsonl"
    train.write_text("".join(lines[:examples]), encoding="utf-8")
    test.write_text("".join(lines[examples:]), encoding="utf-8")
    make_encoder(output / "encoder", lines)
    values: dict[str, Any] = {
        "model": str(output / "encoder"),
        "knowledge": {"file": str(atlas.data_path("calibration.jsonl")), "text": "{question}", "max_length": 64},
        "task": {"train": str(train), "kind": "classification", "text": "{sentence}", "label": "{relation}"},
        "train": {"learning_rate": 5e-3, "max_steps": steps, "per_device_train_batch_size": 32},
        "evaluate": [
            {
                "name": f"relations-{metric}",
                "role": "task",
                "file": str(test),
                "text": "{sentence}",
                "answer": "{relation}",
                "metric": metric,
            }
            for metric in ("accuracy", "matthews")
        ],
        "store": str(output / "store"),
    }
    runs = []
    for name in ("lora", "lora-null"):
        runs.append(output / name)
        recipe = {**values, "method": {"name": name, "rank": 4}, "output": str(runs[-1])}
        (entry,) = run(make_recipe(recipe, folder=output, where="example"))["methods"]
        for found in entry["benchmarks"]:
            low, high = found["interval"]
            change = f"change [{low:+.3f}, {high:+.3f}]"
            print(f"{name}, {found['name']}: {found['before']:.3f} -> {found['after']:.3f}, {change}")
        print(entry["serve"])
    write_report(runs, output)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/encoder"))
