"""keeptune compare, sweep and layers: from the recipe to the records, the page and the best result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.artefact import write_json
from keeptune.core.processes import by_first
from keeptune.experiments.choice import choose_best, limits_of
from keeptune.experiments.comparison_record import RUNS_FILE, row_of, write_records
from keeptune.experiments.effects import benefits
from keeptune.experiments.engine import run_all, variants_of
from keeptune.experiments.plan_runs import Comparison, list_runs
from keeptune.experiments.single_run import Outcome
from keeptune.report.figures import write_figure
from keeptune.report.pages.comparison_page import write_comparison
from keeptune.report.pages.sweep_charts import benefit_charts, sweep_charts, sweep_note


@dataclass(frozen=True)
class Compared:
    """The results of a comparison: its records, the messages of runs that failed by name, and a sweep's figure."""

    runs: dict[str, Any]
    front: dict[str, Any]
    failed: Mapping[str, str]
    figure: Path | None = None

    @property
    def series(self) -> dict[str, Any]:
        """The finished runs as points of a sweep, as its tables and figures read them."""
        return _series(self.runs)


def run_comparison(
    comparison: Comparison, command: str, max_loss: float | Mapping[str, float] | None = None
) -> Compared:
    """Does what is missing of a comparison, writes its records and page, and exports the best result.

    Args:
        comparison: The comparison.
        command: What repeats it.
        max_loss: The most that may be lost of each knowledge benchmark, or of some by name; None chooses nothing.

    Raises:
        KeeptuneError: What the user can correct; where no run keeps to ``max_loss``, all else is written.
    """
    if max_loss is not None:
        limits_of(max_loss, [], [b.name for b in comparison.base.evaluate if b.role == "knowledge"])
    specs = list_runs(comparison)
    outcomes = run_all(comparison, specs)

    def write() -> Compared:
        rows = [
            row_of(spec, outcomes.get(spec.name, Outcome("missing", "not run")), variant)
            for spec in specs
            for variant in (None, *variants_of(comparison, spec.label))
        ]
        folder, figure = comparison.records, None
        base, section = comparison.base, comparison.section
        about = _about(comparison, command)
        runs, front = write_records(
            folder, rows, section, baseline=comparison.plain, reference=base.reference, about=about
        )
        if comparison.kind != "compare":
            if benefit := benefits(_series(runs)):  # of each cell of a grid
                runs |= {"benefit": benefit}
                write_json(folder / RUNS_FILE, runs)
            figure = _draw(runs, folder / f"{comparison.kind}.png")
        try:
            if max_loss is not None:
                front |= {"choice": choose_best(folder, max_loss, estimate=section.estimate)}
        finally:
            write_comparison(runs, front, folder / "report.html")
        failed = {name: outcome.message for name, outcome in outcomes.items() if outcome.status == "failed"}
        return Compared(runs, front, failed, figure)

    return by_first(write)


def _about(comparison: Comparison, command: str) -> dict[str, Any]:
    section, published = comparison.section, comparison.base.published
    own: dict[str, Any] = {"seeds": section.seeds}
    if comparison.kind == "compare":
        own = {"compare": section.model_dump(mode="json")}
    elif comparison.kind == "sweep":
        points = [{"name": e.label, **({} if e.x is None else {"x": e.x}), **e.settings} for e in comparison.entries]
        own |= {"sweep": points}
    return {
        "base": comparison.base.model,
        "command": command,
        "recipe": {**comparison.values, **own},
        **comparison.about,
        **({} if published is None else {"published": published.scores()}),
    }


def _series(runs: Mapping[str, Any]) -> dict[str, Any]:
    return {**runs, "rows": [{**row, "name": row["label"]} for row in runs["runs"] if row["status"] == "done"]}


def _draw(runs: Mapping[str, Any], path: Path) -> Path | None:
    draw = benefit_charts if "benefit" in runs else sweep_charts
    series = _series(runs)
    charts = draw(series) if series["rows"] else []
    if not charts:
        return None
    note, across = (sweep_note(series), 1) if draw is sweep_charts else ("", 2)
    write_figure(charts, path, note, across)
    return path
