"""The entries of ``compare.methods``, and the baselines that are added to them.

    lora                                                                a method's name
    {name: keep, nats: 0.001}                                           a method section
    {label: "lora + replay", method: {name: lora, rank: 8}, replay: 0.1, learning_rate: [1e-3]}
                                                                        a method with other dotted keys of the recipe
    {label: "lora + kl", method: lora, penalties: [kl], strength: {penalties.0.strength: [3, 30]}}

``strength`` is a list of factors on the method's own strength (:mod:`keeptune.methods.base`), or one dotted key
with its values. In a method section a single number is the method's own option of that name.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from keeptune.core.errors import RecipeError, placed
from keeptune.experiments.compare_section import CompareSection, Different, Numbers
from keeptune.methods.base import stronger
from keeptune.recipe.reading import set_value, spelt_out
from keeptune.recipe.schema import make_method

FIXED = {
    "output": "each run has its own folder below the comparison's",
    "compare": "an entry is a part of it",
    **dict.fromkeys(("seeds", "train.seed"), "`seeds` lists the seeds of all runs"),
    "evaluate": "runs are compared on the same benchmarks",
    "reference": "T has one reference for all runs",
    **dict.fromkeys(("model", "revision", "dtype", "quantization"), "runs are compared on one base"),
}
_FIXED_IN_METHODS = {
    **FIXED,
    "train.learning_rate": "an entry's rates are its `learning_rate` list",
    **dict.fromkeys(("task.train", "task.kind"), "runs learn the same task"),
}
_REPLAY = 0.1
_NUMBERS = TypeAdapter(Numbers)
_BY_KEY = TypeAdapter(
    Annotated[dict[str, Annotated[list[Any], Field(min_length=1), Different]], Field(min_length=1, max_length=1)]
)


@dataclass(frozen=True)
class Variation:
    """One strength of an entry: the settings it changes, and its mark in the names of runs.

    ``factor`` is on the method's own strength; None where it has none, or where a key is varied by name.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Entry:
    """What is compared: one method, or one point of a sweep with its place ``x`` on the axis of a figure.

    ``settings`` are dotted recipe keys with values, ``rates`` learning rates (None is the recipe's own).
    """

    label: str
    settings: Mapping[str, Any]
    rates: tuple[float | None, ...] = (None,)
    variations: tuple[Variation, ...] = (Variation(),)
    x: float | None = None


def slug(label: str) -> str:
    """Returns a label as the name of a folder: small letters, digits, dots and dashes.

    >>> slug("LoRA + 10% replay")
    'lora-10-replay'
    """
    return re.sub(r"[^\w.]+", "-", label.lower()).strip("-.")


