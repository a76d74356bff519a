"""The schema of recipe.yaml: one file describes a whole job; unknown keys are errors with the nearest name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ByteSize, Field, StrictInt, ValidationError
from transformers import TrainingArguments

from keeptune.adapter.anchor import Anchor
from keeptune.core.artefact import canonical_json
from keeptune.core.errors import RecipeError, nearest
from keeptune.core.registry import made
from keeptune.data import hub
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.methods.base import method_named, methods
from keeptune.model.pretrained import DeviceMap, Dtype, StartFrom
from keeptune.model.quantization import check_quantization
from keeptune.penalties.base import Penalty, penalties, penalty_named
from keeptune.recipe.paths import Fetch, resolve_paths
from keeptune.recipe.reading import DEFAULT_METHOD, parse_pairs, read_values
from keeptune.recipe.sections import (
    BY_BASE,
    NAMED,
    BenchmarkEntry,
    ExportSpec,
    Knowledge,
    KnowledgeSets,
    MethodSection,
    Penalties,
    Published,
    Section,
    Task,
    TaskCalibration,
    explain,
)
from keeptune.statistics.self_generated import SelfGeneration
from keeptune.statistics.store import DEFAULT_LIMIT
from keeptune.training.arguments import CONFIGS, check_arguments
from keeptune.training.losses.base import TaskLoss, loss_named, losses


def _expanded(folder: Path) -> Path:
    try:
        folder.expanduser().exists()
    except (OSError, RuntimeError) as error:  # names that are too long, or of a user that is not there
        raise ValueError(f"a folder ({error})") from error
    return folder.expanduser()


_Folder = Annotated[Path, AfterValidator(_expanded)]
_Layer = Annotated[StrictInt, Field(ge=0)]


_SEVERAL_RUNS = {
    "sweep": ("a section for several runs", "Run `keeptune sweep` with it."),
    "compare": ("a section for several runs", "Run `keeptune compare` with it."),
    "stages": (
        "a sequence of stages, which has no single task, plan or adapter",
        "Run `keeptune run` with it; each stage's own recipe lies in its folder then.",
    ),
}


class Recipe(Section):
    """A whole job.

    Files are looked for from the current directory, then from the recipe's folder. ``atlas`` names the
    embedded model, ``atlas:facts.jsonl`` one of its files, ``hf://datasets/org/name/file.jsonl`` one on the hub.
    """

    model: str
    method: MethodSection = Field(default_factory=lambda: {"name": DEFAULT_METHOD})
    task: Task
    output: _Folder
    targets: list[str] | None = None
    layers: Annotated[list[_Layer], Field(min_length=1)] | None = None
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None = None
    trainable_token_indices: list[_Layer] | dict[str, list[_Layer]] | None = None
    knowledge: KnowledgeSets | None = None
    penalties: Penalties = Field(default_factory=list)
    replay: float = Field(0.0, ge=0, lt=1)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: list[BenchmarkEntry] = Field(default_factory=list)
    stop_at_loss: float | None = Field(None, ge=0, allow_inf_nan=False)
    anchor: Anchor = "auto"
    export: ExportSpec = ExportSpec()
    dtype: Dtype = "auto"
    quantization: dict[str, Any] | None = None
    original: str | None = None
    start_from: StartFrom = "quantised"
    device: str = "auto"
    device_map: DeviceMap | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    store: _Folder | None = None
    store_limit: Annotated[ByteSize, Field(gt=0, validate_default=True)] = ByteSize(DEFAULT_LIMIT)
    memory: Literal["resident", "blockwise", "auto"] = "auto"
    reference: _Folder | None = None
    published: Published | None = None

    @property
    def all_knowledge(self) -> dict[str, Knowledge | SelfGeneration]:
        """The sets of knowledge by their keys, none or more."""
        if isinstance(self.knowledge, list):
            return {f"knowledge.{number}": part for number, part in enumerate(self.knowledge)}
        return {} if self.knowledge is None else {"knowledge": self.knowledge}

    @property
    def knowledge_sets(self) -> dict[str, Knowledge]:
        """Those that are of files."""
        return {where: part for where, part in self.all_knowledge.items() if isinstance(part, Knowledge)}

    @property
    def knowledge_files(self) -> list[str]:
        """The files of knowledge, and those of prompts for it."""
        named = (part.file if isinstance(part, Knowledge) else part.prompts for part in self.all_knowledge.values())
        return [name for name in named if isinstance(name, str)]

    @property
    def arguments(self) -> dict[str, Any]:
        """The ``train`` section, checked for the kind of task."""
        return check_arguments(self.train, CONFIGS.get(self.task.kind, TrainingArguments))

    @property
    def training(self) -> dict[str, Any]:
        """The ``train`` section as it is meant: a stop needs evaluations."""
        return ({} if self.stop_at_loss is None else {"eval_strategy": "steps"}) | self.train

    @property
    def data_files(self) -> list[str]:
        """The files of knowledge and task."""
        return [*self.knowledge_files, *(part.file for part in self.task.files)]

    def written(self) -> dict[str, Any]:
        """Returns the recipe as plain values that JSON can hold, for the record in the run folder."""
        return dict(json.loads(canonical_json(self.model_dump(mode="json"))))


class _Suite(Section):
    evaluate: list[BenchmarkEntry]


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None, *, fetch: Fetch = hub.fetch) -> Recipe:
    """Reads, completes and checks a recipe.

    Args:
        path: The YAML file.
        overrides: Dotted key to value, such as ``{"train.learning_rate": 1e-3}``.
        fetch: Gets the files of the hub.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    path = Path(path)
    return make_recipe(read_values(path, overrides), folder=path.parent, where=f"recipe {path}", fetch=fetch)


