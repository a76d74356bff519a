"""The plan of a base in four bits (nf4) against that of its bfloat16 form: weights are dequantised one at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from random_llama import random_llama
from timing import compare

from keeptune.data.calibration import Calibration
from keeptune.methods.lora_null import LoraNull
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.store import StatStore

WIDTH, LAYERS, RANK = 512, 4, 16
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
}


def rows() -> list[dict[str, str]]:
    """Time plans from a model that is loaded: statistics of 16 texts and the starts, with nothing in the store."""
    torch.manual_seed(0)
    data: Any = {"knowledge": Calibration(tuple(map(tuple, torch.randint(3, 4096, (16, 256)).tolist())), pad_id=0)}
    with tempfile.TemporaryDirectory() as folder:
        random_llama(WIDTH, LAYERS).to(torch.bfloat16).save_pretrained(folder)
        models = {"bf16": load_model(folder), "nf4": load_model(folder, LoadOptions(quantization=NF4))}

    def plan(model: Any, method: Any) -> None:
        with tempfile.TemporaryDirectory() as store:
            plan_for(model, method, StatStore(Path(store)), data=data)

    found = []
    for method in (LoraNull(rank=RANK), Pissa(rank=RANK)):
        times = compare({name: lambda m=model, x=method: plan(m, x) for name, model in models.items()}, rounds=3)
        found.append(
            {
                "benchmark": f"plan of an nf4 base, {method.name}, {LAYERS} layers of {WIDTH}",
                "plain": f"{times['bf16']:.2f} s in bfloat16",
                "keeptune": f"{times['nf4']:.2f} s",
                "ratio": f"{times['nf4'] / times['bf16']:.2f} (at most 1.2)",
                "check": "same data, empty store",
            }
        )
    return found
