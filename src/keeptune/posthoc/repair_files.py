"""What the command line gives to repair: files and templates; those of the run that an adapter is from, unless told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError
from keeptune.data.disjoint import Corpus
from keeptune.data.examples import draw_rows
from keeptune.data.knowledge import KnowledgeSet, knowledge_set
from keeptune.data.sources import Row, read_jsonl
from keeptune.data.templates import render
from keeptune.evaluation.benchmark_data import refuse_used
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.recipe.paths import resolve_file
from keeptune.recipe.schema import load_recipe

__all__ = ["NONE", "Files", "RepairData", "read_files"]

NONE = "none"
_HINT = 'Example: --knowledge facts.jsonl --text "{question}\\nAnswer: {answer}".'


@dataclass(frozen=True, slots=True)
class Files:
    """Files and templates as the user named them; None is what the adapter's run used.

    Args:
        knowledge: JSONL file of what to keep.
        text: Template of its texts.
        task: JSONL file of the task; ``"none"`` repairs without task data.
        prompt: Template of its prompts, or of whole texts where there is no ``completion``.
        completion: Template of its completions.
        evaluate: A recipe whose benchmarks are scored.
        examples: How many knowledge rows are used, the first ones.
        task_examples: How many task rows are used, drawn with seed 0.
    """

    knowledge: str | None = None
    text: str | None = None
    task: str | None = None
    prompt: str | None = None
    completion: str | None = None
    evaluate: Path | None = None
    examples: int = 256
    task_examples: int = 256


@dataclass(frozen=True, slots=True)
class RepairData:
    """Those files, read and rendered.

    Args:
        knowledge: The sets of knowledge.
        task: Prompts and completions, or texts; None for none.
        benchmarks: What is scored.
    """

    knowledge: tuple[KnowledgeSet, ...]
    task: Sequence[str] | Sequence[tuple[str, str]] | None
    benchmarks: tuple[Benchmark, ...]


def read_files(adapter: str, files: Files) -> RepairData:
    """Read the data for a repair, and check that nothing is scored that is used.

    Args:
        adapter: The adapter; one in a run folder brings the files and templates of its recipe.
        files: What the user named.

    Returns:
        The data.

    Raises:
        RecipeError: There is no knowledge, or a template is missing.
        DataError: A file is missing or malformed, lacks a field, or overlaps a benchmark.
    """
    run = _recipe_of(Path(adapter).expanduser())
    sets = [_knowledge(section, files) for section in _sections(run.get("knowledge"), files)]
    used = [Corpus("--knowledge", rows, part.texts) for rows, part in sets]
    task, corpus = _task(run.get("task") or {}, files)
    benchmarks = () if files.evaluate is None else tuple(load_recipe(files.evaluate).evaluate)
    for benchmark in benchmarks:
        refuse_used((*used, *corpus), benchmark)
    return RepairData(tuple(part for _, part in sets), task, benchmarks)


def _recipe_of(adapter: Path) -> Mapping[str, Any]:
    """Read the recipe of the run that an adapter is from, or that is named itself."""
    for folder in (adapter, adapter.parent):
        if (folder / "recipe.json").is_file() and (folder / "plan").is_dir():
            found: Mapping[str, Any] = read_json(folder / "recipe.json")
            return found
    return {}


def _sections(own: Any, files: Files) -> list[Mapping[str, Any]]:
    sections = own if isinstance(own, list) else [own] if own else []
    if files.knowledge is None:
        if not sections:
            raise RecipeError(
                "--knowledge",
                got="nothing, and an adapter that is in no run folder with knowledge of its own",
                wanted="a JSONL file of texts that hold what the model should keep",
                next_step=_HINT,
            )
        return sections
    first = sections[0] if len(sections) == 1 else {}
    return [{"text": first.get("text"), "file": resolve_file(files.knowledge)}]


def _knowledge(section: Mapping[str, Any], files: Files) -> tuple[list[Row], KnowledgeSet]:
    rows = read_jsonl(section["file"], where="--knowledge")[: files.examples]
    text = _typed(files.text) or section.get("text")
    if text is None and section.get("prompt") is not None:
        text = section["prompt"] + section["completion"]
    if text is None and "text" not in rows[0]:
        raise _without_template("--text", rows[0], _HINT)
    return rows, knowledge_set(rows, text=text or "{text}", where="--knowledge")


def _task(
    own: Mapping[str, Any], files: Files
) -> tuple[Sequence[str] | Sequence[tuple[str, str]] | None, list[Corpus]]:
    if files.task == NONE or (files.task is None and "train" not in own):
        return None, []
    everything = read_jsonl(own["train"] if files.task is None else resolve_file(files.task), where="--task")
    rows = [everything[i] for i in draw_rows(len(everything), files.task_examples, seed=0)]
    prompt = _typed(files.prompt) or own.get("prompt") or own.get("text")
    completion = _typed(files.completion) or own.get("completion")
    if prompt is None and "text" not in rows[0]:
        hint = 'Example: --prompt "{question}\\nAnswer:" --completion " {answer}".'
        raise _without_template("--prompt", rows[0], hint)
    read = [render(prompt or "{text}", row, where=f"--task row {n}") for n, row in enumerate(rows, start=1)]
    corpus = [Corpus("--task", rows, read)]
    if completion is None:
        return read, corpus
    said = [render(completion, row, where=f"--task row {n}") for n, row in enumerate(rows, start=1)]
    return list(zip(read, said, strict=True)), corpus


def _typed(template: str | None) -> str | None:
    r"""Read ``\n`` as a line end: a shell hands over what stands for one as it is typed."""
    return None if template is None else template.replace(r"\n", "\n")


def _without_template(option: str, row: Row, hint: str) -> RecipeError:
    return RecipeError(
        option,
        got=f"no template, and rows with the fields {json.dumps(sorted(row))[1:-1]}",
        wanted="a template of these fields",
        next_step=hint,
    )
