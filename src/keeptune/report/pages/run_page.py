"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.core.artefact import write_text
from keeptune.report.estimates import methods
from keeptune.report.grids import Grid
from keeptune.report.numbers import listing
from keeptune.report.pages import layer_charts, run_charts, run_tables
from keeptune.report.pages.charts import MANY, Chart
from keeptune.report.pages.page import render
from keeptune.report.pages.study_charts import trace_charts
from keeptune.report.pages.verdict import method_sentences, verdict
from keeptune.report.records import Report, ReportLike, as_report
from keeptune.report.tables.comparison_table import comparison_columns


def write_html(report: ReportLike, path: str | os.PathLike[str], extras: Mapping[str, Any] | None = None) -> None:
    """Writes the report as one self-contained HTML file, replacing the file in one step.

    Raises:
        ArtefactError: The report is malformed or the file cannot be written.
    """
    write_text(Path(path), render_html(report, extras))


def render_html(report: ReportLike, extras: Mapping[str, Any] | None = None) -> str:
    """Returns the page; the same report always gives the same text.

    Args:
        report: The report.
        extras: What is not in ``report.json``, each if there is any: ``data`` of the first run's ``train.json``,
            ``items`` as from
            :func:`keeptune.report.pages.item_rows.lost_and_gained`, ``repeat`` as from
            :func:`keeptune.report.pages.page.repeat`, and ``traces``, name to what is in ``trace.json``.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed, more = as_report(report), extras or {}
    count = len(methods(parsed))
    common, options = run_tables.options(parsed)
    tradeoff, sections = run_charts.tradeoff(parsed), _sections(parsed, more.get("traces") or {})
    return render(
        "run.html.j2",
        [tradeoff, *(chart for *_, charts in sections for chart in charts)],
        parsed.base,
        more.get("items"),
        created=parsed.created,
        version=parsed.version,
        verdict=verdict(parsed),
        sentences=method_sentences(parsed) if 1 < count <= MANY else [],
        caution=_caution(parsed),
        scores=_scores(parsed),
        benchmarks=run_tables.benchmark_tables(parsed),
        tradeoff=tradeoff,
        sections=sections,
        options=options,
        common=common,
        divergence=run_tables.divergence(parsed),
        notes=run_tables.notes(parsed),
        runs=run_tables.runs(parsed),
        data=more.get("data"),
        repeat=more.get("repeat"),
        several_seeds=len(parsed.runs) > count,
    )


def _scores(report: Report) -> Grid:
    heads, *rows = zip(*comparison_columns(report), strict=True)
    return Grid(heads, tuple(rows))


def _caution(report: Report) -> str:
    """Returns what the intervals cover."""
    single = [method.label for method in methods(report) if len(method.runs) == 1]
    if not any(math.isfinite(item.low) for run in report.runs for item in run.benchmarks):
        return ""
    if not single:
        return "Intervals cover both the sampled questions and the seeds."
    every = len(single) == len(methods(report))
    who = "Every method" if every else listing(single)
    verb = "was" if len(single) == 1 or every else "were each"
    return (
        f"{who} {verb} trained with one seed, so the intervals cover the sampled questions but not "
        "the luck of the seed."
    )


def _sections(report: Report, traces: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, Sequence[Chart]]]:
    """Returns the sections that have something to show: heading, words and charts."""
    losses = run_charts.losses(report)
    raw = "" if len(methods(report)) > MANY else " The raw values are faint."
    traced = [trace_charts(record, f"trace{at}-", name) for at, (name, record) in enumerate(traces.items())]
    sections = [
        (
            "Forgetting by relation",
            "The relation most forgotten on average comes first. Rows with few questions (n) are noisy.",
            run_charts.relations(report),
        ),
        ("Training loss", f"Smoothed, averaged over seeds.{raw}", [] if losses is None else [losses]),
        (
            "Penalties",
            "What they cost while training, and how far each layer moved; of several seeds the first.",
            layer_charts.penalties(report),
        ),
        ("Plan: ranks", "Where ranks differ, and what they rest on.", layer_charts.ranks(report)),
        (
            "Plan: evidence",
            "What the plans were made from, by layer.",
            [*layer_charts.votes(report), *layer_charts.spectra(report)],
        ),
        (
            "Causal tracing",
            "Which layers bring an answer back after noise on the prompt.",
            [chart for groups in traced for charts in groups for chart in charts],
        ),
    ]
    return [section for section in sections if section[2]]
