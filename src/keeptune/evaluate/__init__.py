"""Scores of a model before and after fine-tuning, on the same items."""

from keeptune.evaluate.harness import evaluate, score_items
from keeptune.evaluate.pairs import AdapterPair, ModelPair, TwoModels
from keeptune.evaluate.results import BenchmarkResult, trade_off
from keeptune.evaluate.scores import (
    Change,
    exact_match,
    harmonic,
    knowledge_kept,
    normalise_qa,
    paired_interval,
    task_learned,
)
from keeptune.evaluate.standard import NamedBenchmark
from keeptune.evaluate.tasks import Benchmark, Item, load_items

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
