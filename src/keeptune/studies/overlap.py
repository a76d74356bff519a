"""keeptune overlap: how many rows two selections share (LoKI's 97.57% of 50 questions a subject to all)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch

from keeptune.core.artefact import content_key
from keeptune.core.errors import ModelError, RecipeError, StatisticsError, need_known
from keeptune.linalg.selections import Overlap, Rows, count_votes, overlap_of, overlaps, quota
from keeptune.methods.loki import Loki, select
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import PlanOptions, statistics_for
from keeptune.recipe.schema import Recipe
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution

# What is taken: of each block, or of all blocks together, the lowest or the highest.
Where = Literal["layer-balanced", "layer-high", "global-low", "global-high"]
PRESETS: Mapping[str, NeuronAttribution] = {
    "release": NeuronAttribution(),
    "paper": NeuronAttribution.as_paper(),
    "current": NeuronAttribution.as_current(),
}
_BINS = 64  # of nodes, in a map of where they lie
Side = tuple[NeuronAttribution, Where]  # one of two selections that are compared: what is measured, what is taken


def loki_of(job: Job) -> Loki:
    """Returns a recipe's LoKI, or the default one: its attribution, share of nodes and selection are the defaults."""
    return job.method if isinstance(job.method, Loki) else Loki()


def side_of(words: str, job: Job, option: str) -> Side:
    """Reads one side of a comparison: what differs from the LoKI of the job's recipe, or else from the default one.

    ``words`` are a preset, a selection and a number of examples, as ``paper``, ``50`` or ``paper,global-low,50``.

    Raises:
        RecipeError: A word is none of them.
    """
    loki = loki_of(job)
    attribution, examples = loki.attribution, loki.attribution.examples
    where: Where = loki.selection
    for word in (part.strip() for part in words.split(",") if part.strip()):
        if word in PRESETS:
            attribution = PRESETS[word]
        elif word in get_args(Where):
            where = cast(Where, word)
        elif word == "all":
            examples = None
        elif word.isdecimal() and int(word) > 0:
            examples = int(word)
        else:
            known = [*PRESETS, *get_args(Where), "all"]
            need_known(word, known, option, f"{', '.join(known)}, or a number of examples")
    return dataclasses.replace(attribution, examples=examples), where


def check_share(q: float) -> None:
    """Raises RecipeError unless a share of the nodes, in per cent, is in its range."""
    if not 0 < q <= 100:
        wanted = "above 0 and at most 100: per cent of the nodes"
        raise RecipeError("--q", got=f"{q:g}", wanted=wanted, next_step="Example: --q 1")


def attributions_of(job: Job, request: NeuronAttribution) -> Attributions:
    """Attributes the nodes of a recipe's base over its knowledge; what the store has is not computed again.

    Raises:
        RecipeError: The recipe has no knowledge.
        KeeptuneError: The model or the data cannot be attributed.
    """
    if job.calibration is None:
        raise RecipeError(
            "knowledge",
            got="no `knowledge` section in the recipe",
            wanted="the texts over which nodes are attributed",
            next_step='Add for example knowledge: {file: calibration.jsonl, prompt: "{question}\\nAnswer:", '
            'completion: " {answer}"}.',
        )
    targets, statistics = statistics_for(
        job.base(),
        Loki(attribution=request),
        job.store,
        data={"knowledge": job.calibration},
        options=PlanOptions(fingerprint=job.base_fingerprint),
    )
    return statistics.view(targets[0]).attributions(request)


def chosen_rows(attributions: Attributions, q: float = 10.0, where: Where = "layer-balanced") -> Rows:
    """Selects the rows of each down-projection by the votes of all texts, as LoKI does (eqs. 6-9) and its controls.

    Raises:
        StatisticsError: A share of ``q`` per cent leaves no row.
    """
    rows = tuple(selected.rows for selected in select(attributions, q, where).values())
    if not any(rows):
        raise StatisticsError(
            "--q",
            got=f"{q:g} per cent of {attributions.nodes} nodes, which leaves no row",
            wanted=f"{100 / attributions.nodes:.2g} or more",
            next_step="Raise it, or take nodes of all blocks together.",
        )
    return rows


def density(attributions: Attributions, q: float = 5.0) -> dict[str, Any]:
    """Maps where the highest and lowest ``q`` per cent of the nodes of all blocks together lie (the paper's Fig. 2).

    Returns:
        ``q``, ``edges`` (the first node of each bin, and D), and ``highest`` and ``lowest``: for each block and bin
        the mean share of texts that name a node.
    """
    nodes, bins = attributions.nodes, min(attributions.nodes, _BINS)
    k = quota(q, nodes * len(attributions.layers))
    edges = [round(place * nodes / bins) for place in range(bins + 1)]
    binned: dict[str, Any] = {"q": q, "edges": edges}
    for name in ("highest", "lowest"):
        counts = count_votes(attributions.chunks(), k, whole=True, highest=name == "highest")
        parts = torch.tensor_split(counts.double() / attributions.samples, edges[1:-1], dim=1)
        binned[name] = torch.stack([part.mean(dim=1) for part in parts], dim=1).tolist()
    return binned


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
        RecipeError: Both sides are the same, a word is unknown, or ``q`` is out of range.
        ModelError: The recipes are of different bases.
        KeeptuneError: The model or the data cannot be attributed.
    """
    jobs = [Job(recipe), Job(recipe if other is None else other)]
    for job in jobs if other is not None else jobs[:1]:
        job.check()
    q = loki_of(jobs[0]).q if q is None else q
    check_share(q)
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
    from keeptune.report.pages.study_charts import overlap_charts  # loads plotly and matplotlib
    from keeptune.studies.figure_files import write_figure_files

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
