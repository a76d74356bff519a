"""Write a report as one HTML file that needs nothing else."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from keeptune.report import details, layer_charts, plots, run_charts
from keeptune.report.bars import benchmark_tables
from keeptune.report.charts import Chart
from keeptune.report.page import render, write_page
from keeptune.report.records import Report, ReportLike, as_report
from keeptune.report.style import MANY
from keeptune.report.summary import methods
from keeptune.report.tables import comparison_columns
from keeptune.report.verdict import method_sentences, verdict
from keeptune.report.wording import listing

__all__ = ["Picture", "render_html", "write_html"]


@dataclass(frozen=True)
class Picture:
    """A figure on the page: inline SVG and what it shows."""

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page: figures to explore, and still ones."""

    heading: str
    words: str
    charts: tuple[Chart, ...] = ()
    pictures: tuple[Picture, ...] = ()


def write_html(report: ReportLike, path: str | os.PathLike[str], extras: Mapping[str, Any] | None = None) -> None:
    """Write the report as one self-contained HTML file, replacing the file in one step.

    Args:
        report: The report.
        path: The file; its folder must exist.
        extras: See :func:`render_html`.

    Raises:
        ArtefactError: The report is malformed or the file cannot be written.
    """
    write_page(render_html(report, extras), path)


def render_html(report: ReportLike, extras: Mapping[str, Any] | None = None) -> str:
    """Make the page.

    Args:
        report: The report.
        extras: What is not in ``report.json``, each if there is any: ``items`` as from
            :func:`keeptune.report.items.lost_and_gained`, ``repeat`` as from :func:`keeptune.report.repeat.repeat`, and
            ``traces``, name to what is in ``trace.json``.

    Returns:
        The HTML; the same report always gives the same text.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed, more = as_report(report), extras or {}
    labels = [method.label for method in methods(parsed)]
    common, options = details.options(parsed)
    tradeoff, sections = run_charts.tradeoff(parsed), _sections(parsed, more.get("traces") or {})
    charts = [chart for section in sections for chart in section.charts]
    found = more.get("items")
    return render(
        "run.html.j2",
        charts if tradeoff is None else [tradeoff, *charts],
        {} if found is None else {"items": found["rows"]},
        base=parsed.base,
        base_name=Path(parsed.base).name or parsed.base,
        created=parsed.created,
        version=parsed.version,
        verdict=verdict(parsed),
        sentences=method_sentences(parsed) if 1 < len(labels) <= MANY else [],
        caution=_caution(parsed),
        columns=comparison_columns(parsed),
        benchmarks=benchmark_tables(parsed),
        tradeoff=tradeoff,
        found=found,
        sections=sections,
        options=options,
        common=common,
        divergence=details.divergence(parsed),
        notes=details.notes(parsed),
        runs=details.runs(parsed),
        repeat=more.get("repeat"),
        several_seeds=len(parsed.runs) > len(labels),
    )


def _caution(report: Report) -> str:
    """Say what the intervals leave out.

    Args:
        report: The report.

    Returns:
        A sentence or two.
    """
    single = [method.label for method in methods(report) if len(method.runs) == 1]
    known = any(math.isfinite(item.low) for run in report.runs for item in run.benchmarks)
    if not report.runs or not known:
        return ""
    if not single:
        return "Intervals cover both the sampled questions and the seeds."
    who = "Every method" if len(single) == len(methods(report)) else listing(single)
    verb = "was" if len(single) == 1 or who == "Every method" else "were each"
    return (
        f"{who} {verb} trained with one seed, so the intervals cover the sampled questions but not "
        "the luck of the seed."
    )


def _sections(report: Report, traces: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Draw everything the report has data for.

    Args:
        report: The report.
        traces: Name to what causal tracing found.

    Returns:
        The sections that have something to show.
    """
    draw = _Drawer()
    losses = run_charts.losses(report)
    uniform = _uniform_words(report)
    sections = [
        Section(
            "Forgetting by relation",
            "The relation most forgotten on average comes first. Rows with few questions (n) are noisy.",
            tuple(run_charts.relations(report)),
        ),
        Section(
            "Training loss",
            "Smoothed, averaged over seeds." + ("" if len(methods(report)) > MANY else " The raw values are faint."),
            () if losses is None else (losses,),
        ),
        Section(
            "Penalties",
            "What they cost while training, and how far each layer moved; of several seeds the first.",
            tuple(layer_charts.penalties(report)),
        ),
        Section("Plan: ranks", uniform, tuple(layer_charts.ranks(report))),
        Section(
            "Plan: evidence",
            "What the plans were made from, by layer; in spectra dots, or thick parts of strips, are what is kept.",
            tuple(layer_charts.votes(report)),
            tuple(draw.all(_spectrum_figures(report))),
        ),
        Section(
            "Causal tracing",
            "Which layers bring an answer back after noise on the prompt.",
            tuple(layer_charts.traces(traces)),
        ),
    ]
    return [part for part in sections if part.charts or part.pictures or (part.heading == "Plan: ranks" and uniform)]


