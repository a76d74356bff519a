"""Memory and work of a run, estimated from shapes: pure functions, each with its formula.

Symbols: P parameters, T trained numbers, F frozen numbers that an adapter adds, L blocks, h hidden size, a numbers of
all query heads, k of all key heads, f of an MLP's inside, V vocabulary, S tokens of a sequence (``length``), B
sequences at once (``batch``), e bytes of a number of the base. ``whole``: every weight is trained, in float32, under
autocast where the base has 16 bits. Memory is in bytes, work in floating-point operations.
``tests/pipeline/dry_run/test_estimate.py`` holds each against a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.benchmark import Timer

from keeptune.core.target import Target
from keeptune.pipeline.dry_run.model_shapes import ModelShape

# The optimisers' states, bytes for each trained number: the first name that the optimiser's contains.
_STATES = {"lion_8bit": 1, "8bit": 2, "4bit": 1, "ademamix": 12, "adafactor": 0, "sgd": 0}
_STATES |= {"lion": 4, "adagrad": 4, "rmsprop": 4, "": 8}
_TILE = (4096, 32768)  # tokens and words of the tiles in which TRL takes the loss: the logits are never there at once
_ONCE = 2**28  # logits at once while scoring (evaluation/scored_tokens.py)
_CHUNK = 256  # tokens whose logarithms are taken at once while scoring
# Bytes of a logit by what is done with it, a e + b: nothing but the tiles above, losses of whole answers, KL to the
# base (both answers in float32, their terms, their gradients), statistics and writing (drawn in float64).
_LOGITS = {"log_probs": (0, 0), "answers": (1, 12), "base": (2, 28), "statistics": (1, 20), "writing": (0, 28)}


def weight_bytes(shape: ModelShape, packed: Mapping[str, Any] | None = None) -> int:
    """Computes the base's weights: e each, but for those of linear maps that are ``packed``, with their scales.

    Args:
        shape: Of the base; embeddings, norms and the head are never packed.
        packed: The fields of Transformers' config of the quantisation; None packs nothing.
    """
    if packed is None or packed.get("dequantize"):
        return shape.size * shape.parameters
    kind = str(packed.get("quant_method") or "bitsandbytes")
    # bitsandbytes packs modules, not parameters that hold all experts of a block; mxfp4 packs these alone.
    fused = {"bitsandbytes": (False,), "mxfp4": (True,)}.get(kind, (True, False))
    numbers = sum(t.out_features * t.in_features for t in shape.linear if (t.expert is not None) in fused)
    return int(packed_bits(packed) / 8 * numbers) + shape.size * (shape.parameters - numbers)


def packed_bits(packed: Mapping[str, Any]) -> float:
    """Computes the bits of a packed number with its share of the scales; 16 of a kind that is not known.

    bitsandbytes has a float32 for each 64 numbers, with double quantisation 8 bits and a float32 for each 256 of these.
    Others have a 16-bit scale and a zero for each group (GPTQ, AWQ, HQQ, torchao) or 8 bits for each 32 (mxfp4).
    """
    kind = str(packed.get("quant_method") or "bitsandbytes")
    if "bitsandbytes" in kind:
        four = packed.get("load_in_4bit") or packed.get("_load_in_4bit")
        scales = 8 / 64 + 32 / (64 * 256) if packed.get("bnb_4bit_use_double_quant") else 32 / 64
        return 4 + scales if four else 8
    if kind == "mxfp4":
        return 4 + 8 / 32
    if "fp8" in kind:
        return 8
    if kind in ("gptq", "awq", "hqq", "auto-round", "torchao"):
        four = "int8" not in str(packed.get("quant_type", ""))
        bits = float(packed.get("bits") or packed.get("nbits") or (4 if four else 8))
        return bits + (16 + bits) / float(packed.get("group_size") or 128)
    return 16


def optimizer_states(optimizer: str) -> int:
    """Returns the bytes of an optimiser's states for each trained number: 8 of AdamW, 2 of it in 8 bits."""
    return next(size for word, size in _STATES.items() if word in optimizer)


