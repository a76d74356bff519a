"""The schema of recipe.yaml: one file describes a whole job; unknown keys are errors with the nearest name."""

from __future__ import annotations

import dataclasses
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
    TypeAdapter,
    ValidationError,
)
from transformers import TrainingArguments
from trl import SFTConfig

from keeptune import atlas
from keeptune.adapter.anchor import Anchor
from keeptune.combining import Combined, Part, tuned_roles
from keeptune.core.artefact import canonical_json
from keeptune.core.errors import PlanError, RecipeError, nearest
from keeptune.data import hub
from keeptune.evaluate.tasks import Benchmark
from keeptune.methods.base import method_named, methods
from keeptune.model.load import Dtype
from keeptune.penalties.base import PenaltySpec, penalties, penalty_named
from keeptune.sections import (
    ExportSpec,
    Kind,
    Knowledge,
    KnowledgeSets,
    MethodSections,
    Section,
    Task,
    TaskCalibration,
    without_tags,
)
from keeptune.train.trainer import check_arguments
from keeptune.values import override_value, read_values, spelt_out

__all__ = [
    "ExportSpec",
    "Kind",
    "Knowledge",
    "Recipe",
    "Task",
    "TaskCalibration",
    "load_recipe",
    "make_method",
    "make_penalties",
    "make_recipe",
    "parse_overrides",
    "resolve_file",
    "resolve_model",
]


_Folder = Annotated[Path, AfterValidator(Path.expanduser)]
_Layer = Annotated[StrictInt, Field(ge=0)]


class Recipe(Section):
    """A whole job.

    Files are looked for from the current directory, then from the recipe's folder. ``atlas`` names the
    embedded model, ``atlas:facts.jsonl`` one of its files, ``hf://datasets/org/name/file.jsonl`` one on the hub.
    """

    model: str
    method: MethodSections = Field(default_factory=lambda: {"name": "keep"})  # docs/keep.md says why
    task: Task
    output: _Folder
    targets: list[str] | None = None
    layers: Annotated[list[_Layer], Field(min_length=1)] | None = None
    knowledge: KnowledgeSets | None = None
    penalties: list[Annotated[dict[str, Any], BeforeValidator(spelt_out)]] = Field(default_factory=list)
    replay: float = Field(0.0, ge=0, lt=1)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: list[Benchmark] = Field(default_factory=list)
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
        plain: dict[str, Any] = yaml.safe_load(canonical_json(self.model_dump(mode="json")))
        return plain


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, complete and check a recipe.

    Args:
        path: The YAML file.
        overrides: Dotted key to value, such as ``{"train.learning_rate": 1e-3}``.

    Returns:
        The recipe, with file paths resolved.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    path = Path(path)
    return make_recipe(read_values(path, overrides), folder=path.parent, where=f"recipe {path}")


def make_recipe(values: Mapping[str, Any], *, folder: Path, where: str) -> Recipe:
    """Check the values of a recipe.

    Args:
        values: As a YAML file holds them.
        folder: Where files are looked for that are not in the current directory.
        where: For error messages.

    Returns:
        The recipe, with file paths resolved.

    Raises:
        RecipeError: A key is unknown or a value does not fit.
    """
    if "sweep" in values:
        raise RecipeError(
            f"{where}, key sweep",
            got="a sweep",
            wanted="the recipe of one run",
            next_step="Run `keeptune sweep` with it.",
        )
    try:
        recipe = Recipe.model_validate(_resolve_paths(values, folder))
    except ValidationError as error:
        raise _explain(error, where) from error
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
    return recipe


def make_method(options: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, seed: int) -> Any:
    """Make a method from its recipe section, or several side by side from theirs.

    Args:
        options: ``name`` and the method's own fields; of several methods also their ``targets``.
        seed: For a method that draws numbers, unless the section has a ``seed`` of its own.

    Returns:
        The method.

    Raises:
        RecipeError: The name or an option is unknown, or a value does not fit.
        PlanError: An option is out of range, or the methods do not fit together.
    """
    if isinstance(options, Mapping):
        return _method_of(options, seed)
    return Combined([_part_of(section, f"method.{index}", seed) for index, section in enumerate(options)])


def _part_of(section: Mapping[str, Any], where: str, seed: int) -> Part:
    roles = section.get("targets")
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise RecipeError(
            f"{where}.targets",
            got="nothing" if roles is None else repr(roles),
            wanted="the roles that this method is for, since there are several",
            next_step="Example: targets: [down_proj].",
        )
    try:
        return Part(_method_of({key: value for key, value in section.items() if key != "targets"}, seed), roles)
    except (PlanError, RecipeError) as error:
        place = re.sub(r"^method\b", where, error.where)
        raise type(error)(place, got=error.got, wanted=error.wanted, next_step=error.next_step) from error