def make_recipe(values: Mapping[str, Any], *, folder: Path, where: str, fetch: Fetch = hub.fetch) -> Recipe:
    """Checks the values of a recipe and resolves its file paths.

    Args:
        values: As a YAML file holds them.
        folder: Where files are looked for that are not in the current directory.
        where: For error messages.
        fetch: Gets the files of the hub.

    Raises:
        RecipeError: A key is unknown or a value does not fit.
    """
    for key, (got, next_step) in _SEVERAL_RUNS.items():
        if key in values:
            raise RecipeError(f"{where}, key {key}", got=got, wanted="the recipe of one run", next_step=next_step)
    try:
        recipe = Recipe.model_validate(resolve_paths(values, folder, fetch))
    except ValidationError as error:
        raise explain(error, where, known_keys) from error
    make_method(recipe.method, seed=0)
    make_penalties(recipe.penalties)
    make_loss(recipe.task.loss)
    if recipe.quantization is not None:
        check_quantization(recipe.quantization)
    check_arguments(recipe.train, CONFIGS.get(recipe.task.kind, TrainingArguments))
    names = _check_names(recipe.evaluate, where)
    stop, evaluated = recipe.stop_at_loss is not None, recipe.training.get("eval_strategy", "no") != "no"
    known = [one for one in recipe.evaluate if one.role == "knowledge" or not stop]
    if (evaluated and not known) or (stop and not evaluated):
        raise RecipeError(
            f"{where}, key {'stop_at_loss' if stop else 'train.eval_strategy'}",
            got=f"no benchmark{' of role knowledge' * stop} in `evaluate`" if evaluated else "train.eval_strategy: no",
            wanted="evaluations while training, of one benchmark at least",
            next_step="Add for example `evaluate: [{name: triviaqa, examples: 100}]`, with train.eval_strategy: steps.",
        )
    if recipe.published is not None:
        recipe.published.check_scores(names, where)
    return recipe


def load_suite(path: Path | str) -> tuple[Benchmark, ...]:
    """Returns the benchmarks of a YAML file with an ``evaluate`` list, a recipe for one; its other keys are not read.

    Raises:
        RecipeError: The file is missing or not YAML, there are no benchmarks, or an entry does not fit.
    """
    path, where = Path(path), f"suite {path}"
    values = read_values(path)
    if not isinstance(values.get("evaluate"), list) or not values["evaluate"]:
        raise RecipeError(
            f"{where}, key evaluate",
            got="nothing",
            wanted="a list of benchmarks",
            next_step="Add for example `evaluate: [{name: mmlu, examples: 20}]`.",
        )
    try:
        suite = _Suite.model_validate(resolve_paths({"evaluate": values["evaluate"]}, path.parent))
    except ValidationError as error:
        raise explain(error, where, known_keys) from error
    _check_names(suite.evaluate, where)
    return tuple(suite.evaluate)


def _check_names(benchmarks: Sequence[Benchmark], where: str) -> list[str]:
    names = [benchmark.name for benchmark in benchmarks]
    for name in names:
        twice = names.count(name) > 1
        if twice or not re.fullmatch(r"[\w.-]+", name):
            raise RecipeError(
                f"{where}, evaluate",
                got=f'the benchmark name "{name}"' + (" twice" if twice else ""),
                wanted="different names of letters, digits, '.', '_' and '-': they name files",
                next_step="Rename it.",
            )
    return names


def make_method(options: Mapping[str, Any], *, seed: int) -> Any:
    """Makes a method from its recipe section.

    Args:
        options: ``name`` and the method's own fields.
        seed: For a method that draws numbers, unless the section has a ``seed`` of its own.

    Raises:
        RecipeError: The name or an option is unknown, or a value does not fit.
        PlanError: An option is out of range.
    """
    name, given = _named(options, "method", methods())
    if any(field.name == "seed" for field in dataclasses.fields(method_named(name))):
        given = {"seed": seed, **given}
    return made(name, given, methods(), "method", "method")


def make_penalties(sections: Sequence[Mapping[str, Any]]) -> tuple[Penalty, ...]:
    """Makes the penalties of a recipe from sections of a ``name`` and the penalty's own fields.

    Raises:
        RecipeError: A name or an option is unknown, or a value does not fit.
    """
    return tuple(penalty_named(*_named(section, "penalties", penalties())) for section in sections)


def make_loss(section: Mapping[str, Any] | None) -> TaskLoss | None:
    """Makes the loss of a recipe's task from a section of a ``name`` and its own fields; None for nll."""
    return None if section is None else loss_named(*_named(section, "task.loss", ["nll", *losses()]))


def _named(section: Mapping[str, Any], where: str, known: Iterable[str]) -> tuple[str, dict[str, Any]]:
    if "name" not in section:
        raise RecipeError(where, got="no name", wanted="a known name", next_step=f"Add `name:`. {nearest('', known)}")
    return str(section["name"]), {key: value for key, value in section.items() if key != "name"}


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Reads ``--key value`` pairs (:func:`parse_pairs`); a switch of the recipe may stand alone."""
    return parse_pairs(words, [name for name, field in Recipe.model_fields.items() if field.annotation is bool])


def known_keys(location: Sequence[str | int]) -> list[str]:
    """Returns the keys that a recipe has at a place."""
    sections: dict[str, type[Section]] = {"knowledge": Knowledge, "task": Task, "export": ExportSpec}
    first = str(location[0]) if len(location) > 1 else ""
    if first == "evaluate" or BY_BASE in location:
        kind = SelfGeneration if BY_BASE in location else NamedBenchmark if NAMED in location else FileBenchmark
        return [field.name for field in dataclasses.fields(kind)]
    section = TaskCalibration if location[:2] == ("task", "calibration") else sections.get(first, Recipe)
    return list(section.model_fields)
