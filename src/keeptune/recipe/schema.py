"""The schema of recipe.yaml: one file describes a whole job; unknown keys are errors with the nearest name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictInt,
    ValidationError,
)
from transformers import TrainingArguments
from trl import SFTConfig

from keeptune.adapter.anchor import Anchor
from keeptune.core.artefact import canonical_json
from keeptune.core.errors import RecipeError
from keeptune.data import hub
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.standard import NamedBenchmark
from keeptune.methods.combined import tuned_roles
from keeptune.model.pretrained import Dtype
from keeptune.recipe.construct import make_method, make_penalties
from keeptune.recipe.paths import Fetch, resolve_paths
from keeptune.recipe.published import Published, check_scores
from keeptune.recipe.reading import override_value, read_values, spelt_out
from keeptune.recipe.sections import (
    NAMED,
    BenchmarkEntry,
    ExportSpec,
    Kind,
    Knowledge,
    KnowledgeSets,
    MethodSections,
    Section,
    Task,
    TaskCalibration,
    explain,
)
from keeptune.training.trainer import check_arguments

__all__ = [
    "ExportSpec",
    "Kind",
    "Knowledge",
    "Recipe",
    "Task",
    "TaskCalibration",
    "load_recipe",
    "make_recipe",
    "parse_overrides",
]


_Folder = Annotated[Path, AfterValidator(Path.expanduser)]
_Layer = Annotated[StrictInt, Field(ge=0)]


class Recipe(Section):
    """A whole job.

    Files are looked for from the current directory, then from the recipe's folder. ``atlas`` names the
    embedded model, ``atlas:facts.jsonl`` one of its files, ``hf://datasets/org/name/file.jsonl`` one on the hub.
    """

    model: str
    method: MethodSections = Field(default_factory=lambda: {"name": "keep"})  # docs/guides/keep.md says why
    task: Task
    output: _Folder
    targets: list[str] | None = None
    layers: Annotated[list[_Layer], Field(min_length=1)] | None = None
    knowledge: KnowledgeSets | None = None
    penalties: list[Annotated[dict[str, Any], BeforeValidator(spelt_out)]] = Field(default_factory=list)
    replay: float = Field(0.0, ge=0, lt=1)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: list[BenchmarkEntry] = Field(default_factory=list)
    anchor: Anchor = "auto"
    export: ExportSpec = ExportSpec()
    dtype: Dtype = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    store: _Folder | None = None
    low_memory: bool = False
    reference: _Folder | None = None
    published: Published | None = None

    @property
    def knowledge_sets(self) -> tuple[Knowledge, ...]:
        """The sets of knowledge data, none or more."""
        if self.knowledge is None:
            return ()
        return tuple(self.knowledge) if isinstance(self.knowledge, list) else (self.knowledge,)

    def written(self) -> dict[str, Any]:
        """Give the recipe as plain values, for the record in the run folder.

        Returns:
            A JSON-ready mapping.
        """
        plain: dict[str, Any] = json.loads(canonical_json(self.model_dump(mode="json")))
        return plain


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None, *, fetch: Fetch = hub.fetch) -> Recipe:
    """Read, complete and check a recipe.

    Args:
        path: The YAML file.
        overrides: Dotted key to value, such as ``{"train.learning_rate": 1e-3}``.
        fetch: Gets the files of the hub.

    Returns:
        The recipe, with file paths resolved.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    path = Path(path)
    return make_recipe(read_values(path, overrides), folder=path.parent, where=f"recipe {path}", fetch=fetch)


def make_recipe(values: Mapping[str, Any], *, folder: Path, where: str, fetch: Fetch = hub.fetch) -> Recipe:
    """Check the values of a recipe.

    Args:
        values: As a YAML file holds them.
        folder: Where files are looked for that are not in the current directory.
        where: For error messages.
        fetch: Gets the files of the hub.

    Returns:
        The recipe, with file paths resolved.

    Raises:
        RecipeError: A key is unknown or a value does not fit.
    """
    for key in ("sweep", "compare"):
        if key in values:
            raise RecipeError(
                f"{where}, key {key}",
                got="a section for several runs",
                wanted="the recipe of one run",
                next_step=f"Run `keeptune {key}` with it.",
            )
    if "stages" in values:
        raise RecipeError(
            f"{where}, key stages",
            got="a sequence of stages, which has no single task, plan or adapter",
            wanted="the recipe of one run",
            next_step="Run `keeptune run` with it; each stage's own recipe lies in its folder then.",
        )
    try:
        recipe = Recipe.model_validate(resolve_paths(values, folder, fetch))
    except ValidationError as error:
        raise explain(error, where, _known_keys) from error
    tuned_roles(make_method(recipe.method, seed=0), recipe.targets)
    make_penalties(recipe.penalties)
    check_arguments(recipe.train, SFTConfig if recipe.task.kind == "completion" else TrainingArguments)
    names = [benchmark.name for benchmark in recipe.evaluate]
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"[\w.-]+", name):
            raise RecipeError(
                f"{where}, evaluate",
                got=f'the benchmark name "{name}"' + (" twice" if names.count(name) > 1 else ""),
                wanted="different names of letters, digits, '.', '_' and '-': they name files",
                next_step="Rename it.",
            )
    if recipe.published is not None:
        check_scores(recipe.published, names, where)
    return recipe


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``--key value`` pairs from the command line; values are YAML.

    A switch of the recipe (``low_memory``) may stand alone, and dashes may stand for underscores.

    Args:
        words: ``["--train.learning_rate", "1e-3", "--targets", "[q_proj]"]`` or ``--key=value``.

    Returns:
        Dotted key to value.

    Raises:
        RecipeError: A word is not a key, or a key has no value.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if word.startswith("--") and key in _SWITCHES and not equals and not (rest and _is_value(rest[0])):
            found[key] = True
            continue
        if not word.startswith("--") or not key or not (equals or rest):
            raise RecipeError(
                "command line",
                got=word,
                wanted="--key value, after the recipe",
                next_step="Example: keeptune run recipe.yaml --train.learning_rate 1e-3",
            )
        try:
            found[key] = override_value(text if equals else rest.pop(0))
        except yaml.YAMLError as error:
            raise RecipeError(
                f"command line --{key}", got=" ".join(str(error).split()), wanted="a YAML value", next_step="Quote it."
            ) from error
    return found


_SWITCHES = frozenset(name for name, field in Recipe.model_fields.items() if field.annotation is bool)


def _is_value(word: str) -> bool:
    return not word.startswith("--")


def _known_keys(location: Sequence[str | int]) -> list[str]:
    sections: dict[str, Any] = {"knowledge": Knowledge, "task": Task, "export": ExportSpec}
    first = str(location[0])
    if location[:2] == ("task", "calibration"):
        return list(TaskCalibration.model_fields)
    if len(location) > 1 and first in sections:
        return list(sections[first].model_fields)
    if len(location) > 1 and first == "evaluate":
        kind = NamedBenchmark if NAMED in location else FileBenchmark
        return [field.name for field in dataclasses.fields(kind)]
    return list(Recipe.model_fields)
