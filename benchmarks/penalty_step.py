"""A training step with each penalty on the weights against the same step without: all seven module kinds.

The adapter starts as a part of W, which doubles the rank of what a penalty multiplies.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from random_llama import random_llama
from timing import compare
from torch import Tensor
from transformers import LlamaForCausalLM

import keeptune
from keeptune.adapter.install import install
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, PenaltyPlan, Plan, TargetPlan
from keeptune.model.blocks import find_targets

WIDTH, LAYERS, TOKENS = 1024, 3, 1024
KINDS = {
    "l2": ("l2", {}),
    "delta-act": ("laplace", {"curvature": "delta-act"}),
    "delta-kfac": ("laplace", {"curvature": "delta-kfac"}),
}


def _plan(model: LlamaForCausalLM, rank: int) -> Plan:
    built = []
    for target in find_targets(model):
        B, A = torch.randn(target.out_features, rank) * 0.02, torch.randn(rank, target.in_features) * 0.02
        built.append(TargetPlan(target, Decision(rank), LowRank(B, A), 1.0, frozenset({"A", "B"})))
    return Plan("benchmark", {}, tuple(built))


def _penalty(plan: Plan, name: str, options: dict[str, Any]) -> PenaltyPlan:
    tensors: dict[str, Tensor] = {}
    for t in plan.targets:
        tensors[f"weight:{t.target.name}"] = tensors[f"norm:{t.target.name}"] = torch.tensor(1e-3)
        if name != "l2":
            n, m = t.target.in_features, t.target.out_features
            tensors[f"Omega:{t.target.input_group}:matrix"] = torch.eye(n) + 1.0 / n
            tensors[f"Gamma:{t.target.name}:matrix"] = torch.eye(m) + 1.0 / m
    return PenaltyPlan(name, options, tensors)


def _rows(rank: int) -> list[dict[str, str]]:
    torch.manual_seed(0)
    base = random_llama(WIDTH, LAYERS)
    plan = _plan(base, rank)
    model = install(copy.deepcopy(base), plan, anchor="residual")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 1e-6)
    ids = torch.randint(4096, (TOKENS // 128, 128))
    held = {
        name: keeptune.Penalties(model, dataclasses.replace(plan, penalties=(_penalty(plan, *kind),)))
        for name, kind in KINDS.items()
    }

    def step(name: str | None) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if name is not None:
            held[name].step()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    times = compare({"without": lambda: step(None)} | {name: lambda n=name: step(n) for name in KINDS}, rounds=7)
    alone = compare({name: held[name].step for name in KINDS}, rounds=7)
    optimiser.zero_grad()
    return [
        {
            "benchmark": f"training step, {LAYERS} layers of {WIDTH}, {TOKENS} tokens, r {rank}, {name}",
            "plain": f"{times['without']:.3f} s without",
            "keeptune": f"{times[name]:.3f} s",
            "ratio": f"{100 * (times[name] / times['without'] - 1):+.1f}%",
            "check": f"penalty alone {alone[name]:.4f} s, {100 * alone[name] / times['without']:.1f}%",
        }
        for name in KINDS
    ]


def rows() -> list[dict[str, str]]:
    """Time forward, backward, penalty, clipping and AdamW step on the same batch."""
    return [row for rank in (16, 64) for row in _rows(rank)]
