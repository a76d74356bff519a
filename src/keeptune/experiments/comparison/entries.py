"""The entries of ``compare.methods``, and the baselines that need no idea.

    lora                                                                a method's name
    {name: keep, nats: 0.001}                                           a method section
    {label: "lora + replay", method: {name: lora, rank: 8}, replay: 0.1, learning_rate: [1e-3]}
                                                                        a method with other dotted keys of the recipe
    {label: "lora + kl", method: lora, penalties: [kl], strength: {penalties.0.strength: [3, 30]}}

``strength`` is a list of factors on the method's own strength (:mod:`keeptune.methods.strength`), or one dotted key
with its values. In a method section a single number is the method's own option of that name.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from keeptune.core.errors import RecipeError, placed
from keeptune.experiments.comparison.section import CompareSection, refuse_repeats
from keeptune.experiments.grid import spelt
from keeptune.methods.strength import stronger
from keeptune.recipe.construct import make_method
from keeptune.recipe.reading import spelt_out

__all__ = ["Entry", "Variation", "by_factor", "by_value", "read_entries", "slug"]

_OWN = ("label", "learning_rate", "strength")
_FIXED = {
    "output": "each cell has its own folder below the comparison's",
    "compare": "an entry is a part of it",
    "seeds": "compare.seeds lists the seeds of all cells",
    "train.seed": "compare.seeds lists the seeds of all cells",
    "train.learning_rate": "an entry's rates are its `learning_rate` list",
    "evaluate": "cells are compared on the same benchmarks",
    "reference": "cells are compared with each other",
    "model": "cells are compared with one base",
    "revision": "cells are compared with one base",
    "dtype": "cells are compared with one base",
    "task.train": "cells learn the same task",
    "task.kind": "cells learn the same task",
}
_REPLAY = 0.1


@dataclass(frozen=True)
class Variation:
    """One strength of an entry.

    Args:
        settings: Dotted recipe key to value: what it changes.
        factor: On the method's own strength; None where it has none, or where a key is varied by name.
        mark: In the name of its cells; empty for none.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Entry:
    """One method of a comparison, with all that its cells have in common.

    Args:
        label: What it is compared as.
        settings: Dotted recipe key to value, ``method`` among them.
        rates: Learning rates.
        variations: Its strengths, at least one.
    """

    label: str
    settings: Mapping[str, Any]
    rates: tuple[float, ...]
    variations: tuple[Variation, ...] = (Variation(),)


def slug(label: str) -> str:
    """Write a label as the name of a folder.

    Args:
        label: The label.

    Returns:
        Small letters, digits, dots and dashes.

    >>> slug("LoRA + 10% replay")
    'lora-10-replay'
    """
    return re.sub(r"[^\w.]+", "-", label.lower()).strip("-.")


def read_entries(
    section: CompareSection, values: Mapping[str, Any], rates: Sequence[float], where: str
) -> tuple[tuple[Entry, ...], str | None]:
    """Read the entries, add the baselines, and see that each has a label of its own.

    Args:
        section: The section.
        values: The recipe without it.
        rates: For entries without rates of their own.
        where: For error messages.

    Returns:
        The entries, and the label of plain LoRA, which others are set against; None where there is none.

    Raises:
        RecipeError: An entry is wrong, or two have one label.
    """
    entries = []
    for index, given in enumerate(section.methods):
        at = f"{where}, key compare.methods.{index}"
        entries.append(placed(at, partial(_entry, given, section, rates, at)))
    plain = next((e for e in entries if _is_plain(e, values)), None)
    if section.baselines:
        entries, plain = _with_baselines(entries, plain, values, rates)
    seen: dict[str, str] = {}
    for entry in entries:
        first = seen.setdefault(slug(entry.label), entry.label)
        if first is not entry.label:
            raise RecipeError(
                f"{where}, key compare.methods",
                got=f'two entries called "{first}" and "{entry.label}"',
                wanted="a label of its own for each, also as the name of a folder",
                next_step="Give one a `label`, or vary one key in one entry: strength: {method.rank: [4, 8]}.",
            )
    return tuple(entries), None if plain is None else plain.label


