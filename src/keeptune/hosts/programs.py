"""Hosts that are programs: Axolotl's plugin, and LLaMA-Factory with a section ``keeptune:`` in its YAML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from keeptune.core.errors import RecipeError
from keeptune.data.examples import Mixed
from keeptune.data.labelled import choose_rows
from keeptune.data.sources import read_jsonl
from keeptune.hosts.callback import Callback
from keeptune.pipeline.planning import PlanOptions
from keeptune.pipeline.task_kinds import read_knowledge
from keeptune.recipe.paths import resolve_paths
from keeptune.recipe.reading import DEFAULT_METHOD, read_values
from keeptune.recipe.schema import known_keys, make_method, make_penalties
from keeptune.recipe.sections import BenchmarkEntry, Knowledge, MethodSection, Penalties, Section, explain


class HostSection(Section):
    """What keeptune does in a host's training, in keys of a recipe; rank, data and rate are the host's to say."""

    method: MethodSection = Field(default_factory=lambda: {"name": DEFAULT_METHOD})
    knowledge: list[Knowledge] = Field(min_length=1)
    penalties: Penalties = Field(default_factory=list)
    evaluate: list[BenchmarkEntry] = Field(default_factory=list)
    stop_at_loss: float | None = Field(None, ge=0, allow_inf_nan=False)
    store: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _found(cls, values: Any) -> Any:
        """Puts paths in the place of names of files, and a list in that of one set of knowledge."""
        if not isinstance(values, Mapping):
            return values
        found = resolve_paths(values, Path())
        knowledge = found.get("knowledge")
        return found | ({"knowledge": [knowledge]} if isinstance(knowledge, Mapping) else {})

    @property
    def texts(self) -> Any:
        """What is to be kept, of all sets, as examples."""
        parts = []
        for number, part in enumerate(self.knowledge):
            where = f"keeptune.knowledge.{number}"
            rows = read_jsonl(part.file, where=where, **part.origin)
            chosen = choose_rows(rows, part.examples, by=part.by, seed=part.seed, where=where)
            parts.append(read_knowledge(part, chosen, where))
        order = tuple((at, row) for at, part in enumerate(parts) for row in range(len(part)))
        return parts[0] if len(parts) == 1 else Mixed(tuple(parts), order)


def callback_of(values: Any, where: str) -> Callback:
    """Returns the callback that a section of a file asks for.

    Raises:
        KeeptuneError: It is missing, a key is unknown, or a value does not fit.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(
            where,
            got="nothing" if values is None else repr(values),
            wanted="a section `keeptune:`",
            next_step="Add for example `keeptune: {knowledge: general}`.",
        )
    try:
        section = HostSection.model_validate(values)
    except ValidationError as error:
        raise explain(error, where, _known) from error
    longest = max(part.max_length for part in section.knowledge)
    return Callback(
        method=make_method(section.method, seed=0),
        knowledge=section.texts,
        penalties=make_penalties(section.penalties),
        evaluate=section.evaluate,
        stop_at_loss=section.stop_at_loss,
        options=PlanOptions(max_length=longest, store=section.store),
    )


def _known(place: Sequence[str | int]) -> Sequence[str]:
    return list(HostSection.model_fields) if len(place) == 1 else known_keys(place)


class AxolotlArgs(BaseModel):
    """What the plugin adds to Axolotl's own keys."""

    keeptune: HostSection


def axolotl_plugin() -> type[Any]:
    """Returns the class of ``plugins: [keeptune.hosts.AxolotlPlugin]``, on the base class of this Axolotl."""
    from axolotl.integrations.base import BasePlugin

    class AxolotlPlugin(BasePlugin):
        """Adds the callback to the trainer that Axolotl makes."""

        def get_input_args(self) -> str:
            """Returns the name of the model of its keys."""
            return f"{__name__}.{AxolotlArgs.__name__}"

        def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
            """Returns the callback."""
            return [callback_of(cfg["keeptune"], "axolotl, key keeptune")]

    return AxolotlPlugin


def run_llamafactory(path: Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Runs LLaMA-Factory on a file of its own, without the section that is keeptune's, and with the callback.

    Args:
        path: Its YAML file, with a section ``keeptune:``.
        overrides: Dotted key to value, such as ``{"learning_rate": 1e-4}``.

    Raises:
        KeeptuneError: The section is missing or wrong, or LLaMA-Factory is not installed.
    """
    values = read_values(path, overrides)
    callback = callback_of(values.pop("keeptune", None), f"{path}, key keeptune")
    try:
        from llamafactory.train.tuner import run_exp
    except ModuleNotFoundError as error:
        raise RecipeError(
            "keeptune llamafactory",
            got=f"no module {error.name}",
            wanted="LLaMA-Factory, installed beside keeptune",
            next_step="Run `pip install llamafactory` (docs/guides/hosts.md says with which versions).",
        ) from error
    run_exp(args=values, callbacks=[callback])
