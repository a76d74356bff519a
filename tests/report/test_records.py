"""Reading reports and putting seeds together."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from keeptune.core.errors import ArtefactError
from keeptune.report.estimates import methods, over, series
from keeptune.report.records import as_report


@pytest.mark.parametrize("key", ["name", "seed", "K", "T", "KT", "adapter", "export_gap", "benchmarks"])
def test_missing_key_of_a_run_is_named(minimal: dict[str, Any], key: str) -> None:
    del minimal["methods"][0][key]
    with pytest.raises(ArtefactError, match=rf"methods\.0\.{key}: got nothing"):
        as_report(minimal)


@pytest.mark.parametrize("key", ["name", "role", "n", "before", "after", "interval"])
def test_missing_key_of_a_benchmark_is_named(minimal: dict[str, Any], key: str) -> None:
    del minimal["methods"][0]["benchmarks"][0][key]
    with pytest.raises(ArtefactError, match=rf"benchmarks\.0\.{key}: got nothing"):
        as_report(minimal)


@pytest.mark.parametrize("key", ["base", "methods"])
def test_missing_top_key_is_named(minimal: dict[str, Any], key: str) -> None:
    del minimal[key]
    with pytest.raises(ArtefactError, match=f"report.json, {key}: got nothing"):
        as_report(minimal)


@pytest.mark.parametrize(
    ("key", "value"), [("role", "other"), ("n", 1.5), ("before", "high"), ("interval", [1.0]), ("groups", 3)]
)
def test_wrong_values_are_refused(minimal: dict[str, Any], key: str, value: object) -> None:
    minimal["methods"][0]["benchmarks"][0][key] = value
    with pytest.raises(ArtefactError, match=key):
        as_report(minimal)


def test_null_and_nan_values_become_gaps(minimal: dict[str, Any]) -> None:
    minimal["methods"][0]["K"] = math.nan
    minimal["methods"][0]["benchmarks"][0].update(after=None, interval=None)
    run = as_report(minimal).runs[0]
    assert run.K is None
    assert math.isnan(run.benchmarks[0].after)
    assert math.isnan(run.benchmarks[0].low)


def test_repeated_label_and_seed_stay_apart(minimal: dict[str, Any]) -> None:
    minimal["methods"].append(copy.deepcopy(minimal["methods"][0]))
    assert [method.label for method in methods(as_report(minimal))] == ["lora", "lora (2)"]


def test_label_groups_runs(full: dict[str, Any]) -> None:
    full["methods"][0]["label"] = "lora r8"
    found = methods(as_report(full))
    assert [(item.label, len(item.runs)) for item in found][:2] == [("lora r8", 1), ("lora", 1)]


def test_forgetting_has_the_right_sign_and_unit(full: dict[str, Any]) -> None:
    lora = methods(as_report(full))[0]
    facts, wiki = (over(lora, "lost", [kind]) for kind in series(as_report(full), "knowledge"))
    assert facts is not None and wiki is not None
    assert facts.mean == pytest.approx(26.9)
    assert facts.low < facts.mean < facts.high
    assert wiki.mean == pytest.approx(0.1345)
    assert over(lora, "lost", [series(as_report(full), "task")[0].model_copy(update={"name": "nothing"})]) is None


def test_a_run_that_lacks_a_benchmark_leaves_the_mean(full: dict[str, Any]) -> None:
    report = as_report(full)
    chosen = series(report, "knowledge")
    assert over(methods(report)[0], "lost", chosen) is not None
    del full["methods"][0]["benchmarks"][1], full["methods"][1]["benchmarks"][1]
    assert over(methods(as_report(full))[0], "lost", chosen) is None
