"""Standard benchmarks by name: lm-eval builds and scores them, keeptune compares base and tuned model item by item."""

from keeptune.evaluation.standard.entry import NAMES as NAMES
from keeptune.evaluation.standard.entry import NamedBenchmark as NamedBenchmark
from keeptune.evaluation.standard.entry import Scoring as Scoring
from keeptune.evaluation.standard.entry import TableRow as TableRow
from keeptune.evaluation.standard.entry import table_row as table_row
from keeptune.evaluation.standard.score import score_named as score_named
