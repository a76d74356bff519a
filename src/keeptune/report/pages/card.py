"""The model card of a result: the README.md of the hub, with the table of what was kept and lost."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from keeptune.core.intervals import lower_is_better
from keeptune.core.versions import versions
from keeptune.report.numbers import change_text, count, duration, interval_text, markdown
from keeptune.report.pages.page import environment, recipe_text
from keeptune.report.pages.verdict import verdict
from keeptune.report.tables.comparison_table import comparison_rows

_VERSIONS = "Versions when this card was written: "


def model_card(entry: Mapping[str, Any], sidecar: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> str:
    """Returns the model card: Markdown with the front matter that the hub reads.

    There is no license in it: keeptune does not know it. ``entry`` is one of the ``methods`` in ``report.json``, the
    sidecar the ``keeptune.json`` of the result; a recipe of None is left out.
    """
    export, labels = sidecar["export"], sidecar.get("labels")
    name = f"{entry['name']} on {Path(str(sidecar['base'])).name}"
    given: dict[str, Any] = {} if labels is None else {"num_labels": max(1, len(labels))}
    given |= {"quantization_config": dict(sidecar["quantization"])} if sidecar.get("quantization") else {}
    shown = environment(autoescape=False)
    shown.filters |= {"markdown": markdown, "code": _code, "fenced": _fenced, "repr": repr}
    shown.filters |= {"lower": lower_is_better, "change": change_text, "interval": interval_text}
    text = shown.get_template("card.md.j2").render(
        matter=yaml.safe_dump(_front_matter(entry, sidecar, name), sort_keys=False, allow_unicode=True),
        name=name,
        base=str(sidecar["base"]),
        method=entry["name"],
        said=markdown(verdict({"base": "", "methods": [dict(entry) | {"label": "It"}]})) if entry["benchmarks"] else "",
        found=comparison_rows({"base": "", "methods": [entry]})[0],
        kept=entry["K"],
        options={key: value for key, value in entry.get("options", {}).items() if value is not None},
        trained=None if entry.get("trained_parameters") is None else count(entry["trained_parameters"]),
        seconds=duration(entry["seconds"]["train"]) if "train" in (entry.get("seconds") or {}) else None,
        export=export,
        merged=export["format"] == "merged",
        notes=entry.get("notes") or [],
        labels=labels,
        auto="AutoModelForCausalLM" if labels is None else "AutoModelForSequenceClassification",
        more="".join(f", {key}={value!r}" for key, value in given.items()),
        recipe=None if recipe is None else recipe_text(recipe).rstrip("\n"),
    )
    written = ", ".join(f"{key} {value}" for key, value in versions().items() if key != "platform")
    return f"{text}{_VERSIONS}{written}.\n"


def same_but_versions(one: str, other: str) -> bool:
    """Returns whether two cards differ in nothing but the versions, which are those of when a card was written."""
    return one.rpartition(_VERSIONS)[0] == other.rpartition(_VERSIONS)[0] != ""


def _front_matter(entry: Mapping[str, Any], sidecar: Mapping[str, Any], name: str) -> dict[str, Any]:
    merged, labels = sidecar["export"]["format"] == "merged", sidecar.get("labels")
    task = "text-generation" if labels is None else "text-classification"
    matter: dict[str, Any] = {
        "base_model": str(sidecar["base"]),
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(["keeptune", str(sidecar["method"]), *([] if merged else ["lora"])])),
    }
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": item["name"], "type": item["name"]},
            "metrics": [{"type": item["metric"], "name": f"{item['metric']}, {item['role']}", "value": item["after"]}],
        }
        for item in entry["benchmarks"]
        if item["after"] is not None and math.isfinite(item["after"])
    ]
    return matter | ({"model-index": [{"name": name, "results": results}]} if results else {})


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _code(value: object) -> str:
    return " ".join(str(value).split()).replace("`", "'")
