"""Write a report as one HTML file that needs nothing else."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from keeptune.core.errors import ArtefactError
from keeptune.report import details, plots
from keeptune.report.nodes import votes_figure
from keeptune.report.records import Report, ReportLike, as_report
from keeptune.report.style import MANY, looks
from keeptune.report.summary import methods, series
from keeptune.report.tables import comparison_columns
from keeptune.report.verdict import method_sentences, verdict
from keeptune.report.wording import listing

__all__ = ["render_html", "write_html"]


@dataclass(frozen=True)
class Picture:
    """A figure on the page: inline SVG and what it shows."""

    svg: str
    alt: str
    caption: str


def write_html(report: ReportLike, path: str | os.PathLike[str]) -> None:
    """Write the report as one self-contained HTML file, replacing the file in one step.

    Args:
        report: The report.
        path: The file; its folder must exist.

    Raises:
        ArtefactError: The report is malformed or the file cannot be written.
    """
    text = render_html(report)
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ArtefactError(
            str(target),
            got=error.strerror or type(error).__name__,
            wanted="a file that can be written",
            next_step="Choose a path in a folder that exists and that you may write to.",
        ) from error


def render_html(report: ReportLike) -> str:
    """Make the page.

    Args:
        report: The report.

    Returns:
        The HTML; the same report always gives the same text.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    environment = Environment(
        loader=PackageLoader("keeptune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    labels = [method.label for method in methods(parsed)]
    common, options = details.options(parsed)
    return environment.get_template("report.html.j2").render(
        base=parsed.base,
        base_name=Path(parsed.base).name or parsed.base,
        created=parsed.created,
        version=parsed.version,
        verdict=verdict(parsed),
        sentences=method_sentences(parsed) if 1 < len(labels) <= MANY else [],
        caution=_caution(parsed),
        columns=comparison_columns(parsed),
        colours=[look.colour for look in looks(parsed).values()],
        sections=_sections(parsed),
        options=options,
        common=common,
        divergence=details.divergence(parsed),
        notes=details.notes(parsed),
        runs=details.runs(parsed),
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


def _sections(report: Report) -> list[tuple[str, str, list[Picture]]]:
    """Draw everything the report has data for.

    Args:
        report: The report.

    Returns:
        Heading, an explanation and the pictures of each section that has any.
    """
    draw = _Drawer()
    many = len(methods(report)) > MANY
    kinds = [item.name for item in series(report, "knowledge")]
    relations = [(name, plots.forgetting_by_relation(report, name)) for name in kinds]
    sections = [
        (
            "Learned against kept",
            "Up and to the right is better. Large markers are means, small ones seeds, bars 95% intervals.",
            draw.all([("What each method learned against what it kept", plots.tradeoff(report))]),
        ),
        (
            "Forgetting by benchmark",
            "What was lost on each knowledge benchmark, with 95% intervals. Zero means nothing forgotten.",
            draw.all([("What each method lost on each benchmark", plots.forgetting_by_benchmark(report))]),
        ),
        (
            "Forgetting by relation",
            "The relation most forgotten on average comes first. Rows with few questions (n) are noisy.",
            draw.all([(f"What was lost on each relation of {name}", figure) for name, figure in relations]),
        ),
        (
            "Training loss",
            "Smoothed, averaged over seeds." + ("" if many else " The raw values are faint."),
            draw.all([("Training loss of each method", plots.loss_curves(report))]),
        ),
        (
            "Penalties",
            "What they cost while training, and how far each layer moved; of several seeds the first.",
            draw.all([("Penalty and drift of each method", plots.penalty_figure(report))]),
        ),
        ("Plan: ranks", _uniform_words(report), draw.all(_rank_figures(report), named=True)),
        (
            "Plan: evidence",
            "What the plans were made from, by layer; in spectra dots, or thick parts of strips, are what is kept.",
            draw.all(_spectrum_figures(report), named=True),
        ),
    ]
    return [section for section in sections if section[2] or (section[0] == "Plan: ranks" and section[1] != "")]


class _Drawer:
    """Turns figures into inline SVG whose ids do not clash on one page."""

    def __init__(self) -> None:
        self._drawn = 0

    def all(self, figures: Sequence[tuple[str, Figure | None]], named: bool = False) -> list[Picture]:
        """Draw the figures that exist.

        Args:
            figures: Pairs of a description and a figure or None.
            named: Whether a single figure needs its caption too.

        Returns:
            The pictures; descriptions become captions where there are several.
        """
        found = [(words, figure) for words, figure in figures if figure is not None]
        pictures = []
        for words, figure in found:
            self._drawn += 1
            caption = words if named or len(found) > 1 else ""
            pictures.append(Picture(_inline(plots.svg(figure), f"f{self._drawn}-"), words, caption))
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


def _rank_figures(report: Report) -> list[tuple[str, Figure | None]]:
    """Draw the ranks of methods whose ranks differ, each beside the importances it rests on.

    Args:
        report: The report.

    Returns:
        Descriptions and figures.
    """
    labels = [method.label for method in methods(report)]
    figures = []
    for label in labels:
        if plots.uniform_rank(report, label) is None:
            figures.append((f"Ranks of {label} by layer and role", plots.rank_map(report, label)))
        figures.append((f"Importances behind {label} by layer and role", plots.importance_map(report, label)))
    return figures


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
        voted = votes_figure(report, method.label)
        if voted is not None:
            whole.append((f"How many texts name each node, by layer: {method.label}", voted))
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
