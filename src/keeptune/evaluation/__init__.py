"""Scores of a model before and after fine-tuning, on the same items."""

from keeptune.evaluation.benchmarks import Benchmark as Benchmark
from keeptune.evaluation.benchmarks import FileBenchmark as FileBenchmark
from keeptune.evaluation.harness import evaluate as evaluate
from keeptune.evaluation.model_pairs import AdapterPair as AdapterPair
from keeptune.evaluation.model_pairs import ModelPair as ModelPair
from keeptune.evaluation.model_pairs import TwoModels as TwoModels
from keeptune.evaluation.results import BenchmarkResult as BenchmarkResult
from keeptune.evaluation.results import trade_off as trade_off
from keeptune.evaluation.standard.entry import NamedBenchmark as NamedBenchmark
