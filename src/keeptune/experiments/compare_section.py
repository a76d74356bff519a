"""The ``compare:`` section of a recipe: methods, rates, strengths and seeds to compare."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, StrictInt, ValidationError
from pydantic_core import PydanticCustomError

from keeptune.core.errors import RecipeError, nearest
from keeptune.pipeline.launching import Launch, Sharding
from keeptune.recipe.sections import Section, explain


def _different(values: list[Any]) -> list[Any]:
    if any(value in values[:place] for place, value in enumerate(values)):
        raise PydanticCustomError("repeated", "different values: each makes a run of its own")
    return values


Different = AfterValidator(_different)
Numbers = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1), Different]
_Seeds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1), Different]
_Shares = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Different]
S = TypeVar("S", bound=Section)


class Resources(Section):
    """What each run gets on Ray, and the address of the cluster; without one, Ray starts on this machine.

    It has a process for each whole GPU unless ``processes`` says how many; ``sharding`` is that of `keeptune launch`.
    """

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    processes: StrictInt | None = Field(None, ge=1)
    sharding: Sharding | None = None
    address: str | None = None

    @property
    def launch(self) -> Launch:
        """The processes of a run."""
        return Launch(self.processes or max(1, int(self.gpus)), self.sharding)


class CompareSection(Section):
    """The section; :mod:`keeptune.experiments.entries` reads ``methods``. Without ``resources`` runs need no Ray."""

    methods: list[str | dict[str, Any]] = Field(min_length=1)
    learning_rate: Numbers | None = None
    strength: Numbers = [1.0]
    seeds: _Seeds = [0, 1, 2]
    scales: _Shares = [0.25, 0.5, 0.75]
    pruned: _Shares = []
    resources: Resources | None = Resources()
    baselines: bool = True
    learned: list[str] | None = None
    forgotten: list[str] | None = None
    score: float | None = None
    estimate: Literal["mean", "upper"] = "mean"  # of what is lost, for --max-loss


def read_section(values: Mapping[str, Any], where: str) -> CompareSection:
    """Reads the section from a recipe's values; RecipeError where there is none, or a key or value does not fit."""
    from keeptune.methods.base import methods

    given = values.get("compare")
    named = given.get("methods") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or not named:
        raise RecipeError(
            f"{where}, key compare.methods",
            got="nothing" if named is None else repr(named),
            wanted="the methods to compare",
            next_step="Example: compare: {methods: [keep, lora-null], learning_rate: [5e-4, 1e-3, 2e-3]}. "
            + nearest("", list(methods())),
        )
    return checked(CompareSection, given, where, "compare.")


def checked(model: type[S], given: Any, where: str, key: str = "") -> S:
    """Returns a section of a recipe, whose keys stand behind ``key`` (``"compare."``); RecipeError where it is none."""

    def known(place: Sequence[str | int]) -> list[str]:
        part: Any = model.model_fields[str(place[0])].annotation if len(place) > 1 else model
        options = [part, *getattr(part, "__args__", ())]
        return [name for one in options if hasattr(one, "model_fields") for name in one.model_fields]

    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise explain(error, where, known, key) from error
