"""The recipe of a sequence: a run's recipe with ``stages``, each of which overrides keys of it."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from keeptune.core.errors import RecipeError, nearest, placed
from keeptune.data import hub
from keeptune.experiments.compare_section import checked
from keeptune.experiments.entries import check_settings, with_settings
from keeptune.recipe.paths import Fetch
from keeptune.recipe.reading import read_values
from keeptune.recipe.schema import Recipe, make_recipe
from keeptune.recipe.sections import DataSection, Section

_log = logging.getLogger(__name__)
_EARLIER, _OTHERS = "stages:", "earlier"
_NAME = re.compile(r"\w[\w.-]{0,60}")
_FIXED = {
    **dict.fromkeys(
        ("model", "revision", "dtype", "quantization", "trust_remote_code", "allow_pickle"),
        "the first stage starts from the base, every other from the model after the stages before it",
    ),
    "output": "each stage has its own folder below the sequence's",
    "evaluate": "everything is scored after each stage",
    "export": "there is one product, for the original base",
    "device": "all stages run on one device",
    "reference": "a sequence has no T",
}
_EXAMPLE = 'Example: stages: [{name: sums, task: {...}}, {name: facts, task: {...}, "train.learning_rate": 1e-3}].'


class _Options(Section):
    benchmarks: dict[str, str] = Field(default_factory=dict)
    keep_models: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage: its number from 1, its name, and its recipe, with the original base for a model."""

    number: int
    name: str
    recipe: Recipe

    @property
    def folder(self) -> str:
        """The name of its folders."""
        return f"{self.number}-{self.name}"


@dataclass(frozen=True)
class StageSequence:
    """One or more stages that follow each other.

    Args:
        owners: Benchmark to the stage whose task it measures; one that measures none is not in it.
        keep_models: Keep the whole models that stages after the first start from.
    """

    stages: tuple[Stage, ...]
    owners: Mapping[str, str]
    keep_models: bool = False

    @property
    def output(self) -> Path:
        """Where everything goes."""
        return self.whole.output

    @property
    def whole(self) -> Recipe:
        """What all stages have in common: base, benchmarks, export."""
        return self.stages[0].recipe


def load_sequence(
    path: Path | str, overrides: Mapping[str, Any] | None = None, *, fetch: Fetch = hub.fetch
) -> StageSequence:
    """Reads the recipe of a sequence from a YAML file, as :func:`make_sequence`.

    ``stages.0.train.seed`` in ``overrides`` sets a key of one stage.
    """
    path = Path(path)
    return make_sequence(read_values(path, overrides), folder=path.parent, where=f"recipe {path}", fetch=fetch)


def make_sequence(values: Mapping[str, Any], *, folder: Path, where: str, fetch: Fetch = hub.fetch) -> StageSequence:
    """Reads the values of a recipe with ``stages`` and ``sequence``, as a YAML file in a folder holds them.

    Raises:
        RecipeError: A key is unknown or a value does not fit; the message names the stage.
    """
    common = {key: value for key, value in values.items() if key not in ("stages", "sequence")}
    entries = _entries(values.get("stages"), where)
    options = checked(_Options, values.get("sequence") or {}, where, "sequence.")
    stages: list[Stage] = []
    tasks: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(entries, start=1):
        place = f"{where}, stage {entry['name']}"
        settings = {key: value for key, value in entry.items() if key != "name"}
        check_settings(settings, place, _FIXED)
        own = _with_earlier(with_settings(common, settings, place), tasks, place)
        recipe = placed(place, partial(make_recipe, own, folder=folder, where=place, fetch=fetch))
        _refuse(recipe, place)
        stages.append(Stage(number, entry["name"], recipe))
        tasks[entry["name"]] = own["task"]
    return StageSequence(tuple(stages), _owners(stages, options, where), options.keep_models)


