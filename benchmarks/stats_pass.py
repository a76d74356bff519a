"""The statistics pass against a plain forward pass over the same tokens."""

from __future__ import annotations

from typing import Literal

import torch
from random_llama import random_llama
from timing import compare

from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.runner import Runner, Taps
from keeptune.statistics.covariance import InputCovariance

WIDTH, LAYERS, VOCABULARY = 512, 4, 8192


def rows() -> list[dict[str, str]]:
    """Time a pass with and without covariances: each input once, and once per target."""
    torch.manual_seed(0)
    model = random_llama(WIDTH, LAYERS, VOCABULARY).eval()
    ids = torch.randint(VOCABULARY, (16, 256)).tolist()
    batches = Calibration(tuple(map(tuple, ids)), 0).batches(4096)
    targets = find_targets(model)
    runner = Runner(model)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def collect(per_target: bool, precision: Literal["single", "double"] = "single") -> None:
        request, sums = InputCovariance("knowledge", precision=precision), {}
        for target in targets:
            site = target.name if per_target else request.site(target)
            if site not in sums:
                sums[site] = request.accumulator(target, model.device, torch.Tensor)
        runner.run(batches, Taps({site: [total.add] for site, total in sums.items()}), title="")
        for total in sums.values():
            total.result()

    times = compare(
        {
            "forward": forward,
            "shared": lambda: collect(False),
            "per target": lambda: collect(True),
            "double": lambda: collect(False, "double"),
        },
        rounds=5,
    )
    name = f"statistics pass, {LAYERS} layers of {WIDTH}, 4096 tokens"
    return [
        {
            "benchmark": f"{name}, {label}",
            "plain": f"{times['forward']:.3f} s forward",
            "keeptune": f"{times[key]:.3f} s",
            "ratio": f"{times[key] / times['forward']:.2f} x a forward pass",
            "check": f"{len(targets)} targets",
        }
        for label, key in (
            ("each input once", "shared"),
            ("each target on its own", "per target"),
            ("each input once, in float64", "double"),
        )
    ]
