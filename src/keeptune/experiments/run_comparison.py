"""keeptune compare, sweep and layers: from the recipe to the records, the page and the best result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.artefact import write_json
from keeptune.core.locks import owned
from keeptune.core.processes import by_first, held_by_first
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
    """The results of a comparison.

    ``runs.json`` and ``front.json``, the messages of runs that failed by name, the finished runs as points of a sweep
    (``series``), as its tables and figures read them, and the sweep's figure.
    """

    runs: dict[str, Any]
    front: dict[str, Any]
    failed: Mapping[str, str]
    series: dict[str, Any]
    figure: Path | None = None


def run_comparison(
    comparison: Comparison, command: str, max_loss: float | Mapping[str, float] | None = None
) -> Compared:
    """Does what is missing of a comparison, writes its records and page, and exports the best result.

    ``command`` is what repeats it, ``max_loss`` the most that may be lost of each knowledge benchmark, or of some by
    name; None chooses nothing.

    Raises:
        KeeptuneError: What the user can correct; where no run keeps to ``max_loss``, all else is written.
    """
    if max_loss is not None:
        limits_of(max_loss, [], [b.name for b in comparison.base.evaluate if b.role == "knowledge"])
    with held_by_first(owned(comparison.output)):
        return _run(comparison, command, max_loss)


def _run(comparison: Comparison, command: str, max_loss: float | Mapping[str, float] | None) -> Compared:
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
        own: dict[str, Any] = {"seeds": section.seeds}
        if comparison.kind == "compare":
            own = {"compare": section.model_dump(mode="json")}
        elif comparison.kind == "sweep":
            places = [{} if entry.x is None else {"x": entry.x} for entry in comparison.entries]
            named = zip(comparison.entries, places, strict=True)
            own |= {"sweep": [{"name": entry.label, **place, **entry.settings} for entry, place in named]}
        about = {"base": base.model, "command": command, "recipe": {**comparison.values, **own}, **comparison.about}
        about |= {} if base.published is None else {"published": base.published.scores()}
        runs, front = write_records(
            folder, rows, section, baseline=comparison.plain, reference=base.reference, about=about
        )
        series = runs | {"rows": [{**row, "name": row["label"]} for row in runs["runs"] if row["status"] == "done"]}
        if benefit := benefits(series):  # of each cell of a grid
            runs, series = ({**record, "benefit": benefit} for record in (runs, series))
            write_json(folder / RUNS_FILE, runs)
        drawn = bool(series["rows"]) and comparison.kind != "compare"
        if charts := (benefit_charts if benefit else sweep_charts)(series) if drawn else []:
            figure = folder / f"{comparison.kind}.png"
            write_figure(charts, figure, *(("", 2) if benefit else (sweep_note(series), 1)))
        try:
            if max_loss is not None:
                front |= {"choice": choose_best(folder, max_loss, estimate=section.estimate)}
        finally:
            write_comparison(runs, front, folder / "report.html")
        failed = {name: outcome.message for name, outcome in outcomes.items() if outcome.status == "failed"}
        return Compared(runs, front, failed, series, figure)

    return by_first(write)
