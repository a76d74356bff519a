"""Made-up reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright
from tests.report.browsing import FLAGS

from keeptune.report.pages import page as page_module
from keeptune.report.pages.run_page import render_html

PLOTLY = page_module.plotly_source


def benchmark(
    name: str, role: str, metric: str, before: float, after: float, half: float, **more: Any
) -> dict[str, Any]:
    """Make one benchmark."""
    interval = [after - before - half, after - before + half]
    base = {"name": name, "role": role, "metric": metric, "n": 320, "before": before, "after": after}
    return {**base, "interval": interval, **more}


def run(name: str, seed: int, kept: float, task: float | None, **more: Any) -> dict[str, Any]:
    """Make one run with an accuracy, a cross entropy and perhaps a task."""
    groups = {f"relation {index}": {"n": 10 + index, "before": 1.0, "after": kept - 0.01 * index} for index in range(4)}
    rows = [
        benchmark("facts", "knowledge", "exact_match", 1.0, kept, 0.03, groups=groups),
        benchmark("wiki", "knowledge", "cross_entropy", 2.4, 2.4 + (1 - kept) / 2, 0.02, kl_to_base=0.3),
    ]
    if task is not None:
        rows.append(benchmark("tools", "task", "exact_match", 0.05, task, 0.04))
    entry = {"name": name, "seed": seed, "K": kept, "T": task, "KT": None, "adapter": f"runs/{name}"}
    return {**entry, "export_gap": 1e-6, "benchmarks": rows, **more}


def _plan(varied: bool) -> list[dict[str, Any]]:
    """Make a plan of two layers and two roles."""
    spectrum = [math.exp(-index / 3) for index in range(12)]
    return [
        {
            "target": f"model.layers.{layer}.self_attn.{role}",
            "layer": layer,
            "role": role,
            "rank": 8 + layer * varied,
            "evidence": {"spectrum": [*spectrum, 0.0]},
        }
        for layer in range(2)
        for role in ("q_proj", "v_proj")
    ]


@pytest.fixture(scope="module")
def page() -> str:
    """Render the full report once."""
    return render_html(full_report())


@pytest.fixture
def full() -> dict[str, Any]:
    """Offer the full report."""
    return full_report()


def full_report() -> dict[str, Any]:
    """Make a report of three methods with two seeds and everything optional."""
    methods = []
    for name, kept, task in (("lora", 0.73, 0.83), ("lora-null-v1", 0.95, 0.82), ("milora", 0.8, 0.84)):
        for seed in range(2):
            more: dict[str, Any] = {
                "options": {"rank": 8, "learning_rate": 2e-4},
                "trained_parameters": 1234567,
                "seconds": {"plan": 1.5, "train": 125.0},
                "loss": [{"step": step, "loss": 2 / (1 + step)} for step in range(20)],
                "plan": _plan(varied=name == "milora") if name != "lora" else [],
            }
            methods.append(run(name, seed, kept + 0.002 * seed, task + 0.002 * seed, **more))
    return {"base": "/models/tiny", "methods": methods, "version": "0.1.0", "created": "2026-01-01"}


@pytest.fixture
def minimal() -> dict[str, Any]:
    """Make a report with one method, one knowledge benchmark and no optional key."""
    rows = [{"name": "facts", "role": "knowledge", "n": 9, "before": 0.9, "after": 0.6, "interval": [-0.4, -0.2]}]
    entry = {"name": "lora", "seed": 0, "K": 0.7, "T": None, "KT": None, "adapter": "a", "export_gap": 0.0}
    return {"base": "tiny", "methods": [{**entry, "benchmarks": rows}]}


@pytest.fixture
def make() -> Callable[..., dict[str, Any]]:
    """Offer a maker of reports from methods, shares kept and task scores."""
    return lambda *triples: {
        "base": "tiny",
        "methods": [run(name, 0, kept, task) for name, kept, task in triples],
    }


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start Chromium; without it the tests that need it fail."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def with_plotly() -> Iterator[None]:
    """Put plotly.js back into the pages that a module writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "plotly_source", PLOTLY)
        yield
