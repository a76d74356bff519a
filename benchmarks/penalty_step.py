"""A training step with each penalty against the same step without: all seven module kinds, curvature of rank 64.

The adapter of ``keep`` starts as LoRA does (B = 0); that of the others as a part of W, which doubles the rank of what a
penalty multiplies.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
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
from keeptune.linalg.symmetric import Dense, LowRankDiagonal, PsdMatrix
from keeptune.model.blocks import find_targets

WIDTH, LAYERS, TOKENS, CURVATURE = 1024, 3, 1024, 64
WIDE = 4096  # one layer, half the tokens
KINDS = {
    "l2": ("l2", {}, None),
    "delta-act, factors of rank 64": ("laplace", {"curvature": "delta-act"}, CURVATURE),
    "delta-kfac, factors of rank 64": ("laplace", {"curvature": "delta-kfac"}, CURVATURE),
    "delta-act, dense factors": ("laplace", {"curvature": "delta-act"}, None),
    "delta-kfac, dense factors": ("laplace", {"curvature": "delta-kfac"}, None),
}
KEEP = {
    "keep, dense factors": ("drift", {}, None),
    "keep, factors of rank 64": ("drift", {}, CURVATURE),
    "keep in nats, dense factors": ("drift", {"curvature": "delta-kfac"}, None),
    "keep in nats, factors of rank 64": ("drift", {"curvature": "delta-kfac"}, CURVATURE),
}
WIDE_KEEP = {"keep in nats, factors of rank 64": ("drift", {"curvature": "delta-kfac"}, CURVATURE)}
WIDE_KEEP["keep in nats, factors of rank 288"] = ("drift", {"curvature": "delta-kfac"}, 288)


def _plan(model: LlamaForCausalLM, rank: int, size: float) -> Plan:
    built = []
    for target in find_targets(model):
        B, A = torch.randn(target.out_features, rank) * size, torch.randn(rank, target.in_features) * 0.02
        built.append(TargetPlan(target, Decision(rank), LowRank(B, A), 1.0, frozenset({"A", "B"})))
    return Plan("benchmark", {}, tuple(built))


def _factor(size: int, rank: int | None) -> PsdMatrix:
    if rank is None:
        return Dense(torch.eye(size) + 1.0 / size)
    U = torch.linalg.qr(torch.randn(size, rank))[0]
    return LowRankDiagonal(U, torch.rand(rank) + 1, torch.full((size,), 0.5)).halved()


def _penalty(plan: Plan, name: str, options: dict[str, Any], rank: int | None) -> PenaltyPlan:
    tensors: dict[str, Tensor] = {}
    for t in plan.targets:
        tensors[f"weight:{t.target.name}"] = tensors[f"norm:{t.target.name}"] = torch.tensor(1e-3)
        if name == "drift":
            tensors |= {f"share:{t.target.name}": torch.tensor(1e-3), f"group:{t.target.name}": torch.tensor(0)}
            tensors |= {key: torch.zeros(1, dtype=torch.float64) for key in ("log multiplier", "log pressure")}
            tensors["budget"] = torch.ones(1, dtype=torch.float64)
        if name != "l2":
            prefix = f"Omega:{t.target.input_group}:"
            if not any(key.startswith(prefix) for key in tensors):
                tensors |= _factor(t.target.in_features, rank).tensors(prefix)
            tensors |= _factor(t.target.out_features, rank).tensors(f"Gamma:{t.target.name}:")
    return PenaltyPlan(name, options, tensors)


def _rows(
    kinds: Mapping[str, tuple[str, dict[str, Any], int | None]], rank: int, size: float, *, wide: bool = False
) -> list[dict[str, str]]:
    torch.manual_seed(0)
    width, layers, tokens, rounds = (WIDE, 1, TOKENS // 2, 3) if wide else (WIDTH, LAYERS, TOKENS, 7)
    base = random_llama(width, layers, **({"intermediate_size": width} if wide else {}))
    plan = _plan(base, rank, size)
    model = install(copy.deepcopy(base), plan, anchor="residual")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 1e-6)
    ids = torch.randint(4096, (tokens // 128, 128))
    held = {
        name: keeptune.Penalties(model, dataclasses.replace(plan, penalties=(_penalty(plan, *kind),)))
        for name, kind in kinds.items()
    }

    def step(name: str | None) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if name is not None:
            held[name].step()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    times = compare({"without": lambda: step(None)} | {name: lambda n=name: step(n) for name in kinds}, rounds=rounds)
    alone = compare({name: held[name].step for name in kinds}, rounds=rounds)
    optimiser.zero_grad()
    return [
        {
            "benchmark": f"training step, {layers} layers of {width}, {tokens} tokens, r {rank}, {name}",
            "plain": f"{times['without']:.3f} s without",
            "keeptune": f"{times[name]:.3f} s",
            "ratio": f"{100 * (times[name] / times['without'] - 1):+.1f}%",
            "check": f"penalty alone {alone[name]:.4f} s, {100 * alone[name] / times['without']:.1f}%",
        }
        for name in kinds
    ]


def rows() -> list[dict[str, str]]:
    """Time forward, backward, penalty, clipping and AdamW step on the same batch."""
    started = [row for rank in (16, 64) for row in _rows(KINDS, rank, 0.02)]
    return started + [row for rank in (8, 16) for row in _rows(KEEP, rank, 0.0)] + _rows(WIDE_KEEP, 8, 0.0, wide=True)
