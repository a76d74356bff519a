"""Standard benchmarks by name: lm-eval builds and scores them, keeptune compares base and tuned model item by item."""

from keeptune.evaluation.standard.catalogue import NAMES, Scoring, TableRow, table_row
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.score import score_named

__all__ = ["NAMES", "TableRow", "NamedBenchmark", "Scoring", "table_row", "score_named"]