def _entry(given: Any, section: CompareSection, rates: Sequence[float], where: str) -> Entry:
    given = {"name": given} if isinstance(given, str) else dict(given)
    label, own_rates = given.pop("label", None), given.pop("learning_rate", None)
    strength = None
    if "method" in given:
        strength = given.pop("strength", None)
        settings = {**given, "method": _spelt_methods(given["method"])}
    elif "name" in given:
        if isinstance(given.get("strength"), list | Mapping):
            strength = given.pop("strength")
        settings = {"method": given}
    else:
        raise RecipeError(
            where,
            got=f"the keys {', '.join(map(str, given)) or '(none)'}",
            wanted="a method's name, a section with `name`, or `method` with other keys of the recipe",
            next_step='Example: {label: "lora + replay", method: {name: lora, rank: 8}, replay: 0.1}.',
        )
    for key in settings:
        fixed = next((k for k in _FIXED if str(key) == k or str(key).startswith(f"{k}.")), None)
        if not isinstance(key, str) or fixed:
            raise RecipeError(
                f"{where}.{key}",
                got=f"a change of {key}",
                wanted=f"no change of {fixed}: {_FIXED[fixed]}" if fixed else "dotted keys of the recipe",
                next_step="Set it once, outside the entries.",
            )
    if isinstance(settings.get("penalties"), list):
        settings["penalties"] = [spelt_out(penalty) for penalty in settings["penalties"]]
    if label is not None and (not isinstance(label, str) or not slug(label) or len(label) > 80):
        raise RecipeError(
            f"{where}.label",
            got=repr(label),
            wanted="a text of at most 80 signs with a letter or digit: labels are names of folders",
            next_step='Example: label: "lora + replay".',
        )
    return Entry(
        label or _default_label(settings),
        settings,
        tuple(rates) if own_rates is None else tuple(_numbers(own_rates, f"{where}.learning_rate")),
        _variations(settings["method"], strength, section.strength, f"{where}.strength"),
    )


def _spelt_methods(method: Any) -> Any:
    return [spelt_out(part) for part in method] if isinstance(method, list) else spelt_out(method)


def _default_label(settings: Mapping[str, Any]) -> str:
    """Name an entry by its methods, their variants, and the other keys that it sets."""
    sections = settings["method"] if isinstance(settings["method"], list) else [settings["method"]]
    names = []
    for part in sections:
        name = str(part.get("name", "method"))
        variant = next((str(part[key]) for key in ("variant", "mode") if isinstance(part.get(key), str)), None)
        names.append(name if variant is None else variant if variant.startswith(name) else f"{name}-{variant}")
    others = [f"{key} {spelt(value)}" for key, value in settings.items() if key != "method"]
    return ", ".join(["+".join(names), *others])[:80]


def _numbers(given: Any, where: str) -> list[float]:
    right = isinstance(given, list) and given
    if not right or not all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in given):
        raise RecipeError(
            where,
            got=repr(given),
            wanted="a list of numbers above 0",
            next_step=f"Example: {where.rpartition('.')[2]}: [1e-3, 2e-3].",
        )
    refuse_repeats(given, where)
    return [float(value) for value in given]


def _variations(method: Any, own: Any, factors: Sequence[float], where: str) -> tuple[Variation, ...]:
    """List the strengths of an entry; a method without strength has one, unless the entry asks for more."""
    if isinstance(own, Mapping):
        return _by_key(own, where)
    made = make_method(method, seed=0)
    if own is None:
        if getattr(made, "strength_option", None) is None:
            return (Variation(),)
        own = list(factors)
    return tuple(by_factor(method, factor) for factor in _numbers(own, where))


def by_factor(method: Any, factor: float) -> Variation:
    """Move a method's own strength.

    Args:
        method: Its section.
        factor: Above 1 keeps more.

    Returns:
        The variation.

    Raises:
        RecipeError: The method has no strength.
    """
    option, value = stronger(make_method(method, seed=0), factor)
    changed = {} if factor == 1 else {f"method.{option}": float(f"{value:.10g}")}
    return Variation(changed, factor, "" if factor == 1 else f"x{short(factor)}")


