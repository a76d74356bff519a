"""Attributions of a recipe's knowledge, selections of rows from them, and where the selected nodes lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch

from keeptune.core.errors import RecipeError, StatisticsError, need_known
from keeptune.linalg.selections import Rows, count_votes, quota
from keeptune.methods.loki import Loki, select
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import PlanOptions, statistics_for
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
    """Reads one side of a comparison: a preset, a selection and a number of examples, each where it is to differ.

    Args:
        words: Such as ``paper``, ``global-low``, ``50`` or ``paper,global-low,50``; empty for all of the recipe's own.
        job: The recipe, whose LoKI (or the default) has the rest.
        option: The option they come from.

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

    Args:
        attributions: Of many texts.
        q: Per cent of the nodes.
        where: What is taken.

    Raises:
        StatisticsError: So small a share leaves no row.
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