def short(number: float) -> str:
    """Returns the shortest text that reads back as the same number.

    >>> short(0.001), short(3.0), short(0.00012345678)
    ('0.001', '3', '0.00012345678')
    """
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def as_text(value: Any) -> str:
    """Returns a recipe's value as a part of a label.

    >>> as_text(0.001), as_text([0, 1]), as_text({"name": "lora", "rank": 8}), as_text(None)
    ('0.001', '0,1', 'name lora rank 8', 'none')
    """
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {as_text(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(as_text, value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^\w .,=+-]", "_", text)


def read_entries(
    section: CompareSection, values: Mapping[str, Any], rates: Sequence[float], where: str
) -> tuple[tuple[Entry, ...], str | None]:
    """Reads the entries of a section and adds the baselines.

    ``values`` are the recipe without the section, ``rates`` for entries without rates of their own.

    Returns:
        The entries, and the label of plain LoRA, which others are compared with; None where there is none.

    Raises:
        RecipeError: An entry is wrong, or two have one label.
    """
    entries = []
    for index, given in enumerate(section.methods):
        at = f"{where}, key compare.methods.{index}"
        entries.append(placed(at, partial(_entry, given, section, rates, at)))
    more = {"replay", "penalties"}
    alone = (e for e in entries if _is_lora(e, more) and not any(_has(e, values, key) for key in more))
    plain = next(alone, None)
    if section.baselines:
        entries, plain = _with_baselines(entries, plain, values, rates)
    check_labels(
        entries,
        f"{where}, key compare.methods",
        "Give one a `label`, or vary one key in one entry: strength: {method.rank: [4, 8]}.",
    )
    return tuple(entries), None if plain is None else plain.label


def check_labels(entries: Sequence[Entry], where: str, next_step: str) -> None:
    """Raises RecipeError where two entries have one label, also as the name of a folder."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        first = seen.setdefault(slug(entry.label), entry)
        if first is not entry:
            raise RecipeError(
                where,
                got=f'two entries called "{first.label}" and "{entry.label}"',
                wanted="a label of its own for each, also as the name of a folder",
                next_step=next_step,
            )


def check_label(label: Any, where: str, example: str) -> str:
    """Returns a label that can name a folder; raises RecipeError for any other."""
    if not isinstance(label, str) or not slug(label) or len(label) > 80:
        raise RecipeError(
            where,
            got="no name" if label is None else repr(label),
            wanted="a text of at most 80 signs with a letter or digit: it names folders",
            next_step=f"Example: {example}.",
        )
    return label


def check_settings(settings: Mapping[Any, Any], where: str, reasons: Mapping[str, str] = FIXED) -> None:
    """Raises RecipeError where a setting changes a key that must not, with the reason, or is none of the recipe."""
    for key in settings:
        fixed = next((k for k in reasons if str(key) == k or str(key).startswith(f"{k}.")), None)
        if not isinstance(key, str) or fixed:
            raise RecipeError(
                f"{where}.{key}",
                got=f"a change of {key}",
                wanted=f"no change of {fixed}: {reasons[fixed]}" if fixed else "dotted keys of the recipe",
                next_step="Set it once, for all.",
            )


def with_settings(values: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a recipe's values with settings, sections before their parts; RecipeError where a key does not fit."""
    own = copy.deepcopy(dict(values))
    for key, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
        set_value(own, key, copy.deepcopy(value), where=f"{where}, key {key}")
    return own


def _entry(given: Any, section: CompareSection, rates: Sequence[float], where: str) -> Entry:
    given = {"name": given} if isinstance(given, str) else dict(given)
    label, own_rates = given.pop("label", None), given.pop("learning_rate", None)
    strength = None
    if "method" in given:
        strength, method = given.pop("strength", None), given["method"]
        settings = {**given, "method": spelt_out(method)}
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
    check_settings(settings, where, _FIXED_IN_METHODS)
    if isinstance(settings.get("penalties"), list):
        settings["penalties"] = [spelt_out(penalty) for penalty in settings["penalties"]]
    if label is not None:
        check_label(label, f"{where}.label", 'label: "lora + replay"')
    return Entry(
        label or _default_label(settings),
        settings,
        tuple(rates if own_rates is None else _read_numbers(own_rates, f"{where}.learning_rate")),
        _variations(settings["method"], strength, section.strength, f"{where}.strength"),
    )


def _default_label(settings: Mapping[str, Any]) -> str:
    method = settings["method"]
    name = str(method.get("name", "method"))
    variant = next((str(method[key]) for key in ("variant", "mode") if isinstance(method.get(key), str)), None)
    name = name if variant is None else variant if variant.startswith(name) else f"{name}-{variant}"
    others = [f"{key} {as_text(value)}" for key, value in settings.items() if key != "method"]
    return ", ".join([name, *others])[:80]


def _variations(method: Any, own: Any, factors: Sequence[float], where: str) -> tuple[Variation, ...]:
    if isinstance(own, Mapping):
        ((key, values),) = _read(
            _BY_KEY,
            own,
            where,
            "factors, or one dotted key of the recipe with different values",
            "strength: {penalties.0.strength: [3, 30]}",
        ).items()
        check_settings(own, where, _FIXED_IN_METHODS)
        return tuple(Variation({key: value}, None, f"x{slug(as_text(value))}") for value in values)
    made = make_method(method, seed=0)
    if own is None and getattr(made, "strength_option", None) is None:
        return (Variation(),)
    variations = []
    for factor in factors if own is None else _read_numbers(own, where):
        option, value = stronger(made, factor)
        changed = {} if factor == 1 else {f"method.{option}": float(f"{value:.10g}")}
        variations.append(Variation(changed, factor, "" if factor == 1 else f"x{short(factor)}"))
    return tuple(variations)


def _read_numbers(given: Any, where: str) -> list[float]:
    example = f"{where.rpartition('.')[2]}: [1e-3, 2e-3]"
    numbers: list[float] = _read(_NUMBERS, given, where, "a list of different numbers above 0", example)
    return numbers


def _read(kind: TypeAdapter[Any], given: Any, where: str, wanted: str, example: str) -> Any:
    try:
        return kind.validate_python(given)
    except ValidationError as error:
        raise RecipeError(where, got=repr(given), wanted=wanted, next_step=f"Example: {example}.") from error


def _is_lora(entry: Entry, more: set[str]) -> bool:
    return entry.settings["method"].get("name") == "lora" and set(entry.settings) <= {"method", *more}


def _has(entry: Entry, values: Mapping[str, Any], key: str) -> bool:
    return bool(entry.settings.get(key, values.get(key))) or any(key in v.settings for v in entry.variations)


def _with_baselines(
    entries: list[Entry], plain: Entry | None, values: Mapping[str, Any], rates: Sequence[float]
) -> tuple[list[Entry], Entry]:
    """Adds plain LoRA, a rate of a quarter of its lowest, and LoRA with replay, where they are missing."""
    off: dict[str, Any] = {"replay": 0.0} if values.get("replay") else {}
    off |= {"penalties": []} if values.get("penalties") else {}
    if plain is None:
        taken = any(slug(entry.label) == "lora" for entry in entries)
        ranks = Counter(e.settings["method"].get("rank") for e in entries)
        usual = [rank for rank, _ in ranks.most_common() if isinstance(rank, int)][:1]
        method = {"name": "lora"} | ({"rank": usual[0]} if usual else {})
        plain = Entry("plain lora" if taken else "lora", {"method": method, **off}, tuple(rates))
        entries = [plain, *entries]
    lower = float(f"{min(rate for rate in plain.rates if rate is not None) / 4:.6g}")
    slower = replace(plain, rates=(lower, *plain.rates))
    entries = [slower if entry is plain else entry for entry in entries]
    task, replayed = values.get("task"), any(_is_lora(e, {"replay"}) and _has(e, values, "replay") for e in entries)
    completes = not isinstance(task, Mapping) or task.get("kind", "completion") == "completion"
    if not replayed and values.get("knowledge") and completes:
        settings = {**copy.deepcopy(dict(plain.settings)), "replay": _REPLAY}
        entries.append(Entry(f"{plain.label} + {_REPLAY:.0%} replay", settings, plain.rates))
    return entries, slower
