"""Causal tracing of all positions and layers in one pass against one run per restored state."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keeptune.data.calibration import Calibration
from keeptune.model.probes.causal_tracing import Noise, Reading, Traced, Tracer, embedding_std, noise_of

WIDTH, LAYERS, VOCABULARY, PROMPT, ANSWER = 256, 8, 8192, 64, 32
ROUNDS = 1  # processor time hardly depends on what else the machine does


def traced(reading: Reading, chunk: int, *, plain: bool = False) -> tuple[float, float, Sequence[Traced]]:
    """Trace one text of random tokens by a random model; the fast way holds two states against the plain way.

    Args:
        reading: Which states are restored.
        chunk: Tokens in a pass.
        plain: Do one run per state.

    Returns:
        Seconds of processor time; the peak of memory above what the model and one pass of it take, in MiB; what was
        found.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    ids = tuple(torch.randint(VOCABULARY, (PROMPT + ANSWER,)).tolist())
    (batch,) = Calibration((ids,), 0, (PROMPT,)).batches()
    noise = noise_of(Noise(), batch, model, embedding_std(model))
    with torch.no_grad():
        model(batch.input_ids)
    before, start = _peak(), time.process_time()
    found = Tracer(model, reading=reading, chunk=chunk, plain=plain).trace(batch, noise)
    return time.process_time() - start, _peak() - before, found


def _peak() -> float:
    # VmHWM, not ru_maxrss: that one starts at the size of the process that started this one.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


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
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak


def rows() -> list[dict[str, str]]:
    """Let the ways take turns; the plain one also with as many runs in a batch as the chunk holds."""
    found = []
    readings: tuple[Reading, ...] = ("diagonal", "positions")
    for reading in readings:
        ways = {"single": (1, True), "batched": (2048, True), "small": (512, False), "fast": (2048, False)}
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, (chunk, plain) in ways.items():
                runs[way].append(measured(reading, chunk, plain))
        time_of = {way: statistics.median(seconds for seconds, _ in times) for way, times in runs.items()}
        memory = {way: statistics.median(peak for _, peak in times) for way, times in runs.items()}
        told = {way: f"{time_of[way]:.2f} s, {memory[way]:.0f} MiB" for way in ways}
        fast, slow = (traced(reading, 2048, plain=plain)[2][0].heat for plain in (False, True))
        gap = float((fast - slow).abs().max() / slow.abs().max())
        size = f"{LAYERS} layers of {WIDTH}, {PROMPT} + {ANSWER} tokens"
        for way in ("fast", "small"):
            found.append(
                {
                    "benchmark": f"tracing, {reading}: {size}, chunk {ways[way][0]}",
                    "plain": f"one run per state {told['single']}; in batches {told['batched']}",
                    "keeptune": told[way],
                    "ratio": f"{time_of['single'] / time_of[way]:.1f} x / {time_of['batched'] / time_of[way]:.1f} x",
                    "check": f"largest difference over the largest effect: {gap:.1e}",
                }
            )
    return found
