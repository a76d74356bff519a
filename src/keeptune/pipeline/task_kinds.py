"""What a recipe's task means, by its kind: completions for a language model, labels or scores for a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from keeptune.core.errors import RecipeError
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration, tokenize_calibration
from keeptune.data.completions import TaskExamples, task_calibration, task_examples
from keeptune.data.labelled import (
    LabelledExamples,
    Texts,
    classified_examples,
    encode,
    label_indices,
    labelled_calibration,
    scored_examples,
)
from keeptune.data.sources import Row
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark
from keeptune.evaluation.items import load_items
from keeptune.evaluation.metrics import LABELS, SCORES
from keeptune.recipe.schema import Kind, Task, TaskCalibration
from keeptune.training.classifier import train_classifier
from keeptune.training.trainer import train

__all__ = ["Examples", "check_benchmark", "probe_of", "read_task", "sample", "train_on", "used_texts"]

Examples = TaskExamples | LabelledExamples
_METRICS: dict[Kind, tuple[str, ...]] = {
    "completion": ("exact_match", "multiple_choice", "cross_entropy"),
    "classification": LABELS,
    "regression": SCORES,
}


def read_task(task: Task, rows: Sequence[Row]) -> Examples:
    """Turn rows into what is learned.

    Args:
        task: The recipe's section.
        rows: Its rows.

    Returns:
        Prompts and completions, or texts with labels or scores.

    Raises:
        DataError: A row does not fit.
    """
    where = "task.train"
    if task.kind == "completion":
        return task_examples(rows, prompt=task.prompt or "", completion=task.completion or "", where=where)
    text, label = task.text or "", task.label or ""
    if task.kind == "regression":
        return scored_examples(rows, text=text, text_pair=task.text_pair, label=label, where=where)
    return classified_examples(rows, text=text, text_pair=task.text_pair, label=label, names=task.labels, where=where)


def sample(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, wanted: TaskCalibration, positions: int | None
) -> Calibration:
    """Tokenise a sample of the task for statistics.

    Args:
        examples: The task.
        tokenizer: The tokenizer.
        wanted: How much of it.
        positions: How many positions the base has.

    Returns:
        The tokens, and what is learned of them.

    Raises:
        DataError: No example has room for a completion.
    """
    length = min(wanted.max_length, positions or wanted.max_length)
    if isinstance(examples, TaskExamples):
        return task_calibration(examples, tokenizer, max_length=length, examples=wanted.examples, seed=wanted.seed)
    return labelled_calibration(examples, tokenizer, max_length=length, examples=wanted.examples, seed=wanted.seed)


def train_on(
    examples: Examples,
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
) -> list[dict[str, float]]:
    """Train an installed model with the trainer for its kind of task.

    Args:
        examples: The task.
        model: The installed model; trained in place.
        plan: Its plan.
        tokenizer: The tokenizer.
        config: The trainer's config.

    Returns:
        The loss curve.
    """
    if isinstance(examples, TaskExamples):
        return train(model, plan, tokenizer, examples, config)
    return train_classifier(model, plan, tokenizer, examples, config)


def used_texts(examples: Examples) -> Sequence[str]:
    """List what the model reads of each example, to compare with what is scored.

    Args:
        examples: The task.

    Returns:
        One text per example.
    """
    return examples.prompts if isinstance(examples, TaskExamples) else examples.texts.whole


def check_benchmark(kind: Kind, examples: Examples, benchmark: Benchmark) -> None:
    """Check that a benchmark can be scored by the model that the task makes.

    Args:
        kind: The task's kind.
        examples: The task.
        benchmark: The benchmark.

    Raises:
        RecipeError: The metric is for another kind of model.
        DataError: An item has a label that is not learned.
    """
    if not isinstance(benchmark, FileBenchmark):
        if kind != "completion":
            raise RecipeError(
                benchmark.where,
                got=f"a standard benchmark for task.kind {kind}",
                wanted="a language model to score, task.kind completion",
                next_step="Score a classifier on a file: `file`, `text`, `answer` and `metric`.",
            )
        return
    items = load_items(benchmark, Path())
    if benchmark.metric not in _METRICS[kind]:
        raise RecipeError(
            f"{benchmark.where}.metric",
            got=f"{benchmark.metric} for task.kind {kind}",
            wanted=" or ".join(_METRICS[kind]),
            next_step="Choose one of these metrics, or another task.kind.",
        )
    if isinstance(examples, LabelledExamples) and examples.names:
        label_indices([item.answers[0] for item in items], examples.names, where=benchmark.where)


def probe_of(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> Tensor:
    """Take the first examples, cut to one length, so that the check of an export sees real text without padding.

    Args:
        examples: The task.
        tokenizer: The tokenizer.
        max_length: Tokens at most.

    Returns:
        Token ids ``(batch, length)``.
    """
    if isinstance(examples, TaskExamples):
        texts = [p + c for p, c in zip(examples.prompts[:8], examples.completions[:8], strict=True)]
        rows = tokenize_calibration(texts, tokenizer, max_length=max_length, where="task.train").sequences
    else:
        second = examples.texts.second
        first = Texts(examples.texts.first[:8], second and second[:8])
        rows = tuple(map(tuple, encode(tokenizer, first, max_length).columns["input_ids"]))
    length = min(map(len, rows))
    return torch.tensor([row[:length] for row in rows])