def head_bytes(shape: ModelShape, *, batch: int, length: int, device: str, smoothed: bool = False) -> int:
    """Computes what the loss takes beside the activations, at the end of the forward pass.

    TRL projects tiles of at most 4,096 tokens and 32,768 words: 2 for each of a tile's numbers where Triton folds them
    (CUDA), 31 where torch does, in float32. Label smoothing forms all logits.
    """
    if smoothed:
        return logit_bytes(shape, batch * length, "answers")
    tokens, words = min(batch * length, _TILE[0]), min(shape.vocabulary, _TILE[1])
    return tokens * words * (2 if device.startswith("cuda") else 31)


def logit_bytes(shape: ModelShape, tokens: int, use: str, most: float = math.inf) -> int:
    """Computes what all logits of some tokens take for a use, at most ``most`` of them at once: ``B S V (a e + b)``."""
    a, b = _LOGITS[use]
    return int(min(tokens * shape.vocabulary, most)) * (a * shape.size + b)


def scoring_bytes(shape: ModelShape, *, rows: int, length: int, models: int) -> int:
    """Computes the logits that scoring holds: of a batch below 2**28 numbers, once for each model that is compared.

    Logarithms, in float32, are taken of 256 tokens at a time, with 24 bytes a number where two models are compared.
    """
    batch = min(rows, max(1, _ONCE // max(length * shape.vocabulary, 1))) * length
    each = 24 if models > 1 else shape.size + 8
    return shape.vocabulary * (batch * models * shape.size + min(batch, _CHUNK) * each)


def inference_bytes(shape: ModelShape, tokens: int) -> int:
    """Computes what a forward pass without gradients holds at its widest block: ``e (wide + a + 2 k + 4 h)``."""
    return tokens * shape.size * (shape.wide + shape.attention + 2 * shape.cached + 4 * shape.hidden)


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
    """Computes what a forward pass keeps of the blocks for the backward pass, as Llama's with fused attention.

    Each token and block: ``e (n + 2 a + 2 k + wide + r) + 8 h``, where n sums the inputs of tuned maps (maps that share
    an input keep it once in float32; in 16 bits autocast makes a copy for each), wide is 3 f for a gated MLP and f
    for another, r sums ranks, and 8 h are the inputs of two norms, in float32. With checkpointing one block at a time,
    and ``e h`` for the others. Where all weights are trained, norms keep ``8 h`` more, and autocast ``e`` for each
    weight of the maps.
    """
    e = shape.size
    groups = {t.input_group if e == 4 else t.name: shape.share(t) * t.in_features for t in tuned}
    norms = (16 if whole else 8) * shape.hidden
    blocks = e * (int(sum(groups.values())) + ranks) + shape.blocks * (
        e * (2 * shape.attention + 2 * shape.cached + shape.wide) + norms
    )
    if checkpointing:
        blocks = blocks // shape.blocks + e * shape.hidden * shape.blocks
    copies = e * sum(t.out_features * t.in_features for t in tuned) if whole and e < 4 else 0
    return batch * length * blocks + copies


def cache_bytes(shape: ModelShape, *, batch: int, length: int) -> int:
    """Computes the memory of the keys and values of a generation: ``2 L k e B S``."""
    return 2 * shape.blocks * shape.cached * shape.size * batch * length


def forward_flops(shape: ModelShape, tokens: float, length: float) -> float:
    """Computes the work of a forward pass: ``2 (Σ m n + V h) + 4 L a S`` for each token, of the experts it reaches.

    Attention is counted over the whole length: half is masked in causal models, but not every kernel leaves it out.
    """
    return tokens * (2 * (shape.active + shape.vocabulary * shape.hidden) + 4 * shape.blocks * shape.attention * length)


def training_flops(
    shape: ModelShape, tokens: float, length: float, *, trained: int, whole: bool, checkpointing: bool = False
) -> float:
    """Computes the work of training on some tokens, all epochs together.

    A forward pass, a backward pass of as much for gradients in the inputs, as much again for gradients in all weights
    where all are trained, and ``6 T`` for each token of an adapter; with checkpointing one forward pass more.
    """
    passes = (3 if whole else 2) + checkpointing
    return passes * forward_flops(shape, tokens, length) + (0 if whole else 6 * trained * tokens)


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

    Training reaches a part of the rate, so that times estimated with it are lower bounds of the work's own.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.ones(size, size, device=device, dtype=dtype)
    timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.timeit(repeats).median
