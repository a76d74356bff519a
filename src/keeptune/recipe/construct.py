"""Methods and penalties from the sections of a recipe; unknown options are errors with the nearest name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keeptune.core.errors import RecipeError, nearest
from keeptune.core.registry import made
from keeptune.methods.base import method_named, methods
from keeptune.penalties.base import Penalty, penalties, penalty_named
from keeptune.training.losses.base import TaskLoss, loss_named, losses


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
