"""The page of a report: one HTML file that needs nothing else."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeptune.core.artefact import write_text
from keeptune.report.estimates import methods
from keeptune.report.grids import Grid
from keeptune.report.pages import layer_charts, run_charts, run_tables
from keeptune.report.pages.charts import MANY
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
    known = methods(parsed)
    common, options = run_tables.options(parsed)
    tradeoff, losses = run_charts.tradeoff(parsed), run_charts.losses(parsed)
    traces = [
        trace_charts(own, f"trace{at}-", name) for at, (name, own) in enumerate((more.get("traces") or {}).items())
    ]
    sections = {
        "relations": run_charts.relations(parsed),
        "losses": [] if losses is None else [losses],
        "penalties": layer_charts.penalties(parsed),
        "ranks": layer_charts.ranks(parsed),
        "evidence": [*layer_charts.votes(parsed), *layer_charts.spectra(parsed)],
        "traces": [chart for groups in traces for charts in groups for chart in charts],
    }
    return render(
        "run.html.j2",
        [tradeoff, *(chart for charts in sections.values() for chart in charts)],
        parsed.base,
        more.get("items"),
        created=parsed.created,
        version=parsed.version,
        verdict=verdict(parsed),
        sentences=method_sentences(parsed) if 1 < len(known) <= MANY else [],
        single=[method.label for method in known if len(method.runs) == 1],
        intervals=any(math.isfinite(item.low) for run in parsed.runs for item in run.benchmarks),
        scores=_scores(parsed),
        benchmarks=run_tables.benchmark_tables(parsed),
        tradeoff=tradeoff,
        sections=sections,
        options=options,
        common=common,
        divergence=run_tables.divergence(parsed),
        methods=known,
        runs=parsed.runs,
        many=len(known) > MANY,
        data=more.get("data"),
        repeat=more.get("repeat"),
        several_seeds=len(parsed.runs) > len(known),
    )


def _scores(report: Report) -> Grid:
    heads, *rows = zip(*comparison_columns(report), strict=True)
    return Grid(heads, tuple(rows))
