"""Repair of a LoRA at every target: its passes over the data, its eigenproblems and its solves."""

from __future__ import annotations

import torch
from random_llama import random_llama
from timing import compare

from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.runner import Runner, Taps
from keeptune.posthoc.repair_equations import Curve, Solution, damped, directions, mu_for_drift
from keeptune.statistics.covariance import InputCovariance

WIDTH, LAYERS, VOCABULARY, RANK, MU = 512, 4, 8192, 16, 0.3


def rows() -> list[dict[str, str]]:
    """Time repair with one μ and with a drift budget against (2) for each target alone, and its passes."""
    torch.manual_seed(0)
    model = random_llama(WIDTH, LAYERS, VOCABULARY).eval()
    batches = Calibration(tuple(map(tuple, torch.randint(VOCABULARY, (16, 256)).tolist())), 0).batches(4096)
    targets = find_targets(model)
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.input_group, []).append(target)
    changes = {t.name: LowRank(torch.randn(t.out_features, RANK), torch.randn(RANK, t.in_features)) for t in targets}

    def collected() -> dict[str, torch.Tensor]:
        request = InputCovariance("knowledge")
        sums = {name: request.accumulator(group[0], model.device, torch.Tensor) for name, group in groups.items()}
        Runner(model).run(batches, Taps({name: [total.add] for name, total in sums.items()}), title="")
        return {name: total.result().double() for name, total in sums.items()}

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    omega = collected()
    omega_t = {name: damped(matrix, 1e-3) for name, matrix in omega.items()}

    def plain() -> list[torch.Tensor]:
        found = []
        for target in targets:
            t, k = omega_t[target.input_group], omega[target.input_group]
            found.append(changes[target.name].dense().double() @ t @ torch.linalg.inv(t + MU * k))
        return found

    def shared() -> list[LowRank]:
        found = []
        for name, group in groups.items():
            solved = Solution(omega_t[name], omega[name], MU)
            found += [solved.of(changes[target.name]) for target in group]
        return found

    def budget() -> float:
        curves = []
        for name, group in groups.items():
            along = directions(omega_t[name], omega[name])
            curves += [Curve.of(changes[target.name], along, 1.0) for target in group]
        return mu_for_drift(curves, 0.1 * sum(curve.at(0.0) for curve in curves) / len(curves))

    order = [target.name for group in groups.values() for target in group]
    whole = dict(zip([target.name for target in targets], plain(), strict=True))
    gap = max(
        float((ours.dense() - whole[name]).norm() / whole[name].norm())
        for name, ours in zip(order, shared(), strict=True)
    )
    times = compare(
        {"forward": forward, "pass": collected, "plain": plain, "shared": shared, "budget": budget}, rounds=5
    )
    name = f"repair, {LAYERS} layers of {WIDTH}, r {RANK}, {len(targets)} targets"
    return [
        {
            "benchmark": f"{name}: one solve for each input",
            "plain": f"{times['plain']:.3f} s, an inverse for each target",
            "keeptune": f"{times['shared']:.3f} s",
            "ratio": f"{times['plain'] / times['shared']:.1f} x faster",
            "check": f"same change to {gap:.0e}",
        },
        {
            "benchmark": "the μ of a drift budget (an eigenproblem for each input)",
            "plain": f"{30 * times['shared']:.1f} s, 30 solves",
            "keeptune": f"{times['budget']:.3f} s",
            "ratio": f"{30 * times['shared'] / times['budget']:.1f} x faster",
            "check": "budget met",
        },
        {
            "benchmark": "its statistics, 4096 tokens",
            "plain": f"{times['forward']:.3f} s forward",
            "keeptune": f"{times['pass']:.3f} s",
            "ratio": f"{times['pass'] / times['forward']:.2f} x a forward pass",
            "check": f"{len(groups)} inputs",
        },
    ]
