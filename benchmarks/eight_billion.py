"""One block of Llama-3.1-8B's shapes (random weights): plan and training step of each method, seconds and peak.

    python benchmarks/eight_billion.py [METHOD ...]      # by default all of METHODS; up to ten minutes each

The whole model has 32 such blocks, planned one after another: plans take 32 times the seconds at the same peak
(``memory: blockwise``). Printed as rows of RESULTS.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import processes
from blockwise import EIGHT, made

METHODS = ("lora", "l2-lora", "keep", "lalora", "farss", "loki", "pissa", "lora-null")
_SECONDS = 600
_PROBE = """
import sys, tempfile, time, torch
from pathlib import Path
import keeptune
from processes import peak
from keeptune.data.calibration import Calibration
from keeptune.methods.base import method_named
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.store import StatStore
options = {"loki": {"q": 30.0}, "farss": {"scores": "streaming", "boundary": 0}}
method = method_named(sys.argv[2])(**options.get(sys.argv[2], {}))
model = load_model(sys.argv[1], LoadOptions(dtype="bfloat16"))
ids = torch.randint(4096, (4, 256), generator=torch.Generator().manual_seed(0))
tokens = Calibration.of_answers(tuple(map(tuple, ids.tolist())), 0, (128,) * 4)
started = time.perf_counter()
with tempfile.TemporaryDirectory() as store:
    data = {"knowledge": tokens, "task": tokens}
    plan = plan_for(model, method, StatStore(Path(store)), data=data, options=PlanOptions(memory="blockwise"))
planned, at_plan = time.perf_counter() - started, peak() / 1024
tuned = keeptune.install(model, plan)
penalties = keeptune.Penalties(tuned, plan) if plan.penalties else None
optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad])
for _ in range(2):
    started = time.perf_counter()
    tuned(input_ids=ids[:2], labels=ids[:2]).loss.backward()
    if penalties is not None:
        penalties.step()
    optimizer.step()
    optimizer.zero_grad()
    step = time.perf_counter() - started
print(planned, at_plan, step, peak() / 1024)
"""


def row(folder: str, name: str) -> str:
    """Return a row of the table, or why there is none."""
    try:
        planned, at_plan, step, peak = processes.numbers_of(_PROBE, folder, name, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"| {name} | over {_SECONDS} s | - | - | - |"
    except RuntimeError as error:
        return f"| {name} | {str(error).splitlines()[-1]} | - | - | - |"
    plan = f"{planned:.0f} s | {32 * planned / 60:.0f} min | {at_plan:.1f} GiB"
    return f"| {name} | {plan} | {step:.1f} s, {peak:.1f} GiB |"


def main() -> None:
    """Print the table."""
    print("| method | plan of a block | of 32 | peak | step of 512 tokens, peak |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as root:
        folder = made(Path(root) / "one", **EIGHT)
        for name in sys.argv[1:] or METHODS:
            print(row(folder, name), flush=True)


if __name__ == "__main__":
    main()