def _entries(raw: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not raw or not all(isinstance(entry, dict) for entry in raw):
        raise RecipeError(
            f"{where}, key stages",
            got="nothing" if raw is None else repr(raw),
            wanted="a list of stages, each a name and keys of the recipe",
            next_step=_EXAMPLE,
        )
    seen: set[str] = set()
    for number, entry in enumerate(raw, start=1):
        name = entry.get("name")
        wrong = not isinstance(name, str) or not _NAME.fullmatch(name) or name == _OTHERS
        if wrong or name.casefold() in seen:
            raise RecipeError(
                f"{where}, stage {number}",
                got="no name" if name is None else f"the name {name!r}" + ("" if wrong else " twice"),
                wanted=f"a name of its own, of letters, digits, '.', '_' and '-', not {_OTHERS!r}: it names folders",
                next_step=_EXAMPLE,
            )
        seen.add(name.casefold())
    return raw


def _with_earlier(values: dict[str, Any], tasks: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    given = values.get("knowledge")
    sets = given if isinstance(given, list) else [given]
    if not any(_names_stages(entry) for entry in sets):
        return values
    datasets = [part for entry in sets for part in _earlier(entry, tasks, where)]
    rest = {key: value for key, value in values.items() if key != "knowledge"}
    if datasets:
        return rest | {"knowledge": datasets if isinstance(given, list) or len(datasets) > 1 else datasets[0]}
    if rest.get("replay"):
        _log.info("%s: no stages before it, and so nothing to replay", where)
    return {key: value for key, value in rest.items() if key != "replay"}


def _names_stages(entry: Any) -> bool:
    return isinstance(entry, Mapping) and str(entry.get("file")).startswith(_EARLIER)


def _earlier(entry: Any, tasks: Mapping[str, Mapping[str, Any]], where: str) -> list[Any]:
    """Returns the datasets of the stages that an entry of `knowledge` names; itself where it names none."""
    if not _names_stages(entry):
        return [entry]
    name = str(entry["file"]).removeprefix(_EARLIER)
    if name != _OTHERS and name not in tasks:
        raise RecipeError(
            f"{where}, key knowledge.file",
            got=str(entry["file"]),
            wanted=f"stages:{_OTHERS}, or a stage before this one",
            next_step=nearest(name, list(tasks)) if tasks else "The first stage has none before it; leave it out.",
        )
    form = {key: value for key, value in entry.items() if key != "file"}
    has_form = any(form.get(key) is not None for key in ("text", "prompt", "completion", "choices"))
    keys = () if has_form else ("prompt", "completion", *DataSection.model_fields)
    datasets = []
    for task in (tasks[one] for one in (tasks if name == _OTHERS else [name])):
        dataset = {"file": task.get("train"), **{key: task[key] for key in keys if key in task}, **form}
        if isinstance(task.get("examples"), int):  # what was not trained on is not replayed
            dataset["examples"] = min(task["examples"], form.get("examples") or 256)
        datasets.append(dataset)
    return datasets


def _refuse(recipe: Recipe, where: str) -> None:
    if recipe.task.kind != "completion":
        raise RecipeError(
            f"{where}, key task.kind",
            got=recipe.task.kind,
            wanted="completion: stages share one model, and a classifier's head answers for one task",
            next_step="Train it in a run of its own, or, of a classifier, the label as a completion.",
        )
    if not recipe.evaluate:
        raise RecipeError(
            f"{where}, key evaluate",
            got="nothing",
            wanted="benchmarks: a sequence is judged by what it scores after each stage",
            next_step="List one for each stage's task, and what the base knows.",
        )


def _owners(stages: Sequence[Stage], options: _Options, where: str) -> dict[str, str]:
    roles = {benchmark.name: benchmark.role for benchmark in stages[0].recipe.evaluate}
    tasks, names = [name for name, role in roles.items() if role == "task"], [stage.name for stage in stages]
    for name, stage in options.benchmarks.items():
        for what, got, known in (("benchmark", name, tasks), ("stage", stage, names)):
            if got not in known:
                role = f"{roles[name]} " if what == "benchmark" and name in roles else ""
                raise RecipeError(
                    f"{where}, key sequence.benchmarks",
                    got=f"the {role}{what} {got!r}",
                    wanted="a benchmark with role: task and its stage; what the base knew belongs to no stage",
                    next_step=nearest(got, known),
                )
    return {name: name for name in tasks if name in names} | options.benchmarks
