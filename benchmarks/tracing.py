"""Causal tracing of all positions and layers in one pass against one run per restored state."""

from __future__ import annotations

import statistics
import time

import processes
import torch
from random_llama import random_llama
from tests.reference.tracing_reference import heat
from torch import Tensor

from keeptune.data.calibration import Calibration
from keeptune.model.probes.causal_tracing import Noise, Reading, Tracer, embedding_std, noise_of

WIDTH, LAYERS, VOCABULARY, PROMPT, ANSWER = 256, 8, 8192, 64, 32
ROUNDS = 1  # processor time hardly depends on what else the machine does


def traced(reading: Reading, chunk: int, *, plain: bool = False) -> tuple[float, float, Tensor]:
    """Trace one text of random tokens by a random model.

    Args:
        reading: Which states are restored.
        chunk: Tokens in a pass.
        plain: Do one run per state, as the tests' reference does.

    Returns:
        Seconds of processor time; the peak of memory above what the model and one pass of it take, in MiB; the effects.
    """
    torch.manual_seed(0)
    model = random_llama(WIDTH, LAYERS, VOCABULARY, initializer_range=0.1).eval()
    ids = tuple(torch.randint(VOCABULARY, (PROMPT + ANSWER,)).tolist())
    (batch,) = Calibration.of_answers((ids,), 0, (PROMPT,)).batches()
    std = embedding_std(model)
    with torch.no_grad():
        model(batch.input_ids)
    before, start = processes.peak(), time.process_time()
    if plain:
        found = heat(model, ids, PROMPT, Noise().values(ids, PROMPT, WIDTH, std), reading)
    else:
        found = Tracer(model, reading=reading, chunk=chunk).trace(batch, noise_of(Noise(), batch, model, std))[0].heat
    return time.process_time() - start, processes.peak() - before, found


def measured(reading: Reading, chunk: int, plain: bool) -> tuple[float, float]:
    """Measure one way in a process of its own.

    Args:
        reading: Which states are restored.
        chunk: Tokens in a pass.
        plain: Do one run per state.

    Returns:
        Seconds and MiB.
    """
    code = f"import tracing; print(*tracing.traced({reading!r}, {chunk}, plain={plain})[:2])"
    seconds, peak = processes.numbers_of(code)
    return seconds, peak


def rows() -> list[dict[str, str]]:
    """Let the ways take turns."""
    found = []
    readings: tuple[Reading, ...] = ("diagonal", "positions")
    for reading in readings:
        ways = {"single": (1, True), "small": (512, False), "fast": (2048, False)}
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, (chunk, plain) in ways.items():
                runs[way].append(measured(reading, chunk, plain))
        time_of = {way: statistics.median(seconds for seconds, _ in times) for way, times in runs.items()}
        memory = {way: statistics.median(peak for _, peak in times) for way, times in runs.items()}
        told = {way: f"{time_of[way]:.2f} s, {memory[way]:.0f} MiB" for way in ways}
        fast, slow = (traced(reading, 2048, plain=plain)[2] for plain in (False, True))
        gap = float((fast - slow).abs().max() / slow.abs().max())
        size = f"{LAYERS} layers of {WIDTH}, {PROMPT} + {ANSWER} tokens"
        for way in ("fast", "small"):
            found.append(
                {
                    "benchmark": f"tracing, {reading}: {size}, chunk {ways[way][0]}",
                    "plain": f"one run per state {told['single']}",
                    "keeptune": told[way],
                    "ratio": f"{time_of['single'] / time_of[way]:.1f} x",
                    "check": f"largest difference over the largest effect: {gap:.1e}",
                }
            )
    return found
