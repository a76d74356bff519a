"""The model card of a result: the README.md of the hub, with the table of what was kept and lost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from keeptune.core.intervals import lower_is_better
from keeptune.core.versions import versions
from keeptune.report.numbers import change_text, count, duration, interval_text, markdown, number
from keeptune.report.pages.page import recipe_text
from keeptune.report.pages.verdict import verdict
from keeptune.report.records import as_report
from keeptune.report.tables.comparison_table import comparison_rows

_VERSIONS = "Versions when this card was written: "
_LOAD = {
    "adapter": """from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({base!r}{more})
model = PeftModel.from_pretrained(model, {folder!r})""",
    "model": """from transformers import {auto}

model = {auto}.from_pretrained({folder!r})""",
}


def model_card(entry: Mapping[str, Any], sidecar: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> str:
    """Returns the model card: Markdown with the front matter that the hub reads.

    There is no license in it: keeptune does not know it. ``entry`` is one of the ``methods`` in ``report.json``, the
    sidecar the ``keeptune.json`` of the result; a recipe of None is left out.
    """
    export = sidecar["export"]
    base, name = str(sidecar["base"]), f"{entry['name']} on {Path(str(sidecar['base'])).name}"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(entry, sidecar, name), sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"Tuned from `{base}` by keeptune with the method `{entry['name']}`. " + _verdict(entry),
        "## What was kept and lost",
        _table(entry),
        "## Method",
        _method(entry, sidecar),
        *_notes(entry, export, sidecar.get("labels")),
        "## Load",
        _fenced(_loading(sidecar), "python"),
    ]
    if sidecar.get("labels") is None:
        parts += ["Serve it:", _fenced(str(export["serve"]), "sh")]
    if recipe is not None:
        text = _fenced(recipe_text(recipe).rstrip("\n"), "yaml")
        parts += ["## Recipe", f"Repeat it by `keeptune run recipe.yaml` with:\n\n{text}"]
    written = ", ".join(f"{key} {value}" for key, value in versions().items() if key != "platform")
    return "\n\n".join([*parts, f"{_VERSIONS}{written}."]) + "\n"


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


def _verdict(entry: Mapping[str, Any]) -> str:
    if not entry["benchmarks"]:
        return ""
    return markdown(verdict({"base": "", "methods": [dict(entry) | {"label": "It"}]}))


def _table(entry: Mapping[str, Any]) -> str:
    report = as_report({"base": "", "methods": [entry]})
    if not report.runs[0].benchmarks:
        return "Nothing was measured: the recipe lists no benchmarks."
    lines = [
        "| benchmark | role | items | base | tuned | change | 95% interval |",
        "| --- | --- " + "| ---: " * 5 + "|",
    ]
    for role in ("knowledge", "task"):
        for name, own in comparison_rows(report)[0][role].items():
            nats = lower_is_better(own["metric"])
            scores = (number(own["before"]), number(own["after"]), change_text(own["change"], nats))
            cells = (name, role, str(own["n"]), *scores, interval_text(own["low"], own["high"], nats) or "–")
            lines.append(f"| {' | '.join(map(markdown, cells))} |")
    note = "Both models on the same items; intervals of the change are bootstrapped over items."
    kept = report.runs[0].K
    share = "" if kept is None else f" Knowledge kept (K): {kept:.3f}."
    return "\n".join(lines) + f"\n\n{note}{share}"


def _method(entry: Mapping[str, Any], sidecar: Mapping[str, Any]) -> str:
    seconds = (entry.get("seconds") or {}).get("train")
    rows = [
        f"- {markdown(key)}: `{_code(value)}`" for key, value in entry.get("options", {}).items() if value is not None
    ]
    trained = entry.get("trained_parameters")
    rows += [] if trained is None else [f"- trained parameters: {count(trained)}"]
    rows += [] if seconds is None else [f"- training time: {duration(seconds)}"]
    export = sidecar["export"]
    rank = "" if export["format"] == "merged" else f", rank {export['rank']}"
    rows.append(f"- written as: {export['format']}{rank}")
    return "\n".join(rows)


def _notes(entry: Mapping[str, Any], export: Mapping[str, Any], labels: Sequence[str] | None) -> list[str]:
    gap, relative, other = export["gap"], export["relative_gap"], export.get("original_gap")
    merged_into = export.get("original") if export["format"] == "merged" else None
    against = "on a freshly loaded base" if merged_into is None else "against the adapter on the original"
    notes = [f"Checked {against}: largest difference in logits {gap:.1e}, relative {relative:.1e}."]
    if other is not None:
        apart = f"{other:.1e}, relative {export['original_relative_gap']:.1e}"
        notes.append(f"Trained on the quantised base: its logits and those of {export['original']} differ by {apart}.")
    if export.get("note"):
        notes.append(f"A merged model. {export['note']}.")
    if export.get("error"):
        notes.append(f"Cut to a smaller rank: {export['error']:.2%} of the trained change (Frobenius) is left out.")
    if labels:
        notes.append(f"Labels, in the order of the outputs: {', '.join(labels)}.")
    return [markdown(note) for note in (*notes, *map(str, entry.get("notes") or []))]


def _loading(sidecar: Mapping[str, Any]) -> str:
    labels, export = sidecar.get("labels"), sidecar["export"]
    auto = "AutoModelForCausalLM" if labels is None else "AutoModelForSequenceClassification"
    more = "" if labels is None else f", num_labels={max(1, len(labels))}"
    if sidecar.get("quantization"):
        more += f", quantization_config={dict(sidecar['quantization'])!r}"
    kind = "model" if export["format"] == "merged" else "adapter"
    return _LOAD[kind].format(auto=auto, base=str(sidecar["base"]), more=more, folder=str(export["folder"]))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _code(value: object) -> str:
    return " ".join(str(value).split()).replace("`", "'")
