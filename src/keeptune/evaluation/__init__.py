"""Scores of a model before and after fine-tuning, on the same items."""

from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import AdapterPair, ModelPair, TwoModels
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.evaluation.standard import NamedBenchmark

__all__ = [
    "AdapterPair",
    "Benchmark",
    "BenchmarkResult",
    "FileBenchmark",
    "ModelPair",
    "NamedBenchmark",
    "TwoModels",
    "evaluate",
    "trade_off",
]
