"""The kinds of task, what a recipe's ``task.kind`` means, and the knowledge that a run's base supplies itself."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from keeptune.core.errors import RecipeError
from keeptune.data.chat_template import template_text
from keeptune.data.completions import knowledge_set, mixture, task_examples
from keeptune.data.examples import Examples, LanguageExamples
from keeptune.data.formats import FormatOptions, read_examples
from keeptune.data.labelled import LabelledExamples, label_indices, labelled_examples, lettered_rows
from keeptune.data.preferences import preferences
from keeptune.data.sources import Row, read_jsonl
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark
from keeptune.evaluation.items import Item, load_items
from keeptune.evaluation.metrics import LABELS, PAIRS, SCORES
from keeptune.model.head import Head
from keeptune.recipe.schema import Recipe
from keeptune.recipe.sections import Kind, Knowledge, Task
from keeptune.statistics.request import DataRole
from keeptune.statistics.self_generated import SelfGeneration

_NOT_JUDGED = ("format", "field_messages", "roles_to_train", "turns", "train_on_eos", "truncate")


@dataclass(frozen=True)
class TaskKind:
    """A kind of task; ``read`` returns its examples (:class:`keeptune.data.examples.Examples`).

    Args:
        name: Its name in a recipe, ``task.kind``.
        metrics: Metrics of a benchmark of one's own that its model can be scored by.
        read: From the recipe's section, its rows and the name of the rows for error messages to the examples.
        head: From examples and a seed to the classification head, drawn where the base has none.
        standard: Whether its model can be scored on standard benchmarks.
        check_items: Checks that its model can answer the items of a benchmark of one's own, which is named.
    """

    name: Kind
    metrics: tuple[str, ...]
    read: Callable[[Task, Sequence[Row], str], Examples]
    head: Callable[[Any, int], Head | None] = lambda examples, seed: None
    standard: bool = False
    check_items: Callable[[Any, Sequence[Item], str], Any] = lambda examples, items, where: None

    def examples(self, task: Task, files: Sequence[Sequence[Row]], seed: int) -> Any:
        """Returns the examples of a recipe's task from the rows of its files; those of several are shuffled."""
        if len(files) == 1:
            return self.read(task, files[0], "task.train")
        named = zip(files, task.files, strict=True)
        parts: list[Any] = [self.read(task, rows, f"task.train {part.file}") for rows, part in named]
        mixed = mixture(parts, [part.weight for part in task.files], seed)
        return replace(mixed, order=mixed.order[: task.examples])

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


def task_files(task: Task) -> list[list[Row]]:
    """Returns the rows of each file of a task; of a single one those that are used."""
    rows = [read_jsonl(part.file, where="task.train", **part.origin) for part in task.files]
    return rows if len(rows) > 1 else [rows[0][: task.examples]]


def _read_completions(task: Task, rows: Sequence[Row], where: str) -> Examples:
    if task.prompt is None:
        return read_examples(rows, task.formats, task.talk, where=where, truncate=task.truncate)
    examples = task_examples(rows, prompt=task.prompt, completion=task.completion or "", where=where)
    return replace(examples, truncate=task.truncate)


def _read_judged(task: Task, rows: Sequence[Row], where: str, *, paired: bool) -> Examples:
    for key in _NOT_JUDGED:
        if getattr(task, key) != Task.model_fields[key].default and (key, task.truncate) != ("truncate", "drop"):
            wanted = "none: whole answers are compared, in the fields of task.chosen and the like, cut at their end"
            raise RecipeError(
                f"task.{key}", got=f"a value, with kind {task.kind}", wanted=wanted, next_step="Remove it."
            )
    pair = task.chosen or "{chosen}", task.rejected or "{rejected}"
    answers, label = (pair, None) if paired else ((task.completion or "{completion}",), task.label or "{label}")
    examples = preferences(rows, prompt=task.prompt, answers=answers, label=label, options=task.formats, where=where)
    own = {"chat_template": template_text(task.chat_template, where="task.chat_template")} if task.chat_template else {}
    return replace(examples, truncate=task.truncate, template={**own, **(task.chat_template_kwargs or {})})


def read_knowledge(part: Knowledge, rows: Sequence[Row], where: str) -> LanguageExamples:
    """Returns the examples of a set of knowledge: by templates, by the field `text` of rows, or by their format."""
    rows = rows if part.choices is None else lettered_rows(rows, part.choices, where=where)
    form = {"text": part.text, "prompt": part.prompt, "completion": part.completion}
    if part.text is None and part.prompt is None:
        if part.formats != FormatOptions() or rows[0].get("text") is None:
            return read_examples(rows, part.formats, part.talk, where=where, end=False)
        form["text"] = "{text}"
    return knowledge_set(rows, **form, chat=part.chat, where=where)


def _read_labels(task: Task, rows: Sequence[Row], where: str, *, scores: bool) -> LabelledExamples:
    text, label = task.text or "", task.label or ""
    return labelled_examples(
        rows, text=text, text_pair=task.text_pair, label=label, names=task.labels, scores=scores, where=where
    )


_COMPLETION = TaskKind(
    name="completion",
    metrics=("exact_match", "multiple_choice", "cross_entropy", *PAIRS),
    read=_read_completions,
    standard=True,
)
_REGRESSION = TaskKind(
    name="regression",
    metrics=SCORES,
    read=partial(_read_labels, scores=True),
    head=lambda examples, seed: Head(examples.names, seed),
)
_CLASSIFICATION = replace(
    _REGRESSION,
    name="classification",
    metrics=LABELS,
    read=partial(_read_labels, scores=False),
    check_items=lambda examples, items, where: label_indices(
        [item.answers[0] for item in items], examples.names, where=where
    ),
)
_PREFERENCE = replace(_COMPLETION, name="preference", read=partial(_read_judged, paired=True))
_UNPAIRED = replace(_COMPLETION, name="unpaired_preference", read=partial(_read_judged, paired=False))
KINDS = {kind.name: kind for kind in (_COMPLETION, _PREFERENCE, _UNPAIRED, _CLASSIFICATION, _REGRESSION)}


def own_generations(recipe: Recipe, needs: Collection[DataRole]) -> dict[str, SelfGeneration]:
    """Returns what the base writes, by place: also where knowledge is needed and the recipe names none.

    Raises:
        DataError: A file of prompts cannot be used.
        RecipeError: A classifier's recipe asks for texts as only a language model has them.
    """
    asked = {where: part for where, part in recipe.all_knowledge.items() if isinstance(part, SelfGeneration)}
    if recipe.knowledge is None and ("knowledge" in needs or recipe.replay > 0):
        asked = {"knowledge": SelfGeneration()}
    if recipe.task.kind in ("classification", "regression") and (asked or recipe.replay):
        raise RecipeError(
            "replay" if recipe.replay else "knowledge",
            got=f"{recipe.replay or 'texts that the base writes'} with task.kind {recipe.task.kind}",
            wanted="a file of what to keep where it is needed, and no replay: a classifier writes no text, and "
            "knowledge has no labels that it could learn",
            next_step='Add for example knowledge: {file: calibration.jsonl, text: "{question} {answer}"}; a penalty on '
            "the weight change, such as laplace, holds a classifier without replay.",
        )
    return {where: part.with_prompts(where) for where, part in asked.items()}
