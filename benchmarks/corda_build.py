"""CorDA through keeptune against PEFT's preprocess_corda and get_peft_model, on one model and the same examples."""

from __future__ import annotations

import statistics

import processes
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from keeptune.methods.corda import conditioned, oriented_factors

WIDTH, LAYERS, RANK = 1024, 2, 16
EXAMPLES, LENGTH, ROUNDS = 32, 128, 3

# Each way in a process of its own: seconds, and the peak of resident memory above that of the loaded model.
_PROBE = f"""
import sys, tempfile, time, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from processes import peak
from random_llama import random_llama
from keeptune.adapter.install import install
from keeptune.data.calibration import Calibration
from keeptune.methods.corda import Corda
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.store import StatStore
torch.manual_seed(0)
model = random_llama({WIDTH}, {LAYERS}, 2048, heads=16).eval()
ids = torch.randint(2048, ({EXAMPLES}, {LENGTH}))
roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
with torch.no_grad():
    model(ids[:1])
before, start, way = peak(), time.perf_counter(), sys.argv[1]
if way == "peft":
    config = LoraConfig(r={RANK}, lora_alpha={RANK}, target_modules=roles, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"))
    def run():
        for row in ids:
            model(row[None])
    preprocess_corda(model, config, run_model=run)
    get_peft_model(model, config)
else:
    tokens = Calibration(tuple(map(tuple, ids.tolist())), 0)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_for(model, Corda(rank={RANK}, mode="kpm"), StatStore(Path(folder)), data={{"knowledge": tokens}},
            options=PlanOptions(targets=roles, memory="blockwise" if way == "low" else "resident"))
    install(model, plan, anchor="residual")
print(time.perf_counter() - start, peak() - before)
"""


def measured(way: str) -> tuple[float, float]:
    """Run one way once.

    Args:
        way: ``"peft"``, ``"keeptune"`` or ``"low"``.

    Returns:
        Seconds and MiB.
    """
    seconds, peak = processes.numbers_of(_PROBE, way)
    return seconds, peak


def angle(mode: str) -> float:
    """Compare ours with the definition in float64 on one steep problem: whole SVD of W C, damped as PEFT's is.

    Args:
        mode: ``"kpm"`` or ``"ipm"``.

    Returns:
        The largest principal angle between the output directions.
    """
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4 * WIDTH, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH)
    W = torch.randn(WIDTH, WIDTH, generator=generator)
    C = conditioned(X.T @ X / len(X), 0.01)
    U: Tensor = torch.linalg.svd(W.double() @ C)[0]
    wanted = U[:, :RANK] if mode == "ipm" else U[:, -RANK:]
    found = oriented_factors(W, C, RANK, "top" if mode == "ipm" else "bottom", "the weight")[0]
    return float(subspace_angles(found.B.double().numpy(), wanted.numpy()).max())


def rows() -> list[dict[str, str]]:
    """Let the three take turns, so that a noisy neighbour hits all of them alike."""
    ways = ("peft", "keeptune", "low")
    runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in ways:
            runs[way].append(measured(way))
    seconds = {way: statistics.median(s for s, _ in found) for way, found in runs.items()}
    peak = {way: statistics.median(p for _, p in found) for way, found in runs.items()}
    check = f"largest principal angle to float64: kpm {angle('kpm'):.1e}, ipm {angle('ipm'):.1e}"
    return [
        {
            "benchmark": f"CorDA kpm, {LAYERS} layers of {WIDTH}, r {RANK}, {EXAMPLES * LENGTH} tokens, {label}",
            "plain": f"PEFT {seconds['peft']:.1f} s, {peak['peft']:.0f} MiB",
            "keeptune": f"{seconds[way]:.1f} s, {peak[way]:.0f} MiB",
            "ratio": f"{seconds['peft'] / seconds[way]:.1f} x faster, {peak[way] / peak['peft']:.2f} x the peak memory",
            "check": check,
        }
        for way, label in (("keeptune", "all covariances at once"), ("low", "blockwise"))
    ]
