"""The ``compare:`` section of a recipe: methods, rates, strengths and seeds to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, ValidationError

from keeptune.core.errors import RecipeError, nearest
from keeptune.recipe.sections import Section, explain

__all__ = ["CompareSection", "Resources", "Search", "read_section", "refuse_repeats"]

_Rate = Annotated[float, Field(gt=0)]
_Seed = Annotated[StrictInt, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class Resources(Section):
    """What each run gets on Ray, and the address of the cluster; without one, Ray starts on this machine."""

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    address: str | None = None


class Search(Section):
    """A budgeted search in place of the whole grid."""

    trials: int = Field(40, ge=1)
    seed: int = Field(0, ge=0)


class CompareSection(Section):
    """The section; :mod:`keeptune.experiments.entries` reads ``methods``. Without ``resources`` runs need no Ray."""

    methods: list[str | dict[str, Any]] = Field(min_length=1)
    learning_rate: list[_Rate] | None = Field(None, min_length=1)
    strength: list[_Rate] = Field(default=[1.0], min_length=1)
    seeds: list[_Seed] = Field(default=[0, 1, 2], min_length=1)
    scales: list[_Share] = [0.25, 0.5, 0.75]
    intruders: list[_Share] = [0.5]
    search: Search | None = None
    resources: Resources | None = Resources()
    baselines: bool = True
    learned: list[str] | None = None
    forgotten: list[str] | None = None
    score: float | None = None
    reference_point: tuple[float, float] | None = None
    estimate: Literal["mean", "upper"] = "mean"  # of what is lost, for --max-loss


def refuse_repeats(values: list[Any], where: str) -> None:
    """Raises RecipeError where a value stands twice in a list."""
    again = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if again is not None:
        raise RecipeError(
            where,
            got=f"{again} twice",
            wanted="different values: each makes a run of its own",
            next_step="Name it once.",
        )


def read_section(values: Mapping[str, Any], where: str) -> CompareSection:
    """Reads the section from a recipe's values; RecipeError where there is none, or a key or value does not fit."""
    given = values.get("compare")
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"{where}, key compare",
            got="nothing" if given is None else repr(given),
            wanted="a section that lists methods",
            next_step="Example: compare: {methods: [keep, lora-null], learning_rate: [5e-4, 1e-3, 2e-3]}.",
        )
    try:
        section = CompareSection.model_validate(given)
    except ValidationError as error:
        raise _explained(error, where) from error
    for key in ("learning_rate", "strength", "seeds", "scales", "intruders"):
        refuse_repeats(getattr(section, key) or [], f"{where}, key compare.{key}")
    return section


def _explained(error: ValidationError, where: str) -> RecipeError:
    from keeptune.methods.base import methods

    parts: dict[str, type[Section]] = {"search": Search, "resources": Resources}
    explained = explain(
        error, where, lambda at: list(parts.get(str(at[0]) if len(at) > 1 else "", CompareSection).model_fields)
    )
    place = explained.where.replace(", key ", ", key compare.", 1)
    if place.endswith("compare.methods") and explained.got == "nothing":
        return RecipeError(
            place,
            got="nothing",
            wanted="the methods to compare",
            next_step="Example: methods: [lora-null, {name: keep, nats: 0.001}]. " + nearest("", list(methods())),
        )
    return RecipeError(place, got=explained.got, wanted=explained.wanted, next_step=explained.next_step)
