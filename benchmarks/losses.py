"""A training step by each loss of the task's tokens against nll: `python benchmarks/losses.py`, on SmolLM2 in bfloat16.

Times are of forward and backward passes of the same batch, in turns; peaks are of a process for each loss.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import processes
import torch
from datasets import Dataset
from timing import compare
from trl import SFTTrainer

from keeptune.adapter.install import install
from keeptune.methods.lora import Lora
from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.store import StatStore
from keeptune.training.arguments import sft_config
from keeptune.training.attach import attach

LOSSES = ("nll", "dft", "eaft", "asft")
BATCH, LENGTH = 2, 256
_PEAK = "import losses, processes, sys; losses.stepper(sys.argv[1])(); print(processes.peak())"


def model_path() -> str:
    """Return where SmolLM2 is."""
    return str(Path(os.environ.get("KEEPTUNE_MODELS", "models")) / "smollm2")


def stepper(loss: str) -> partial[None]:
    """Return a step of LoRA on random tokens, all of which are learned."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = load_model(model_path(), LoadOptions(dtype="bfloat16"))
    plan = plan_for(model, Lora(rank=16), StatStore(Path(tempfile.mkdtemp())), data={})
    ids = torch.randint(1000, 40000, (BATCH, LENGTH)).tolist()
    config = sft_config({}, Path(tempfile.mkdtemp()), dtype=torch.bfloat16, device="cpu")
    trainer = SFTTrainer(
        model=install(model, plan),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=load_tokenizer(model_path()),
    )
    attach(trainer, plan, loss)
    inputs = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "attention_mask": torch.ones(BATCH, LENGTH)}
    return partial(_step, trainer, inputs)


def _step(trainer: Any, inputs: dict[str, torch.Tensor]) -> None:
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model.train(), dict(inputs), num_items_in_batch=BATCH * (LENGTH - 1))
    loss.backward()


def main() -> None:
    """Print the table."""
    peaks = {loss: processes.numbers_of(_PEAK, loss)[0] for loss in LOSSES}
    times = compare({loss: stepper(loss) for loss in LOSSES}, rounds=int(sys.argv[1]) if sys.argv[1:] else 5)
    for loss in LOSSES:
        seconds, peak = times[loss] / times["nll"], peaks[loss] / peaks["nll"]
        print(f"| {loss} | {times[loss]:.2f} s | {seconds:.2f} | {peaks[loss] / 1024:.2f} GiB | {peak:.2f} |")


if __name__ == "__main__":
    main()
