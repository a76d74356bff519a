"""Sections of a recipe that more than one module builds on: what to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from keeptune.core.errors import RecipeError

__all__ = ["Knowledge", "KnowledgeSets", "Section", "without_tags"]

_TEXT = "{text}"
_FORMS = ("text", "prompt", "completion")
_TAGS = ("one knowledge section", "several knowledge sections")


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Knowledge(Section):
    """A set of what to keep: whole texts, or prompts with their completions; data for statistics."""

    file: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    examples: int = Field(256, ge=1)
    max_length: int = Field(1024, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _default_form(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and all(values.get(key) is None for key in _FORMS):
            return {**values, "text": _TEXT}
        return values

    @model_validator(mode="after")
    def _check_form(self) -> Knowledge:
        given = [key for key in _FORMS if getattr(self, key) is not None]
        if given not in (["text"], ["prompt", "completion"]):
            raise RecipeError(
                f"recipe, key knowledge, file {self.file}",
                got=" and ".join(given),
                wanted="either text, or prompt and completion",
                next_step="Give `text` to keep whole texts, `prompt` and `completion` to keep answers.",
            )
        return self


def _form(value: Any) -> str:
    return _TAGS[isinstance(value, list | tuple)]


KnowledgeSets = Annotated[
    Annotated[Knowledge, Tag(_TAGS[0])] | Annotated[list[Knowledge], Field(min_length=1), Tag(_TAGS[1])],
    Discriminator(_form),
]


def without_tags(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Take the names of alternatives out of the place of an error.

    Args:
        location: As pydantic gives it.

    Returns:
        The keys that the recipe has.
    """
    return tuple(part for part in location if part not in _TAGS)
