"""A training step with residual and twin anchors against plain PEFT LoRA of the same rank."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from random_llama import random_llama
from timing import compare
from transformers import LlamaForCausalLM

from keeptune.adapter.install import install
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.weights import read_weight
from keeptune.methods.lora_null import null_factors
from keeptune.model.blocks import find_targets

WIDTH, LAYERS, RANK = 512, 4, 16


def _plan(model: LlamaForCausalLM) -> Plan:
    built = []
    for target in find_targets(model):
        U = torch.linalg.qr(torch.randn(target.in_features, RANK))[0].double()
        init, _ = null_factors(read_weight(model, target), U)
        built.append(TargetPlan(target, Decision(RANK), init, 1.0, frozenset({"A", "B"})))
    return Plan("benchmark", {}, tuple(built))


def rows() -> list[dict[str, str]]:
    """Time forward, backward and AdamW step on the same batch."""
    torch.manual_seed(0)
    base = random_llama(WIDTH, LAYERS)
    plan = _plan(base)
    ids = torch.randint(4096, (8, 128))
    stock = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[t.target.name for t in plan.targets])
    models: dict[str, Any] = {
        "peft": get_peft_model(copy.deepcopy(base), stock),
        "residual": install(copy.deepcopy(base), plan, anchor="residual"),
        "twin": install(copy.deepcopy(base), plan, anchor="twin"),
    }
    optimisers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
        for name, model in models.items()
    }

    def step(name: str) -> None:
        models[name](input_ids=ids, labels=ids).loss.backward()
        optimisers[name].step()
        optimisers[name].zero_grad()

    times = compare({name: lambda n=name: step(n) for name in models}, rounds=15)
    return [
        {
            "benchmark": f"training step, {LAYERS} layers of {WIDTH}, r {RANK}, anchor {name}",
            "plain": f"{times['peft']:.3f} s PEFT LoRA",
            "keeptune": f"{times[name]:.3f} s",
            "ratio": f"{100 * (times[name] / times['peft'] - 1):+.1f}%",
            "check": "same batch, same rank",
        }
        for name in ("residual", "twin")
    ]
