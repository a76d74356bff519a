"""Standard benchmarks by name: lm-eval builds and scores them, keeptune compares base and tuned model item by item."""

from keeptune.evaluate.standard.entry import NamedBenchmark
from keeptune.evaluate.standard.score import score_named
from keeptune.evaluate.standard.table import NAMES, Known, Scoring, known

__all__ = ["NAMES", "Known", "NamedBenchmark", "Scoring", "known", "score_named"]
