"""A training step with keep's budget against LoRA's, on a random model of the shapes of SmolLM2-135M's blocks.

Five blocks and a sixth of the vocabulary, which are as 30 to the whole. Knowledge is random texts of 120 tokens; how
often it is measured is what keep chooses. Processor seconds of one thread, bfloat16; the steps between two measurements
are counted in.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from random_llama import random_llama

from keeptune.adapter.install import install
from keeptune.data.calibration import Calibration
from keeptune.methods.keep import Keep
from keeptune.methods.lora import Lora
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.store import StatStore
from keeptune.training.penalty_engine import Penalties

VOCABULARY = 8192
TASKS = ((8, 20), (16, 20), (8, 100), (8, 400))  # examples of a step, and their tokens


def stepper(base: Any, method: Any, data: Any, store: Path, task: torch.Tensor) -> Any:
    """Returns a function that takes as many steps as keep has from one measurement to the next, and their number."""
    plan = plan_for(base, method, StatStore(store), data={"knowledge": data})
    model = install(base, plan)
    penalties = Penalties(model, plan) if plan.penalties else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=task, labels=task).loss.backward()
        if penalties is not None:
            penalties.step(tokens=task.numel())
        optimizer.step()
        optimizer.zero_grad()

    step()
    every = 1 if penalties is None else int(penalties._own[0]["every"])

    def steps(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            step()
        return (time.process_time() - start) / count

    for _ in range(every - 1):
        step()
    return steps, every


def rows() -> list[dict[str, str]]:
    """Returns a row for each task."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    texts = Calibration(tuple(tuple(torch.randint(3, VOCABULARY, (120,)).tolist()) for _ in range(64)), pad_id=0)
    found = []
    for examples, length in TASKS:
        task = torch.randint(3, VOCABULARY, (examples, length))
        seconds: dict[str, list[float]] = {"lora": [], "keep": []}
        with TemporaryDirectory() as store:
            made: dict[str, Any] = {}
            for name, method in (("lora", Lora()), ("keep", Keep())):
                base = random_llama(576, 5, VOCABULARY, heads=9, **sizes).to(torch.bfloat16)
                made[name], every = stepper(base, method, texts, Path(store), task)
        for _ in range(3):  # in turns
            for name, run in made.items():
                seconds[name].append(run(every))
        plain, own = (statistics.median(seconds[name]) for name in ("lora", "keep"))
        found.append(
            {
                "benchmark": f"a step of {examples} x {length} tokens, keep measured at every {every}",
                "plain": f"LoRA {plain:.2f} s",
                "keeptune": f"{own:.2f} s",
                "ratio": f"{own / plain:.2f}",
                "check": "",
            }
        )
    return found
