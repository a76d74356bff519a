"""How much each method trains of a target, before its plan is made."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from keeptune.core.target import Target
from keeptune.methods.base import allot_rank

__all__ = ["Size", "size_of"]

# These take a part of W out at the start, which a 16-bit base keeps in a frozen twin (keeptune.adapter.anchor).
_ANCHORED = frozenset({"corda", "farss", "kasa", "lora-ga", "lora-null", "milora", "olora", "pissa"})


@dataclass(frozen=True)
class Size:
    """What a method makes of one target.

    Args:
        rank: The rank, or the rows that are trained.
        trained: Numbers that are trained.
        frozen: Numbers of frozen factors beside them.
        anchored: There is a twin of the same size on a 16-bit base.
        assumed: The rank rests on data; this is what is planned on average.
    """

    rank: int
    trained: int
    frozen: int = 0
    anchored: bool = False
    assumed: bool = False


def size_of(method: Any, target: Target, downs: Collection[str]) -> Size:
    """Count what a method trains of a target: ``r (m + n)`` for both factors of rank r, unless it has rules of its own.

    Args:
        method: A method that trains an adapter, or OSF.
        target: The target.
        downs: Names of the MLPs' down-projections.

    Returns:
        Its size; 0 of a target that is left alone.

    Raises:
        PlanError: The target cannot have the rank.
    """
    own = _RULES.get(method.name)
    if own is not None:
        return own(method, target, downs)
    r = allot_rank(target, method.rank, method.name).rank
    both = r * (target.out_features + target.in_features)
    more = {"dora": target.out_features, "kasa": r}.get(method.name, 0)
    return Size(r, both + more, anchored=method.name in _ANCHORED)


def _loki(method: Any, target: Target, downs: Collection[str]) -> Size:
    if target.name not in downs:
        return Size(0, 0)
    rows = int(method.q * target.out_features / 100)
    rest = target.out_features - rows
    bias, held = (rows, rest) if target.bias else (0, 0)
    if method.rank is None:
        return Size(rows, rows * target.in_features + bias, frozen=rows * target.out_features + held)
    r = min(method.rank, rows)
    return Size(r, r * (rows + target.in_features) + bias, frozen=rest * r + held)


def _one_factor(method: Any, target: Target, downs: Collection[str]) -> Size:
    r = allot_rank(target, method.rank, method.name).rank
    down, up = r * target.in_features, r * target.out_features
    anchored = method.name in _ANCHORED
    return Size(r, down, up, anchored) if method.name == "mica" else Size(r, up, down, anchored)


def _lora_null(method: Any, target: Target, downs: Collection[str]) -> Size:
    if method.variant == "v2":
        return _one_factor(method, target, downs)
    r = allot_rank(target, method.rank, method.name).rank
    return Size(r, r * (target.out_features + target.in_features), anchored=True)


def _farss(method: Any, target: Target, downs: Collection[str]) -> Size:
    shallow = method.variant == "farss" and (method.boundary == "auto" or 0 <= target.layer < method.boundary)
    if not shallow:
        r = allot_rank(target, method.rank, method.name).rank
    else:
        r = min(max(method.r_avg, method.r_min), method.r_max, target.max_rank)
    return Size(r, r * (target.out_features + target.in_features), anchored=True, assumed=shallow)


def _eva(method: Any, target: Target, downs: Collection[str]) -> Size:
    r = min(method.rank, target.max_rank)
    return Size(r, r * (target.out_features + target.in_features), assumed=True)


def _osf(method: Any, target: Target, downs: Collection[str]) -> Size:
    r = method.allocate({target: None})[target].rank
    both = target.out_features + target.in_features
    return Size(r, r * (both + 1), frozen=(target.max_rank - r) * (both + 1))


_RULES: dict[str, Callable[[Any, Target, Collection[str]], Size]] = {
    "eva": _eva,
    "farss": _farss,
    "loki": _loki,
    "lora-fa": _one_factor,
    "lora-null": _lora_null,
    "mica": _one_factor,
    "osf": _osf,
}