def _method_of(options: Mapping[str, Any], seed: int) -> Any:
    if "name" not in options:
        raise RecipeError("method", got="no name", wanted="name: one of the methods", next_step=nearest("", methods()))
    cls = method_named(str(options["name"]))
    given = {key: value for key, value in options.items() if key != "name"}
    _check_names(given, cls, "method", cls.name)
    if any(field.name == "seed" for field in dataclasses.fields(cls)):
        given = {"seed": seed, **given}
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        raise _explain(error, "method") from error


def _check_names(given: Mapping[str, Any], cls: type[Any], where: str, owner: str) -> None:
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in known:
            raise RecipeError(
                f"{where}.{key}",
                got=f"an option that {owner} does not have",
                wanted="one of its options",
                next_step=nearest(key, known) if known else f"{owner} has no options.",
            )
        if dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping):  # pydantic takes any key there
            _check_names(value, type(known[key]), f"{where}.{key}", key)


def make_penalties(sections: Sequence[Mapping[str, Any]]) -> tuple[PenaltySpec, ...]:
    """Make the penalties of a recipe.

    Args:
        sections: Each a ``name`` and the penalty's own fields.

    Returns:
        The penalties.

    Raises:
        RecipeError: A name or an option is unknown, or a value does not fit.
    """
    made = []
    for section in sections:
        if "name" not in section:
            raise RecipeError(
                "penalties", got="no name", wanted="name: one of the penalties", next_step=nearest("", penalties())
            )
        options = {key: value for key, value in section.items() if key != "name"}
        made.append(penalty_named(str(section["name"]), options))
    return tuple(made)


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


_FILES = (("knowledge", "file"), ("task", "train"), ("evaluate", "file"))


def _resolve_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    done = dict(values)
    for section, key in _FILES:
        part = done.get(section)
        done[section] = [_found(p, key, folder) for p in part] if isinstance(part, list) else _found(part, key, folder)
        if section not in values:
            del done[section]
    model: Any = done.get("model")
    if isinstance(model, str):
        done["model"] = resolve_model(model, folder)
    return done


def _found(section: Any, key: str, folder: Path) -> Any:
    if isinstance(section, Mapping) and isinstance(section.get(key), str):
        return {**section, key: resolve_file(section[key], folder)}
    return section


def resolve_file(name: str, folder: Path = Path()) -> str:
    """Find the data file that a name stands for.

    Args:
        name: A path, ``atlas:facts.jsonl`` or ``hf://datasets/org/name/file.jsonl``.
        folder: Where a file is looked for that is not in the current directory.

    Returns:
        A path; there need be no such file.

    Raises:
        RecipeError: atlas has no such file.
    """
    if name.startswith("atlas:"):
        try:
            return str(atlas.data_path(name.removeprefix("atlas:")))
        except FileNotFoundError as error:
            raise RecipeError(name, got=str(error), wanted="a file of atlas", next_step="Pick one of them.") from error
    if name.startswith(hub.PREFIX):
        return str(hub.fetch(name))
    path = Path(name).expanduser()
    beside = folder / path
    return str((beside if not path.exists() and beside.exists() else path).absolute())


def resolve_model(name: str, folder: Path = Path()) -> str:
    """Find the model that a name stands for.

    Args:
        name: ``atlas``, a folder or a hub id.
        folder: Where a folder is looked for that is not in the current directory.

    Returns:
        A path, or the hub id.
    """
    if name == "atlas":
        return str(atlas.model_path())
    beside = folder / Path(name).expanduser()
    return str(beside.absolute()) if not Path(name).expanduser().is_dir() and beside.is_dir() else name


def _explain(error: ValidationError, where: str) -> RecipeError:
    first = error.errors()[0]
    location = without_tags(first["loc"])
    place = ".".join(str(part) for part in location)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(location)
        return RecipeError(
            f"{where}, key {place}",
            got="an unknown key",
            wanted="a key that recipes have",
            next_step=nearest(str(location[-1]), known),
        )
    if first["type"] in ("missing", "missing_argument"):
        return RecipeError(
            f"{where}, key {place}", got="nothing", wanted="a value", next_step=f"Add `{place}:` to the recipe."
        )
    got = canonical_json(first["input"]) if _is_plain(first["input"]) else repr(first["input"])
    return RecipeError(f"{where}, key {place}", got=got, wanted=first["msg"], next_step="Correct the value.")


def _known_keys(location: Sequence[str | int]) -> list[str]:
    sections: dict[str, Any] = {"knowledge": Knowledge, "task": Task, "export": ExportSpec}
    first = str(location[0])
    if location[:2] == ("task", "calibration"):
        return list(TaskCalibration.model_fields)
    if len(location) > 1 and first in sections:
        return list(sections[first].model_fields)
    if len(location) > 1 and first == "evaluate":
        return [field.name for field in dataclasses.fields(Benchmark)]
    return list(Recipe.model_fields)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)
