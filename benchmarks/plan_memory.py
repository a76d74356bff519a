"""Peak memory of `plan` over the loaded model, with all covariances at once and one at a time."""

from __future__ import annotations

import processes

WIDTH, LAYERS = 512, 8
_PROBE = """
import sys, tempfile, threading, time, torch
from pathlib import Path
torch.manual_seed(0)
from random_llama import random_llama
from keeptune.data.calibration import Calibration
from keeptune.methods.lora_null import LoraNull
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.store import StatStore
width, layers, low = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "low"
model = random_llama(width, layers).eval()
tokens = Calibration(tuple(map(tuple, torch.randint(4096, (32, 128)).tolist())), 0)
page = 4096 / 2**20
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page
start, peak, running = resident(), 0.0, True
def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
started = time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    store, options = StatStore(Path(folder)), PlanOptions(memory="blockwise" if low else "resident")
    plan_for(model, LoraNull(rank=16), store, data={"knowledge": tokens}, options=options)
seconds = time.perf_counter() - started
running = False
thread.join()
print(peak - start, seconds)
"""


def rows() -> list[dict[str, str]]:
    """Measure each way in a process of its own: peak resident memory above that of the loaded model."""
    found = {way: processes.numbers_of(_PROBE, str(WIDTH), str(LAYERS), way) for way in ("all", "low")}
    one = (WIDTH * 11 // 4) ** 2 * 8 / 2**20
    return [
        {
            "benchmark": f"plan of LoRA-Null, {LAYERS} layers of {WIDTH}: peak memory above the loaded model",
            "plain": f"{found['all'][0]:.0f} MiB in {found['all'][1]:.1f} s",
            "keeptune": f"{found['low'][0]:.0f} MiB in {found['low'][1]:.1f} s with memory: blockwise",
            "ratio": f"{found['all'][0] / max(found['low'][0], 1):.1f} x less memory, "
            f"{found['low'][1] / found['all'][1]:.1f} x the time",
            "check": f"largest covariance {one:.0f} MiB (float64)",
        }
    ]
