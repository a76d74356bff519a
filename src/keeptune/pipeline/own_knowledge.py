"""Knowledge that a run's base supplies itself: where it is written, and what of it is left out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.data.disjoint import Corpus
from keeptune.data.self_written import SelfWritten
from keeptune.evaluation.benchmark_data import used_rows
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.methods.base import Method
from keeptune.penalties.base import Penalty
from keeptune.recipe.schema import Recipe
from keeptune.recipe.sections import Knowledge
from keeptune.statistics.request import DataRole
from keeptune.statistics.self_generated import SelfGeneration

_log = logging.getLogger(__name__)


def placed_knowledge(recipe: Recipe) -> list[tuple[Knowledge | SelfGeneration, str]]:
    """Returns the sets that a recipe names, each with its place for messages."""
    listed = isinstance(recipe.knowledge, list)
    return [
        (part, f"knowledge.{number}" if listed else "knowledge") for number, part in enumerate(recipe.all_knowledge)
    ]


def placed_files(recipe: Recipe) -> list[tuple[Knowledge, str]]:
    """Returns those of the sets that are of files."""
    return [(part, where) for part, where in placed_knowledge(recipe) if isinstance(part, Knowledge)]


def generations(recipe: Recipe, needs: Collection[DataRole]) -> list[tuple[SelfGeneration, str]]:
    """Returns what the base writes, each with its place: also where knowledge is needed and the recipe names none.

    Raises:
        DataError: A file of prompts cannot be used.
    """
    needed = "knowledge" in needs or recipe.replay > 0
    if recipe.knowledge is None and recipe.task.of_language and needed:
        return [(SelfGeneration(), "knowledge")]
    placed = placed_knowledge(recipe)
    return [(part.with_prompts(where), where) for part, where in placed if isinstance(part, SelfGeneration)]


def without_scored(
    texts: SelfWritten, benchmarks: Sequence[Benchmark], tokenizer: PreTrainedTokenizerBase
) -> SelfWritten:
    """Returns texts without those that hold an item of a benchmark."""
    for benchmark in benchmarks:
        rows = [{"prompt": text.prompt, "completion": text.completion} for text in texts.texts]
        scored = used_rows(Corpus(texts.where, rows, texts.read_texts), benchmark, tokenizer)
        texts = texts.without(scored, f"with items of {benchmark.name}")
    return texts


def notes_of(recipe: Recipe, sets: Sequence[SelfWritten]) -> list[str]:
    """Returns, and logs, what a report says of the texts that the base wrote."""
    named = "" if recipe.knowledge else "; the recipe names no knowledge"
    notes = [f"{written.where}: {written.account}{named}" for written in sets]
    for note in notes:
        _log.info("%s", note)
    return notes


def check_texts(
    recipe: Recipe,
    method: Method,
    penalties: Sequence[Penalty],
    needs: Collection[DataRole],
    asked: Sequence[tuple[SelfGeneration, str]],
) -> None:
    """Refuses a classifier's recipe that asks for texts as only a language model has them.

    Raises:
        RecipeError: It replays knowledge, has the base write it, or needs some and names none.
    """
    if recipe.task.of_language:
        return
    if recipe.replay:
        raise RecipeError(
            "replay",
            got=f"{recipe.replay} with task.kind {recipe.task.kind}",
            wanted="none: knowledge has no labels that a classifier could learn",
            next_step="Leave it out; a penalty on the weight change holds a classifier, such as laplace.",
        )
    if asked or ("knowledge" in needs and recipe.knowledge is None):
        names = [f"method {method.name}", *(f"penalty {penalty.name}" for penalty in penalties)]
        raise RecipeError(
            "knowledge" if asked else " and ".join(names),
            got="texts that the base writes" if asked else "no `knowledge` section in the recipe",
            wanted=f"a file of what the model should keep: with task.kind {recipe.task.kind} the base writes no text",
            next_step='Add for example knowledge: {file: calibration.jsonl, text: "{question} {answer}"}.',
        )
