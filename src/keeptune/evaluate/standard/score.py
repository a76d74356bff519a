"""A standard benchmark scored with the base and with the tuned model, on the same items."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.evaluate.kept import KeptAnswers
from keeptune.evaluate.pairs import ModelPair
from keeptune.evaluate.results import BenchmarkResult
from keeptune.evaluate.standard.entry import NamedBenchmark

__all__ = ["score_named"]


def score_named(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: NamedBenchmark,
    *,
    seed: int = 0,
    progress: bool = True,
    kept: KeptAnswers | None = None,
) -> BenchmarkResult:
    """Score a standard benchmark before and after fine-tuning.

    Args:
        pair: The models; each is left as it was found.
        tokenizer: Their tokenizer; its settings stay as they are.
        benchmark: What to score.
        seed: Seed of the bootstrap interval and of the draw of examples for the prompt.
        progress: Whether to show bars.
        kept: Where the base's answers are, so that it is not asked again; None asks it.

    Raises:
        RecipeError: Not here yet.
    """
    raise RecipeError(benchmark.where, got="a name", wanted="a file", next_step="Standard benchmarks come soon.")
