"""What a kind of task is: how its rows are read, sampled for statistics, trained on and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.data.calibration import Calibration
from keeptune.data.examples import Examples
from keeptune.data.sources import Row
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark
from keeptune.evaluation.items import Item, load_items
from keeptune.model.head import Head
from keeptune.recipe.schema import Kind, Task, TaskCalibration

__all__ = ["TaskKind"]

_PROBES = 8


@dataclass(frozen=True)
class TaskKind:
    """A kind of task; ``read`` returns its examples (:class:`keeptune.data.examples.Examples`).

    Args:
        name: Its name in a recipe, ``task.kind``.
        metrics: Metrics of a benchmark of one's own that its model can be scored by.
        read: From the recipe's section, its rows and the name of the rows for error messages to the examples.
        train: From the installed model, its plan, tokenizer, examples and config to the loss curve; trains in place.
        head: From examples and a seed to the classification head, drawn where the base has none.
        standard: Whether its model can be scored on standard benchmarks.
        check_items: Checks that its model can answer the items of a benchmark of one's own, which is named.
    """

    name: Kind
    metrics: tuple[str, ...]
    read: Callable[[Task, Sequence[Row], str], Examples]
    train: Callable[..., list[dict[str, float]]]
    head: Callable[[Any, int], Head | None] = lambda examples, seed: None
    standard: bool = False
    check_items: Callable[[Any, Sequence[Item], str], Any] = lambda examples, items, where: None

    def calibration(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, wanted: TaskCalibration, positions: int | None
    ) -> Calibration:
        """Returns the sample that a recipe's ``task.calibration`` describes, cut to the base's positions.

        Raises:
            DataError: No example has room for what is learned.
        """
        length = min(wanted.max_length, positions or wanted.max_length)
        return examples.calibration(tokenizer, max_length=length, examples=wanted.examples, seed=wanted.seed)

    def probe(self, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tensor:
        """Returns the first examples cut to one length, so that an export is checked on real text without padding.

        Args:
            examples: The task.
            tokenizer: The tokenizer.
            max_length: Tokens at most.

        Returns:
            Token ids ``(batch, length)``.
        """
        rows = examples.first_tokens(_PROBES, tokenizer, max_length)
        length = min(map(len, rows))
        return torch.tensor([row[:length] for row in rows])

    def check_benchmark(self, examples: Any, benchmark: Benchmark) -> None:
        """Checks that a benchmark can be scored by the model that the task makes.

        Raises:
            RecipeError: The metric is for another kind of model.
            DataError: An item has a label that is not learned.
        """
        if not isinstance(benchmark, FileBenchmark):
            if not self.standard:
                raise RecipeError(
                    benchmark.where,
                    got=f"a standard benchmark for task.kind {self.name}",
                    wanted="a language model to score, task.kind completion",
                    next_step="Score a classifier on a file: `file`, `text`, `answer` and `metric`.",
                )
            return
        items = load_items(benchmark, Path())
        if benchmark.metric not in self.metrics:
            raise RecipeError(
                f"{benchmark.where}.metric",
                got=f"{benchmark.metric} for task.kind {self.name}",
                wanted=" or ".join(self.metrics),
                next_step="Choose one of these metrics, or another task.kind.",
            )
        self.check_items(examples, items, benchmark.where)
