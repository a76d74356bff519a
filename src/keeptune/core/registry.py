"""The registered classes of a package: those of its files, and those of other packages under an entry-point group."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from keeptune.core.errors import RecipeError, need_known

T = TypeVar("T")


def registered(package: ModuleType, base: type[T], kind: str) -> dict[str, type[T]]:
    """Returns all classes of a kind by name: of a package's files, and of the entry points that are named after it.

    A class is registered if it has a ``name`` of its own.

    Raises:
        RecipeError: Two classes have one name; ``kind``, such as ``"method"``, says of what.
    """
    classes: dict[str, Any] = {}
    for cls in (*_own(package, base), *(point.load() for point in entry_points(group=package.__name__))):
        if classes.setdefault(cls.name, cls) is not cls:
            raise RecipeError(
                f"{kind} {cls.name}",
                got=f"two of that name: {classes[cls.name]} and {cls}",
                wanted="one",
                next_step=f"Uninstall one of the packages or rename its {kind}.",
            )
    return dict(sorted(classes.items()))


@cache  # what is installed does not change while it runs
def entry_points(group: str) -> metadata.EntryPoints:
    """Returns the entry points of a group."""
    return metadata.entry_points(group=group)


def look_up(name: str, known: Mapping[str, T], where: str, kind: str) -> T:
    """Returns the class of a name among those registered; a RecipeError shows the nearest name where there is none."""
    need_known(name, known, where, f"the name of a {kind}")
    return known[name]


def made(name: str, options: Mapping[str, Any], known: Mapping[str, type[Any]], where: str, kind: str) -> Any:
    """Returns an object of the class of a name among those known, a dataclass, with options, its fields.

    Raises:
        RecipeError: The name or an option is unknown, or a value does not fit; ``kind`` says of what, as ``"penalty"``.
    """
    cls = look_up(name, known, where, kind)
    _check_names(options, cls, where, name)
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            ".".join(map(str, (where, *first["loc"]))),
            got=repr(first["input"]),
            wanted=first["msg"].removeprefix("Input should be "),
            next_step="Correct the value.",
        ) from error


def _check_names(given: Mapping[str, Any], cls: type[Any], where: str, owner: str) -> None:
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, value in given.items():
        need_known(key, known, f"{where}.{key}", f"an option of {owner}" if known else f"none: {owner} has no options")
        if dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping):  # pydantic takes any key there
            _check_names(value, type(known[key]), f"{where}.{key}", key)


def _own(package: ModuleType, base: type[Any]) -> list[type[Any]]:
    return [
        cls
        for module in _modules(package)
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and issubclass(cls, base) and "name" in vars(cls)
    ]


@cache  # the files of a package do not change while it runs
def _modules(package: ModuleType) -> tuple[ModuleType, ...]:
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(f"{package.__name__}.{name}") for name in names)