def by_value(key: str, value: Any) -> Variation:
    """Set a key of the recipe.

    Args:
        key: The dotted key.
        value: Its value.

    Returns:
        The variation.
    """
    return Variation({key: value}, None, f"x{slug(spelt(value))}")


def _by_key(own: Mapping[Any, Any], where: str) -> tuple[Variation, ...]:
    if len(own) != 1 or not isinstance(next(iter(own.values())), list) or not next(iter(own.values())):
        raise RecipeError(
            where,
            got=repr(dict(own)),
            wanted="factors, or one dotted key of the recipe with its values",
            next_step="Example: strength: {penalties.0.strength: [3, 30]}.",
        )
    ((key, values),) = own.items()
    if any(str(key) == k or str(key).startswith(f"{k}.") for k in _FIXED):
        raise RecipeError(
            where, got=f"a change of {key}", wanted="a key that makes methods differ", next_step="Vary another key."
        )
    refuse_repeats(values, where)
    return tuple(by_value(str(key), value) for value in values)


def short(number: float) -> str:
    """Write a number shortly, and so that it is that number.

    Args:
        number: The number.

    Returns:
        Its text.

    >>> short(0.001), short(3.0), short(0.00012345678)
    ('0.001', '3', '0.00012345678')
    """
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def _is_plain(entry: Entry, values: Mapping[str, Any]) -> bool:
    """Say whether an entry is LoRA and nothing else."""
    return _is_lora(entry, {"replay", "penalties"}) and not any(_has(entry, values, k) for k in ("replay", "penalties"))


def _is_lora(entry: Entry, more: set[str]) -> bool:
    method = entry.settings["method"]
    return isinstance(method, Mapping) and method.get("name") == "lora" and set(entry.settings) <= {"method", *more}


def _has(entry: Entry, values: Mapping[str, Any], key: str) -> bool:
    return bool(entry.settings.get(key, values.get(key))) or any(key in v.settings for v in entry.variations)


def _with_baselines(
    entries: list[Entry], plain: Entry | None, values: Mapping[str, Any], rates: Sequence[float]
) -> tuple[list[Entry], Entry]:
    """Add plain LoRA, a rate of a quarter of its lowest, and LoRA with replay, where they are not there."""
    off: dict[str, Any] = {"replay": 0.0} if values.get("replay") else {}
    off |= {"penalties": []} if values.get("penalties") else {}
    if plain is None:
        taken = any(slug(entry.label) == "lora" for entry in entries)
        plain = Entry("plain lora" if taken else "lora", {"method": _usual_lora(entries), **off}, tuple(rates))
        entries = [plain, *entries]
    lower = float(f"{min(plain.rates) / 4:.6g}")
    slower = replace(plain, rates=(lower, *plain.rates))
    entries = [slower if entry is plain else entry for entry in entries]
    task, replayed = values.get("task"), any(_is_lora(e, {"replay"}) and _has(e, values, "replay") for e in entries)
    completes = not isinstance(task, Mapping) or task.get("kind", "completion") == "completion"
    if not replayed and values.get("knowledge") and completes:
        settings = {**copy.deepcopy(dict(plain.settings)), "replay": _REPLAY}
        entries.append(Entry(f"{plain.label} + {_REPLAY:.0%} replay", settings, plain.rates))
    return entries, slower


def _usual_lora(entries: Sequence[Entry]) -> dict[str, Any]:
    """Make LoRA of the rank that most of the others have."""
    ranks = Counter(
        part["rank"]
        for entry in entries
        for part in (
            entry.settings["method"] if isinstance(entry.settings["method"], list) else [entry.settings["method"]]
        )
        if isinstance(part, Mapping) and isinstance(part.get("rank"), int)
    )
    return {"name": "lora"} | ({"rank": ranks.most_common(1)[0][0]} if ranks else {})
