"""Files and templates of a repair as the command line names them; by default those of the run of the adapter."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError
from keeptune.data.completions import knowledge_set
from keeptune.data.examples import LanguageExamples, Mixed, draw_rows
from keeptune.data.sources import Row, read_jsonl
from keeptune.evaluation.benchmark_data import Corpus, refuse_used
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.pipeline.task_kinds import KINDS, read_knowledge, task_files
from keeptune.recipe.paths import resolve_file
from keeptune.recipe.schema import load_recipe
from keeptune.recipe.sections import Knowledge, Origin, Task

_NONE = "none"
_log = logging.getLogger(__name__)
_TEXT = 'Example: --knowledge facts.jsonl --text "{question}\\nAnswer: {answer}".'
_PROMPT = 'Example: --prompt "{question}\\nAnswer:" --completion " {answer}".'


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


def read_files(
    adapter: str, files: Files
) -> tuple[tuple[LanguageExamples, ...] | None, LanguageExamples | None, tuple[Benchmark, ...]]:
    """Reads the data of a repair, and checks that nothing is scored that is used.

    An adapter in a run folder brings the files and templates of its recipe.

    Returns:
        The sets of knowledge (None for none), the task (None for none), and what is scored.

    Raises:
        RecipeError: A template is missing.
        DataError: A file is missing or malformed, lacks a field, or overlaps a benchmark.
    """
    run: Mapping[str, Any] = {}
    path = Path(adapter).expanduser()
    for folder in (path.parent, path):  # of a run, or in one
        if (folder / "recipe.json").is_file() and (folder / "plan").is_dir():
            run = read_json(folder / "recipe.json")
    used, sets, task = [], [], None
    known = run.get("knowledge") or []
    sections = known if isinstance(known, list) else [known]
    if files.knowledge is not None:
        text = sections[0].get("text") if len(sections) == 1 else None
        sections = [{"text": text, "file": resolve_file(files.knowledge)}]
    if not sections:
        _log.info("repair: no knowledge is named: the base writes its own")
    for section in sections:
        if "file" not in section:  # what a run's base wrote is written or read again
            continue
        rows, part = _knowledge(section, files)
        used.append(Corpus("--knowledge", rows, part.read_texts))
        sets.append(part)
    own = run.get("task") or {}
    if files.task != _NONE and (files.task is not None or "train" in own):
        rows, task = _task(own, files)
        used.append(Corpus("--task", rows, task.read_texts))
    benchmarks = () if files.evaluate is None else tuple(load_recipe(files.evaluate).evaluate)
    for benchmark in benchmarks:
        refuse_used(used, benchmark)
    return tuple(sets) or None, task, benchmarks


def _knowledge(section: Mapping[str, Any], files: Files) -> tuple[list[Row], LanguageExamples]:
    origin = {name: section.get(name) for name in Origin.model_fields}
    rows = read_jsonl(section["file"], where="--knowledge", **origin)[: files.examples]
    text = _typed(files.text) or section.get("text")
    if text is None and section.get("prompt") is not None:
        text = section["prompt"] + section["completion"]
    if text is None and files.knowledge is None:
        return rows, read_knowledge(Knowledge.model_validate(section), rows, "--knowledge")
    return rows, knowledge_set(rows, text=_template(text, rows, "--text", _TEXT), where="--knowledge")


def _task(own: Mapping[str, Any], files: Files) -> tuple[list[Row], LanguageExamples]:
    if files.task is None and files.prompt is None and own.get("kind") == "completion" and own.get("prompt") is None:
        task = Task.model_validate(own)
        parts = task_files(task)
        found: LanguageExamples = KINDS[task.kind].examples(task, parts, 0)
        drawn = draw_rows(len(found), files.task_examples, seed=0)
        return [row for part in parts for row in part], Mixed((found,), tuple((0, row) for row in drawn))
    if files.task is None and not isinstance(own["train"], str):
        raise RecipeError("--task", got="nothing, and a run of several files", wanted="one file", next_step="Name it.")
    everything = read_jsonl(own["train"] if files.task is None else resolve_file(files.task), where="--task")
    rows = [everything[i] for i in draw_rows(len(everything), files.task_examples, seed=0)]
    prompt = _template(_typed(files.prompt) or own.get("prompt") or own.get("text"), rows, "--prompt", _PROMPT)
    completion = _typed(files.completion) or own.get("completion")
    if completion is None:
        return rows, knowledge_set(rows, text=prompt, where="--task")
    return rows, knowledge_set(rows, prompt=prompt, completion=completion, where="--task")


def _typed(template: str | None) -> str | None:
    r"""Reads ``\n`` as a line end: a shell hands over what stands for one as it is typed."""
    return None if template is None else template.replace(r"\n", "\n")


def _template(template: str | None, rows: list[Row], option: str, example: str) -> str:
    """Returns a template, or that of rows whose text is their field ``text``."""
    if template is None and "text" not in rows[0]:
        raise RecipeError(
            option,
            got=f"no template, and rows with the fields {json.dumps(sorted(rows[0]))[1:-1]}",
            wanted="a template of these fields",
            next_step=example,
        )
    return template or "{text}"
