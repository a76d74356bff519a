"""The sweep of input and gradient statistics against one forward/backward pass over the same tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from random_llama import random_llama
from timing import compare

from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.head import Loss, summed_loss
from keeptune.model.runner import Runner, Taps
from keeptune.statistics.collect import collect
from keeptune.statistics.covariance import DirectionVariances, GradientCovariance, InputCovariance
from keeptune.statistics.store import StatStore

WIDTH, LAYERS, VOCABULARY, TOKENS = 512, 4, 32000, 2048


def rows() -> list[dict[str, str]]:
    """Time a training pass, a pass with frozen weights, and sweeps with statistics."""
    torch.manual_seed(0)
    model = random_llama(WIDTH, LAYERS, VOCABULARY).eval()
    ids = torch.randint(VOCABULARY, (16, 256)).tolist()
    data = Calibration.of_answers(tuple(map(tuple, ids)), 0, (128,) * len(ids))
    batches, targets, runner = data.batches(TOKENS), find_targets(model), Runner(model)

    def training() -> None:
        model.zero_grad()
        for batch in batches:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            torch.autograd.backward(summed_loss(logits, batch, Loss("true")))

    def sweep(*requests: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            wanted = {target: frozenset(requests) for target in targets}
            store, key = StatStore(Path(folder)), "benchmark"
            collect(runner, wanted, {"task": data}, store, model_fingerprint=key, batch_tokens=TOKENS)  # type: ignore[arg-type]

    full = (InputCovariance("task"), GradientCovariance("task", "true"))
    rivals = {
        "training": training,
        "frozen": lambda: runner.run(batches, Taps(), Loss("true"), title=""),
        "covariances": lambda: sweep(*full),
        "streaming": lambda: sweep(DirectionVariances("task", "true")),
    }
    times = compare(rivals, rounds=3)
    name = f"input and gradient statistics, {LAYERS} layers of {WIDTH}, 4,096 tokens"
    return [
        {
            "benchmark": f"{name}, {label}",
            "plain": f"{times['training']:.2f} s training pass, {times['frozen']:.2f} s with frozen weights",
            "keeptune": f"{times[key]:.2f} s",
            "ratio": f"{times[key] / times['training']:.2f} x / {times[key] / times['frozen']:.2f} x",
            "check": f"{len(targets)} targets",
        }
        for key, label in (("covariances", "covariances"), ("streaming", "along singular directions"))
    ]
