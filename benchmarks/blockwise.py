"""Statistics one block at a time from safetensors against the whole model: seconds, and peaks of processes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import processes

WIDTH, DEPTHS = 1024, (8, 16, 32)
_TIMED = 16
# A block of Llama-3.1-8B's shapes, of fewer words.
EIGHT = {"width": 4096, "layers": 1, "heads": 32, "intermediate_size": 14336, "num_key_value_heads": 8}
_MAKE = """
import json, sys, torch
from random_llama import random_llama
torch.set_default_dtype(torch.bfloat16)
random_llama(**json.loads(sys.argv[2]), dtype="bfloat16").save_pretrained(sys.argv[1])
"""
_PROBE = """
import sys, tempfile, time, torch
from pathlib import Path
from processes import peak
from keeptune.data.calibration import Calibration
from keeptune.model.pretrained import load_offloaded
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.model.blockwise import BlockwiseRunner
from keeptune.model.blocks import find_targets
from keeptune.model.runner import Runner
from keeptune.statistics.collect import collect
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.store import StatStore
folder, way, roles, texts = sys.argv[1], sys.argv[2], sys.argv[3].split(","), int(sys.argv[4])
load = load_model if way == "resident" else load_offloaded
started = time.perf_counter()
model = load(folder, LoadOptions(dtype="bfloat16"))
ids = torch.randint(4096, (texts, 256), generator=torch.Generator().manual_seed(0)).tolist()
data = {"knowledge": Calibration(tuple(map(tuple, ids)), 0)}
wanted = frozenset({InputCovariance("knowledge"), GradientCovariance("knowledge", "sampled")})
runner = Runner(model) if way == "resident" else BlockwiseRunner(model)
with tempfile.TemporaryDirectory() as store:
    requests = {target: wanted for target in find_targets(model, roles)}
    collect(runner, requests, data, StatStore(Path(store)), model_fingerprint="random")
print(peak(), time.perf_counter() - started)
"""


def measure(folder: str, way: str, roles: str, texts: int) -> tuple[float, float]:
    """Return the peak of a process in MiB, and its seconds without imports."""
    peak, seconds = processes.numbers_of(_PROBE, folder, way, roles, str(texts))
    return peak, seconds


def made(folder: Path, **sizes: int) -> str:
    """Save a random model in bfloat16."""
    processes.numbers_of(_MAKE, str(folder), json.dumps(sizes))
    return str(folder)


def rows() -> list[dict[str, str]]:
    """Measure inputs and gradients of q_proj and o_proj, and a block of Llama-3.1-8B's shapes, times 32."""
    with tempfile.TemporaryDirectory() as root:
        peaks, whole = [], (0.0, 0.0)
        timed = 0.0
        for depth in DEPTHS:
            folder = made(Path(root) / str(depth), width=WIDTH, layers=depth, heads=16)
            peak, seconds = measure(folder, "blockwise", "q_proj,o_proj", 16)
            peaks.append(peak)
            if depth == _TIMED:
                timed, whole = seconds, measure(folder, "resident", "q_proj,o_proj", 16)
        one = made(Path(root) / "one", **EIGHT)
        peak, seconds = measure(one, "blockwise", "q_proj,k_proj,v_proj,o_proj", 4)
    spread = max(peaks) / min(peaks)
    return [
        {
            "benchmark": f"statistics of gradients, {_TIMED} layers of {WIDTH}, bf16, 4,096 tokens",
            "plain": f"resident {whole[1]:.1f} s, {whole[0]:.0f} MiB",
            "keeptune": f"blockwise {timed:.1f} s, {peaks[DEPTHS.index(_TIMED)]:.0f} MiB",
            "ratio": f"{timed / whole[1]:.2f} x the time",
            "check": "at most 1.3",
        },
        {
            "benchmark": f"peak of blockwise at {', '.join(map(str, DEPTHS))} layers of {WIDTH}",
            "plain": f"{peaks[0]:.0f} MiB",
            "keeptune": ", ".join(f"{value:.0f}" for value in peaks) + " MiB",
            "ratio": f"{spread:.2f}",
            "check": "at most 1.10",
        },
        {
            "benchmark": "a block of Llama-3.1-8B's shapes (4,096 words), gradients of q, k, v, o, 1,024 tokens",
            "plain": "-",
            "keeptune": f"{seconds:.1f} s, {peak:.0f} MiB",
            "ratio": f"times 32: {32 * seconds:.0f} s",
            "check": "-",
        },
    ]
