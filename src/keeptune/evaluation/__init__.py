"""Scores of a model before and after fine-tuning, on the same items."""

from keeptune.evaluation.benchmarks import Benchmark, Item, load_items
from keeptune.evaluation.harness import evaluate, score_items
from keeptune.evaluation.metrics import (
    Change,
    exact_match,
    harmonic,
    knowledge_kept,
    normalise_qa,
    paired_interval,
    task_learned,
)
from keeptune.evaluation.model_pairs import AdapterPair, ModelPair, TwoModels
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.evaluation.standard import NamedBenchmark

__all__ = [
    "AdapterPair",
    "Benchmark",
    "BenchmarkResult",
    "Change",
    "Item",
    "ModelPair",
    "NamedBenchmark",
    "TwoModels",
    "evaluate",
    "exact_match",
    "harmonic",
    "knowledge_kept",
    "load_items",
    "normalise_qa",
    "paired_interval",
    "score_items",
    "task_learned",
    "trade_off",
]
