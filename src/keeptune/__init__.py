"""keeptune: fine-tune a language model without destroying what it already knows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keeptune.adapter.install import install
    from keeptune.api import export, measure, plan
    from keeptune.core.errors import KeeptuneError
    from keeptune.core.low_rank import LowRank
    from keeptune.core.plan import Plan
    from keeptune.evaluation.benchmarks import Benchmark
    from keeptune.evaluation.model_pairs import AdapterPair, TwoModels
    from keeptune.methods.combined import Combined, Part
    from keeptune.methods.corda import Corda
    from keeptune.methods.dora import Dora
    from keeptune.methods.eva import Eva
    from keeptune.methods.farss import Farss
    from keeptune.methods.full import Full
    from keeptune.methods.kasa import Kasa
    from keeptune.methods.keep import Keep
    from keeptune.methods.l2_lora import L2Lora
    from keeptune.methods.lalora import Lalora
    from keeptune.methods.loki import Loki
    from keeptune.methods.lora import Lora
    from keeptune.methods.lora_fa import LoraFA
    from keeptune.methods.lora_ga import LoraGA
    from keeptune.methods.lora_null import LoraNull
    from keeptune.methods.mica import Mica
    from keeptune.methods.milora import Milora
    from keeptune.methods.olora import Olora
    from keeptune.methods.osf import Osf
    from keeptune.methods.pissa import Pissa
    from keeptune.penalties.decay import Decay
    from keeptune.penalties.drift import DriftBudget
    from keeptune.penalties.ewc import Ewc
    from keeptune.penalties.kl import Kl
    from keeptune.penalties.l2 import L2
    from keeptune.penalties.laplace import Laplace
    from keeptune.posthoc.repair import Repair, repair
    from keeptune.statistics.layer_effect import LayerEffect
    from keeptune.studies.trace import trace
    from keeptune.training.attach import attach
    from keeptune.training.guard import Guard
    from keeptune.training.penalty_engine import Penalties

__all__ = [
    "AdapterPair",
    "Benchmark",
    "Combined",
    "Corda",
    "Decay",
    "Dora",
    "DriftBudget",
    "Eva",
    "Ewc",
    "Farss",
    "Full",
    "Guard",
    "Kasa",
    "Keep",
    "KeeptuneError",
    "Kl",
    "L2",
    "L2Lora",
    "Lalora",
    "Loki",
    "Lora",
    "LayerEffect",
    "LoraFA",
    "LoraGA",
    "LoraNull",
    "Laplace",
    "LowRank",
    "Mica",
    "Milora",
    "Olora",
    "Osf",
    "Part",
    "Penalties",
    "Pissa",
    "Plan",
    "TwoModels",
    "attach",
    "measure",
    "export",
    "install",
    "plan",
    "Repair",
    "repair",
    "trace",
]

_HOMES = {
    "AdapterPair": "evaluation.model_pairs",
    "Benchmark": "evaluation.benchmarks",
    "Combined": "methods.combined",
    "Corda": "methods.corda",
    "Decay": "penalties.decay",
    "Dora": "methods.dora",
    "DriftBudget": "penalties.drift",
    "Eva": "methods.eva",
    "Ewc": "penalties.ewc",
    "Farss": "methods.farss",
    "Full": "methods.full",
    "Guard": "training.guard",
    "Kasa": "methods.kasa",
    "Keep": "methods.keep",
    "KeeptuneError": "core.errors",
    "Kl": "penalties.kl",
    "L2": "penalties.l2",
    "L2Lora": "methods.l2_lora",
    "Lalora": "methods.lalora",
    "Loki": "methods.loki",
    "Lora": "methods.lora",
    "LayerEffect": "statistics.layer_effect",
    "LoraFA": "methods.lora_fa",
    "LoraGA": "methods.lora_ga",
    "LoraNull": "methods.lora_null",
    "Laplace": "penalties.laplace",
    "LowRank": "core.low_rank",
    "Mica": "methods.mica",
    "Milora": "methods.milora",
    "Olora": "methods.olora",
    "Osf": "methods.osf",
    "Part": "methods.combined",
    "Penalties": "training.penalty_engine",
    "Pissa": "methods.pissa",
    "Plan": "core.plan",
    "TwoModels": "evaluation.model_pairs",
    "attach": "training.attach",
    "measure": "api",
    "export": "api",
    "install": "adapter.install",
    "plan": "api",
    "Repair": "posthoc.repair",
    "repair": "posthoc.repair",
    "trace": "studies.trace",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that ``import keeptune`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module keeptune has no attribute {name}")
    return getattr(importlib.import_module(f"keeptune.{_HOMES[name]}"), name)
