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
from keeptune.model.runner import Runner, Taps
from keeptune.model.summed_loss import Loss, summed_loss
from keeptune.statistics.collect import collect
from keeptune.statistics.fisher import TokenCount, WeightFisher, lora_fisher
from keeptune.statistics.low_rank_covariance import (
    GRADIENT_RANK,
    INPUT_RANK,
    gradient_request,
    input_request,
    unpacked,
)
from keeptune.statistics.request import Request
from keeptune.statistics.store import StatStore

WIDTH, LAYERS, VOCABULARY, TOKENS, RANK = 1024, 1, 8192, 2048, 64
WIDE = 4096


def _wide() -> list[dict[str, str]]:
    """Time one map of 4,096 by 4,096 forward and back, with sums of its inputs and of its gradients."""
    target, cpu = Target("up", 0, "up", WIDE, WIDE, "up"), torch.device("cpu")
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(WIDE, WIDE, generator=draw) / WIDE**0.5
    falling = torch.arange(1, WIDE + 1) ** -0.5
    batches = [torch.randn(TOKENS, WIDE, generator=draw) * falling @ W for _ in range(2)]
    ranks = {"dense": (None, None), f"rank {RANK}": (RANK, RANK), "auto": (INPUT_RANK, GRADIENT_RANK)}

    def sweep(name: str | None) -> None:
        asked = ranks[name] if name else None
        sums = []
        if asked is not None:
            requests = (input_request("task", asked[0]), gradient_request("task", "true", asked[1]))
            sums = [request.accumulator(target, cpu, lambda: W) for request in requests]
        for X in batches:
            outputs, _ = X @ W.T, X @ W  # forward, and as much work back; gradients as the outputs are
            for total, rows in zip(sums, (X, outputs), strict=False):
                total.add(rows)
        for total in sums:
            total.result()

    times = compare(
        {"plain": lambda: sweep(None), **{name: lambda name=name: sweep(name) for name in ranks}},  # type: ignore[misc]
        rounds=3,
    )
    return [
        {
            "benchmark": f"{2 * TOKENS:,} tokens through a map of {WIDE:,} by {WIDE:,}, with Ω and Γ, {name}",
            "plain": f"{times['plain']:.2f} s without, {times['dense']:.2f} s dense",
            "keeptune": f"{times[name]:.2f} s",
            "ratio": f"{times[name] / times['plain']:.2f} x / {times[name] / times['dense']:.2f} x",
            "check": "",
        }
        for name in ranks
    ]


def rows() -> list[dict[str, str]]:
    """Time training passes, passes with frozen weights, and what each form of the penalty needs."""
    torch.manual_seed(0)
    model = random_llama(WIDTH, LAYERS, VOCABULARY, heads=16).eval()
    ids = torch.randint(VOCABULARY, (16, 256)).tolist()
    data = Calibration.of_answers(tuple(map(tuple, ids)), 0, (128,) * len(ids))
    batches, targets, runner = data.batches(TOKENS), find_targets(model), Runner(model)
    errors: list[float] = []

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
        rank = RANK if name == "low rank" else None
        return {input_request("knowledge", rank), gradient_request("knowledge", "probe", rank)}

    def sweep(name: str) -> None:
        requests = {t: frozenset(wanted(name, t) | {TokenCount("knowledge")}) for t in targets}
        with tempfile.TemporaryDirectory() as folder:
            store = StatStore(Path(folder))
            found = collect(runner, requests, {"knowledge": data}, store, model_fingerprint="m", batch_tokens=TOKENS)
            if name == "low rank" and not errors:
                request = input_request("knowledge", RANK)
                errors.extend(unpacked(found.view(target)[request]).error for target in targets)

    forms = {
        "dense": "dense factors (b-kfac, b-tri-kfac, delta-kfac)",
        "low rank": f"rank-{RANK} factors",
        "diag": "diagonals of A and B (diag), r 16",
        "ewc": "diagonal of W (ewc)",
    }
    times = compare(
        {
            "training": training,
            "frozen": lambda: runner.backward(batches, Taps(), Loss("probe"), title=""),
            **{name: lambda name=name: sweep(name) for name in forms},  # type: ignore[misc]
        },
        rounds=3,
    )
    title = f"curvature from 2 batches of 2,048 tokens, {LAYERS} layer of {WIDTH}"
    return _wide() + [
        {
            "benchmark": f"{title}, {label}",
            "plain": f"{times['training']:.2f} s training passes, {times['frozen']:.2f} s with frozen weights",
            "keeptune": f"{times[name]:.2f} s",
            "ratio": f"{times[name] / times['training']:.2f} x / {times[name] / times['frozen']:.2f} x",
            "check": f"relative error of input factors {max(errors):.2f} at most"
            if name == "low rank"
            else f"{len(targets)} targets",
        }
        for name, label in forms.items()
    ]
