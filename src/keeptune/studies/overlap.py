"""keeptune overlap: how many rows two selections share (LoKI's 97.57% of 50 questions a subject to all)."""

from __future__ import annotations

from typing import Any

from keeptune.core.artefact import content_key
from keeptune.core.errors import ModelError, RecipeError
from keeptune.linalg.selections import Overlap, overlap_of, overlaps
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import Recipe
from keeptune.report.pages.study_charts import overlap_charts
from keeptune.studies.figure_files import write_figure_files
from keeptune.studies.node_selections import Side, attributions_of, chosen_rows, loki_of, side_of


def overlap(
    recipe: Recipe, other: Recipe | None = None, *, first: str = "", second: str = "", q: float | None = None
) -> dict[str, Any]:
    """Compares two selections of rows; what the store has is not computed again.

    Args:
        recipe: A recipe with knowledge; its LoKI (else the default one) has what the sides do not name.
        other: A recipe of the same base with other knowledge, for the second side; None takes the first's.
        first: Where the first side differs from its recipe: a preset (``release``, ``paper``, ``current``), a
            selection (``layer-balanced``, ``layer-high``, ``global-low``, ``global-high``) and a number of examples
            (of each set of knowledge, the first ones) or ``all``, with commas between.
        second: The same of the second.
        q: Per cent of the nodes; None takes the recipe's, else 10.

    Returns:
        ``q``; ``first`` and ``second`` (``name``, ``attribution``, ``selection``, ``texts`` and ``rows`` of each
        module), ``by_layer`` (``layer``, numbers of rows ``first``, ``second`` and ``common``, ``share``, ``chance``)
        and the same in ``all``. The folder ``overlap/...`` below the first recipe's output has it as ``overlap.json``,
        with ``overlap.png``.

    Raises:
        RecipeError: Both sides are the same, or a word is unknown.
        ModelError: The recipes are of different bases.
        KeeptuneError: The model or the data cannot be attributed.
    """
    jobs = [Job(recipe), Job(recipe if other is None else other)]
    for job in jobs if other is not None else jobs[:1]:
        job.check()
    q = loki_of(jobs[0]).q if q is None else q
    sides = [side_of(first, jobs[0], "--first"), side_of(second, jobs[1], "--second")]
    _check_sides(jobs, sides, same_recipe=other is None)
    known = [attributions_of(job, attribution) for job, (attribution, _) in zip(jobs, sides, strict=True)]
    rows = [chosen_rows(attributions, q, where) for attributions, (_, where) in zip(known, sides, strict=True)]
    layers = overlaps(rows[0], rows[1], known[0].nodes)
    data = [[part.file.rsplit("/", 1)[-1] for part in job.recipe.knowledge_sets.values()] for job in jobs]
    differ = data if jobs[0].recipe.knowledge != jobs[1].recipe.knowledge else ([], [])
    described = [
        {
            "name": ", ".join([*filter(None, map(str.strip, words.split(","))), *differ[at]])
            or f"{where}, {known[at].samples} texts",
            "attribution": attribution,
            "selection": where,
            "texts": known[at].samples,
            "rows": dict(zip(known[at].modules, map(list, rows[at]), strict=True)),
        }
        for at, (words, (attribution, where)) in enumerate(zip((first, second), sides, strict=True))
    ]
    record = {
        "base": recipe.model,
        "q": q,
        "nodes": known[0].nodes,
        "first": described[0],
        "second": described[1],
        "by_layer": [{"layer": at, **_counts(one)} for at, one in zip(known[0].layers, layers, strict=True)],
        "all": _counts(overlap_of(layers)),
    }
    what = content_key([q, sides, [job.calibration and job.calibration.fingerprint for job in jobs]])
    folder = recipe.output / "overlap" / what[:12]
    write_figure_files(folder / "overlap.png", record, overlap_charts(record))
    return record | {"folder": str(folder)}


def _check_sides(jobs: list[Job], sides: list[Side], *, same_recipe: bool) -> None:
    if same_recipe and sides[0] == sides[1]:
        raise RecipeError(
            "--first, --second",
            got="two sides that are the same",
            wanted="two presets, selections or numbers of examples, or a second recipe",
            next_step="Example: --first paper --second current",
        )
    if jobs[0].base_fingerprint != jobs[1].base_fingerprint:
        raise ModelError(
            str(jobs[1].recipe.model),
            got="another base than the first recipe's",
            wanted="the same: nodes are compared one by one",
            next_step="Use the same `model` in both recipes.",
        )


def _counts(overlap: Overlap) -> dict[str, Any]:
    return {key: getattr(overlap, key) for key in ("first", "second", "common", "share", "chance")}
