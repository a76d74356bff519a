"""Curvature from two batches of knowledge, all seven kinds of linear maps, against two forward/backward passes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from random_llama import random_llama
from timing import compare

from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.head import Loss, summed_loss
from keeptune.model.runner import Runner, Taps
from keeptune.statistics.collect import collect
from keeptune.statistics.covariance import GradientCovariance, InputCovariance, TokenCount, WeightFisher, lora_fisher
from keeptune.statistics.request import Request
from keeptune.statistics.store import StatStore

WIDTH, LAYERS, VOCABULARY, TOKENS = 1024, 1, 8192, 2048


def rows() -> list[dict[str, str]]:
    """Time training passes, passes with frozen weights, and what each form of the penalty needs."""
    torch.manual_seed(0)
    model = random_llama(WIDTH, LAYERS, VOCABULARY, heads=16).eval()
    ids = torch.randint(VOCABULARY, (16, 256)).tolist()
    data = Calibration.of_answers(tuple(map(tuple, ids)), 0, (128,) * len(ids))
    batches, targets, runner = data.batches(TOKENS), find_targets(model), Runner(model)

    def training() -> None:
        model.zero_grad()
        for batch in batches:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            torch.autograd.backward(summed_loss(logits, batch, Loss("true")))

    def start(target: Target) -> LowRank:
        return LowRank(torch.zeros(target.out_features, 16), torch.ones(16, target.in_features))

    def wanted(name: str, target: Target) -> set[Request]:
        if name == "diag":
            return {lora_fisher("knowledge", "probe", start(target), 1.0)}
        if name == "ewc":
            return {WeightFisher("knowledge", "probe")}
        return {InputCovariance("knowledge"), GradientCovariance("knowledge", "probe")}

    def sweep(name: str) -> None:
        requests = {t: frozenset(wanted(name, t) | {TokenCount("knowledge")}) for t in targets}
        with tempfile.TemporaryDirectory() as folder:
            store = StatStore(Path(folder))
            collect(runner, requests, {"knowledge": data}, store, model_fingerprint="m", batch_tokens=TOKENS)

    forms = {
        "dense": "dense factors (b-kfac, b-tri-kfac, delta-kfac)",
        "diag": "diagonals of A and B (diag), r 16",
        "ewc": "diagonal of W (ewc)",
    }
    times = compare(
        {
            "training": training,
            "frozen": lambda: runner.run(batches, Taps(), Loss("probe"), title=""),
            **{name: lambda name=name: sweep(name) for name in forms},  # type: ignore[misc]
        },
        rounds=3,
    )
    title = f"curvature from 2 batches of 2,048 tokens, {LAYERS} layer of {WIDTH}"
    return [
        {
            "benchmark": f"{title}, {label}",
            "plain": f"{times['training']:.2f} s training passes, {times['frozen']:.2f} s with frozen weights",
            "keeptune": f"{times[name]:.2f} s",
            "ratio": f"{times[name] / times['training']:.2f} x / {times[name] / times['frozen']:.2f} x",
            "check": f"{len(targets)} targets",
        }
        for name, label in forms.items()
    ]
