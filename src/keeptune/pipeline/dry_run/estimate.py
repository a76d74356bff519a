"""Memory and work of a run, estimated from shapes: pure functions, each with its formula.

Symbols: P parameters, T trained numbers, F frozen numbers that an adapter adds, L blocks, h hidden size, a numbers of
all query heads, k of all key heads, f of an MLP's inside, V vocabulary, S tokens of a sequence (``length``), B
sequences at once (``batch``), e bytes of a number of the base. ``whole``: every weight is trained, in float32, under
autocast where the base has 16 bits. Memory is in bytes, work in floating-point operations.
``tests/pipeline/dry_run/test_estimate.py`` holds each against a measurement.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from keeptune.core.target import Target
from keeptune.pipeline.dry_run.model_shapes import ModelShape


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes in use at the peak of training: activations are kept for the backward pass, and include the logits."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    shape: ModelShape, *, trained: int, frozen: int, whole: bool, states: int, activations: int
) -> TrainingMemory:
    """Computes the memory of training, with ``states`` bytes of the optimiser for each trained number (8 for AdamW).

    An adapter: ``e P + 4 (T + F)`` weights, ``4 T`` gradients, ``states T`` of the optimiser: factors are float32
    whatever the base. All weights: ``4 P``, ``4 P`` and ``states P``.
    """
    weights = 4 * shape.parameters if whole else shape.size * shape.parameters + 4 * (trained + frozen)
    return TrainingMemory(weights, 4 * trained, states * trained, activations)


def activation_bytes(
    shape: ModelShape,
    tuned: Sequence[Target],
    *,
    ranks: int,
    batch: int,
    length: int,
    checkpointing: bool = False,
    whole: bool = False,
) -> int:
    """Computes what one forward pass keeps for the backward pass, of blocks as Llama's with fused attention.

    Each token and block: ``e (n + 2 a + 2 k + wide + r) + 8 h``, where n sums the inputs of tuned maps (maps that share
    an input keep it once in float32; in 16 bits autocast makes a copy for each), wide is 3 f for a gated MLP and f
    for another, r sums ranks, and 8 h are the inputs of two norms, in float32. Each token besides: ``V (e + 8)`` of the
    logits, their logarithm in float32 and its gradient. With checkpointing one block at a time, and ``e h`` for the
    others. Where all weights are trained, norms keep ``8 h`` more, and autocast ``e`` for each weight of the maps.
    """
    e = shape.size
    groups = {target.input_group if e == 4 else target.name: target.in_features for target in tuned}
    norms = (16 if whole else 8) * shape.hidden
    blocks = e * (sum(groups.values()) + ranks) + shape.blocks * (
        e * (2 * shape.attention + 2 * shape.cached + shape.wide) + norms
    )
    if checkpointing:
        blocks = blocks // shape.blocks + e * shape.hidden * shape.blocks
    copies = e * sum(t.out_features * t.in_features for t in tuned) if whole and e < 4 else 0
    return batch * length * (blocks + shape.vocabulary * (e + 8)) + copies


def sums_bytes(numbers: Sequence[int], *, low_memory: bool) -> int:
    """Computes the memory of sums of statistics in float64, of which ``low_memory`` holds the largest alone."""
    return 8 * (max(numbers, default=0) if low_memory else sum(numbers))


def cache_bytes(shape: ModelShape, *, batch: int, length: int) -> int:
    """Computes the memory of the keys and values of a generation: ``2 L k e B S``."""
    return 2 * shape.blocks * shape.cached * shape.size * batch * length


def forward_flops(shape: ModelShape, tokens: float, length: float) -> float:
    """Computes the work of a forward pass: ``2 (Σ m n + V h) + 4 L a S`` for each token.

    Attention is counted over the whole length: half is masked in causal models, but not every kernel leaves it out.
    """
    maps = sum(target.out_features * target.in_features for target in shape.linear)
    return tokens * (2 * (maps + shape.vocabulary * shape.hidden) + 4 * shape.blocks * shape.attention * length)


def training_flops(
    shape: ModelShape, tokens: float, length: float, *, trained: int, whole: bool, checkpointing: bool = False
) -> float:
    """Computes the work of training on some tokens, all epochs together.

    A forward pass, a backward pass of as much for gradients in the inputs, as much again for gradients in all weights
    where all are trained, and ``6 T`` for each token of an adapter; with checkpointing one forward pass more.
    """
    passes = (3 if whole else 2) + checkpointing
    return passes * forward_flops(shape, tokens, length) + (0 if whole else 6 * trained * tokens)


def statistics_flops(
    shape: ModelShape, tokens: float, length: float, *, numbers: int, backward: bool, passes: int = 1
) -> float:
    """Computes the work of sums of products: a pass forward, one backward for gradients, and 2 for each number.

    With ``low_memory`` there are several ``passes`` over the data, one for each share of the sums.
    """
    return passes * (2 if backward else 1) * forward_flops(shape, tokens, length) + 2.0 * numbers * tokens


def attribution_flops(shape: ModelShape, texts: int, length: float, steps: int) -> float:
    """Computes the work of attributing answers to neurons: a pass, then ``steps L`` tokens through half of the blocks.

    N texts and ``steps`` points on the path make ``N (S + 2 steps L / 2)`` tokens of a forward pass.
    """
    return forward_flops(shape, texts * (length + steps * shape.blocks), length)


def optimizer_steps(examples: int, *, batch: int, accumulation: int, epochs: float, max_steps: int = -1) -> int:
    """Computes optimiser steps of N examples as the trainer does: ``⌈epochs ⌈⌈N / B⌉ / accumulation⌉⌉``.

    ``max_steps`` counts in place of epochs where it is above 0.
    """
    if max_steps > 0:
        return max_steps
    batches = math.ceil(examples / batch)
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


def gemm_rate(device: str = "cpu", size: int = 1024, repeats: int = 4) -> float:
    """Measures this machine's matrix products, in operations a second, in the dtype that it trains in.

    The fastest of some products of ``size x size`` matrices counts. Training reaches a part of the rate, so that times
    estimated with it are lower bounds of the work's own.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        float((x @ x)[0, 0])  # the read waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
