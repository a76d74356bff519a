"""Knowledge that a run's base supplies itself: what of it is left out, and who cannot have it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.evaluation.benchmark_data import Corpus, used_rows
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.recipe.schema import Recipe
from keeptune.statistics.request import DataRole
from keeptune.statistics.self_generated import SelfGeneration, SelfWritten

_log = logging.getLogger(__name__)


def generations(recipe: Recipe, needs: Collection[DataRole]) -> dict[str, SelfGeneration]:
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


def without_scored(
    texts: SelfWritten, benchmarks: Sequence[Benchmark], tokenizer: PreTrainedTokenizerBase
) -> SelfWritten:
    """Returns texts without those that hold an item of a benchmark."""
    for benchmark in benchmarks:
        rows = [{"prompt": text.prompt, "completion": text.completion} for text in texts.texts]
        scored = used_rows(Corpus(texts.where, rows, texts.read_texts), benchmark, tokenizer)
        texts = texts.without(dict.fromkeys(scored, f"with items of {benchmark.name}"))
    return texts


def notes_of(recipe: Recipe, sets: Sequence[SelfWritten]) -> list[str]:
    """Returns, and logs, what a report says of the texts that the base wrote."""
    named = "" if recipe.knowledge else "; the recipe names no knowledge"
    notes = [f"{written.where}: {written.account}{named}" for written in sets]
    for note in notes:
        _log.info("%s", note)
    return notes
