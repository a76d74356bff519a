"""The values of a recipe before they are checked, from YAML, within limits of depth and size, and the command line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from keeptune.core.errors import RecipeError
from keeptune.core.redaction import redacted

_LENGTH = 200_000  # characters
_DEPTH = 32
_VALUES = 100_000  # an alias counts as often as it is used: without a limit, 400 bytes can stand for gigabytes
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """YAML where 1e-4 is a number and 2026-01-01 text, as YAML 1.2 has it; a key stands once, and depth has a limit."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def nodes(self, node: Any, level: int = 1, above: tuple[int, ...] = ()) -> Iterator[Any]:
        """Yields a node and those below it, as often as aliases use them; refuses what no recipe holds."""
        if id(node) in above:
            raise _Refused("an alias of something that it is part of", node)
        if level > _DEPTH:
            raise _Refused(f"more than {_DEPTH} levels", node)
        if node.tag not in _PLAIN:
            raise _Refused(f"the tag {node.tag}", node)
        yield node
        children = node.value
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
                    raise _Refused("a key that is no text", key)
                self._check_scalar(key)
                if key.value in seen:
                    raise _Refused(f'the key "{key.value[:80]}" twice', key)
                seen.add(key.value)
            children = [value for _, value in node.value]
        elif isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
            children = []
        for child in children:
            yield from self.nodes(child, level + 1, (*above, id(node)))

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        if _NO_TEXT.search(node.value):
            raise _Refused("a NUL character, or half of a surrogate pair", node)
        kind = node.tag.rpartition(":")[2]
        if kind not in ("int", "float"):
            return
        try:
            number = self.construct_object(node)
        except ValueError as error:
            raise _Refused(f"{error}", node) from error
        if not (abs(number) < 2**63 if kind == "int" else math.isfinite(number)):
            raise _Refused(f"the number {node.value[:40]}, which is too large or none", node)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, problem: str, at: Any) -> None:
        mark = at.get_mark() if isinstance(at, _Loader) else at.start_mark
        super().__init__(problem=problem, problem_mark=mark)


def parse_yaml(text: str) -> Any:
    """Returns the value of YAML, where 1e-4 is a number; dates are text.

    Raises:
        yaml.YAMLError: It is no YAML, or no plain values: a key twice, an alias of itself, NaN, a tag, or too much.
    """
    if len(text) > _LENGTH:
        raise yaml.YAMLError(f"more than {_LENGTH:,} characters")
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        for number, node in enumerate(() if root is None else loader.nodes(root), start=1):
            if number > _VALUES:
                raise _Refused(f"more than {_VALUES} values", node)
        return None if root is None else loader.construct_document(root)
    except RecursionError as error:
        raise _Refused(f"more than {_DEPTH} levels", loader) from error
    finally:
        loader.dispose()


DEFAULT_METHOD = "keep"  # why: docs/guides/keep.md


def read_values(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads the values of a recipe without checking them.

    Args:
        path: The YAML file.
        overrides: Dotted key to value; a whole section is set before its parts, in whatever order they come.

    Raises:
        RecipeError: The file is missing or not YAML, or an override leads nowhere.
    """
    where = f"recipe {path}"
    try:
        with path.open(encoding="utf-8") as file:
            values = parse_yaml(file.read(_LENGTH + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(where, got=str(error), wanted="a YAML file", next_step="Check the path.") from error
    except yaml.YAMLError as error:
        got = " ".join(str(error).split())
        raise RecipeError(where, got=got, wanted="YAML", next_step="Correct the file.") from error
    if not isinstance(values, dict):
        got = f"a {type(values).__name__}"
        raise RecipeError(where, got=got, wanted="keys and values", next_step="Start with `model: path`.")
    for key, value in sorted((overrides or {}).items(), key=lambda item: item[0].count(".")):
        set_value(values, key, value, where=f"command line --{key}")
    secret = next((key for key, one in values.items() if redacted(text := json.dumps({key: one})) != text), None)
    if secret is not None:
        raise RecipeError(
            f"{where}, key {secret}",
            got="a secret, or what looks like one",
            wanted="none: recipes are copied into records, cards and reports",
            next_step="Log in with `hf auth login`, or set it in the environment, such as HF_TOKEN.",
        )
    return values


def set_value(values: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Sets one key of a recipe's values, in place.

    Args:
        values: As a YAML file holds them.
        key: Dotted, such as ``train.learning_rate``.
        value: A YAML value.
        where: For error messages.

    Raises:
        RecipeError: The key leads through something that has no such part.
    """
    *path, last = key.split(".")
    place: Any = values
    if path and ("method" in values or path[0] == "method"):
        values["method"] = spelt_out(values.get("method", DEFAULT_METHOD))
    if len(path) > 1 and isinstance(values.get("evaluate"), list):
        values["evaluate"] = [spelt_out(entry) for entry in values["evaluate"]]
    try:
        for part in path:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = value
    except (IndexError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            where,
            got="a path through something that has no such part",
            wanted="a key of the recipe, dots between levels and numbers for list entries",
            next_step="Example: evaluate.0.examples",
        ) from error


def parse_pairs(words: Sequence[str], switches: Collection[str]) -> dict[str, Any]:
    """Reads ``--key value`` pairs from the command line; values are YAML, and dashes may stand for underscores.

    Args:
        words: ``["--train.learning_rate", "1e-3", "--targets", "[q_proj]"]`` or ``--key=value``.
        switches: Keys that may stand alone.

    Raises:
        RecipeError: A word is not a key, or a key has no value.
    """
    pairs: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if word.startswith("--") and key in switches and not equals and (not rest or rest[0].startswith("--")):
            pairs[key] = True
            continue
        if not word.startswith("--") or not key or not (equals or rest):
            raise RecipeError(
                "command line",
                got=word,
                wanted="--key value, after the recipe",
                next_step="Example: keeptune run recipe.yaml --train.learning_rate 1e-3",
            )
        try:
            text = text if equals else rest.pop(0)
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"command line --{key}", got=" ".join(str(error).split()), wanted="a YAML value", next_step="Quote it."
            ) from error
        # To YAML, the template {answer} is a mapping without values.
        template = isinstance(value, dict) and value and all(part is None for part in value.values())
        pairs[key] = text if template else value
    return pairs


def spelt_out(section: Any) -> Any:
    """Returns ``{name: farss}`` for the short form ``farss`` of a method, a penalty or a benchmark; others as is."""
    return {"name": section} if isinstance(section, str) else section
