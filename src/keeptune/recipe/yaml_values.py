"""YAML as plain values: text, numbers, truth values, lists and mappings by name, within limits of depth and size."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_DEPTH = 32
_VALUES = 100_000  # an alias counts as often as it is used: without a limit, 400 bytes can stand for gigabytes
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """YAML where 1e-4 is a number and 2026-01-01 text, as YAML 1.2 has it; a key stands once, and depth has a limit."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _DEPTH:
            raise _Refused(f"more than {_DEPTH} levels", self.peek_event())  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            self._check(node)
        elif not hasattr(node, "size"):
            raise _Refused("an alias of something that it is part of", node)
        return node

    def _check(self, node: Any) -> None:
        if node.tag not in _PLAIN:
            raise _Refused(f"the tag {node.tag}", node)
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [value for _, value in node.value]
        elif isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
            children = []
        node.size = 1 + sum(child.size for child in children)
        node.levels = 1 + max((child.levels for child in children), default=0)
        for found, most, kind in ((node.size, _VALUES, "values"), (node.levels, _DEPTH, "levels")):
            if found > most:
                raise _Refused(f"more than {most} {kind}", node)

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        if "\0" in node.value:
            raise _Refused("a NUL character", node)
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
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, problem: str, at: Any) -> None:
        super().__init__(problem=problem, problem_mark=at.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise _Refused("a key that is no text", key)
        if key.value in seen:
            raise _Refused(f'the key "{key.value[:80]}" twice', key)
        seen.add(key.value)


def parse_yaml(text: str) -> Any:
    """Returns the value of YAML, where 1e-4 is a number; dates are text.

    Raises:
        yaml.YAMLError: It is no YAML, or no plain values: a key twice, an alias of itself, NaN, a tag, or too much.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