class _Drawer:
    """Turns figures into inline SVG whose ids do not clash on one page."""

    def __init__(self) -> None:
        self._drawn = 0

    def all(self, figures: Sequence[tuple[str, Figure | None]]) -> list[Picture]:
        """Draw the figures that exist.

        Args:
            figures: Pairs of a description and a figure or None.

        Returns:
            The pictures.
        """
        pictures = []
        for words, figure in figures:
            if figure is not None:
                self._drawn += 1
                pictures.append(Picture(_inline(plots.svg(figure), f"f{self._drawn}-"), words, words))
        return pictures


def _inline(text: str, prefix: str) -> str:
    """Make an SVG document fit to stand inside a page.

    Args:
        text: The document.
        prefix: What to put before every id.

    Returns:
        The bare element, without prolog, metadata and clashing ids.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}", body)
    width = re.match(r'<svg[^>]*\bwidth="([\d.]+)pt"', body)
    if width and float(width[1]) > 430:
        body = body.replace("<svg", '<svg class="wide"', 1)
    return body


def _uniform_words(report: Report) -> str:
    """Say which methods use one rank everywhere.

    Args:
        report: The report.

    Returns:
        A sentence, empty when there is no such method.
    """
    by_rank: dict[int, list[str]] = {}
    for method in methods(report):
        rank = plots.uniform_rank(report, method.label)
        if rank is not None:
            by_rank.setdefault(rank, []).append(method.label)
    parts = [
        f"{listing(labels)} {'uses' if len(labels) == 1 else 'use'} rank {rank} everywhere"
        for rank, labels in by_rank.items()
    ]
    return f"{'; '.join(parts)}." if parts else ""


def _spectrum_figures(report: Report) -> list[tuple[str, Figure | None]]:
    """Draw every kind of evidence once, also when several methods share it; kept values in the whole spectrum.

    Args:
        report: The report.

    Returns:
        Descriptions and figures.
    """
    users: dict[tuple[str, tuple[tuple[float, ...], ...]], list[str]] = {}
    whole = []
    for method in methods(report):
        plan = next((run.plan for run in method.runs if run.plan), ())
        kept = plots.kept_spectra(report, method.label)
        if kept is not None:
            whole.append((f"Spectra, and what is kept of them: {method.label}", kept))
        for name in plots.evidence_names(report, method.label):
            if name == "votes" or (kept is not None and name in ("spectrum", "singular_values")):
                continue
            users.setdefault((name, tuple(row.evidence.get(name, ()) for row in plan)), []).append(method.label)
    return whole + [
        (f"{name.replace('_', ' ').capitalize()}: {listing(labels)}", plots.spectra(report, labels[0], name))
        for (name, _), labels in users.items()
    ]
