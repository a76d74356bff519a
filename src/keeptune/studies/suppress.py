"""keeptune suppress: does the attribution find the nodes that matter (LoKI, Table 5a)?

    S-H      the q per cent of nodes that texts name most often as highest give zero
    S-L      those that they name most often as lowest
    random   as many, drawn; the control

If the attribution is right, S-H loses much and S-L little. The paper has no control: what S-L loses says little without
what any other rows of the same number lose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key, write_bytes
from keeptune.core.errors import RecipeError, nearest
from keeptune.evaluation.benchmark_data import data_fingerprint
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.metrics import paired_interval
from keeptune.evaluation.model_pairs import SuppressedNodes
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.linalg.selections import Rows
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import Recipe
from keeptune.report.figures.drawing import png
from keeptune.report.figures.node_maps import density_figure
from keeptune.report.figures.sweep_lines import sweep_figure
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution, layer_profile
from keeptune.studies.figure_files import write_figure_files
from keeptune.studies.node_selections import Where, attributions_of, check_share, chosen_rows, density, loki_of

__all__ = ["Over", "drawn_rows", "suppress"]

Over = Literal["layer-balanced", "global"]
_VERSION = 1


@dataclass(frozen=True)
class _Suppressed:
    """Rows that are switched off, and what was scored without them."""

    label: str
    seed: int
    rows: Rows
    results: tuple[BenchmarkResult, ...] = ()


def suppress(
    recipe: Recipe, *, q: float = 1.0, over: str = "layer-balanced", draws: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Scores a recipe's base without the highest, the lowest, and as many random nodes; a killed run resumes.

    Args:
        recipe: A recipe with knowledge, over which nodes are attributed (as its LoKI says, else by default), and with
            knowledge benchmarks. Nothing is trained.
        q: Per cent of the nodes.
        over: ``"layer-balanced"``: the same number of each block; ``"global"``: of all blocks together.
        draws: How many random selections.
        seed: Of the first of them; the others follow.

    Returns:
        A report of the suppressed models, as ``report.json`` has (K and average forgetting are against the base), with
        ``q``, ``over``, ``attribution``, ``texts``, ``nodes``, the ``modules``, ``rows`` of each entry and
        module, ``profile`` (the mean of ``sum_j |Attr_j|`` of each block, relative to the largest), ``density`` and
        ``gaps`` (S-L's score less S-H's, with its interval on the same items). The folder ``suppress/q...`` below the
        recipe's output has it as ``suppress.json``, with ``suppress.png`` and ``nodes.png``.

    Raises:
        KeeptuneError: Something the user can mend.
    """
    if over not in get_args(Over):
        known = list(get_args(Over))
        raise RecipeError("--over", got=over, wanted=" or ".join(known), next_step=nearest(over, known))
    check_share(q)
    if draws < 0:
        raise RecipeError("--draws", got=str(draws), wanted="0 or more", next_step="Example: --draws 3")
    job = Job(recipe)
    job.check()
    if not any(benchmark.role == "knowledge" for benchmark in recipe.evaluate):
        raise RecipeError(
            "evaluate",
            got="no benchmark of role knowledge",
            wanted="one or more: what the model knows is scored",
            next_step="Add one to the recipe.",
        )
    request = loki_of(job).attribution
    attributions = attributions_of(job, request)
    whole = over == "global"
    kinds: tuple[Where, Where] = ("global-high", "global-low") if whole else ("layer-high", "layer-balanced")
    highest, lowest = (chosen_rows(attributions, q, kind) for kind in kinds)
    variants = [_Suppressed("S-H", 0, highest), _Suppressed("S-L", 0, lowest)]
    variants += [
        _Suppressed("random", number, drawn_rows(lowest, attributions.nodes, number, whole=whole))
        for number in range(seed, seed + draws)
    ]
    folder = recipe.output / "suppress" / f"q{q:g}-{over}-{content_key([request])[:8]}"
    model = job.base()
    variants = [_scored(job, model, attributions.modules, variant, folder) for variant in variants]
    record = _record(job, attributions, request, variants) | {"q": q, "over": over}
    rows = [{**entry, "x": None, "method": entry["name"]} for entry in record["methods"]]
    write_figure_files(folder / "suppress.png", record, sweep_figure({"rows": rows}))
    png(density_figure(record), folder / "nodes.png")
    return record | {"folder": str(folder)}


def drawn_rows(like: Rows, nodes: int, seed: int, *, whole: bool) -> Rows:
    """Draws as many rows as a selection has.

    Laws: the number of rows is the same, of each block unless ``whole``; none twice; the same seed draws the same.

    Args:
        like: The selection.
        nodes: Nodes of each block, D.
        seed: Of the draw.
        whole: Draw from all blocks together.

    Returns:
        The rows, ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    if not whole:
        return tuple(tuple(sorted(torch.randperm(nodes, generator=generator)[: len(rows)].tolist())) for rows in like)
    places = torch.randperm(nodes * len(like), generator=generator)[: sum(map(len, like))].tolist()
    return tuple(tuple(sorted(p % nodes for p in places if p // nodes == layer)) for layer in range(len(like)))


def _scored(
    job: Job, model: PreTrainedModel, modules: Sequence[str], variant: _Suppressed, folder: Path
) -> _Suppressed:
    """Scores each knowledge benchmark that has no result yet; results are kept one by one."""
    results = []
    rows = {name: own for name, own in zip(modules, variant.rows, strict=True) if own}
    for benchmark in job.recipe.evaluate:
        if benchmark.role != "knowledge":
            continue
        data = data_fingerprint(benchmark)
        key = content_key([benchmark, data, rows, job.base_fingerprint, job.recipe.dtype, job.seed, _VERSION])
        path = folder / f"{variant.label}-{variant.seed}" / f"{benchmark.name}.json"
        items = path.with_suffix(".items.jsonl")

        def compute(benchmark: Benchmark = benchmark, items: Path = items) -> dict[str, Any]:
            result = evaluate(SuppressedNodes(model, rows), job.tokenizer, benchmark, Path(), seed=job.seed)
            write_bytes(items, result.to_jsonl().encode())
            return {"rows": rows, "summary": result.summary()}

        record = Stored(f"suppress {variant.label}, {benchmark.name}", path, key).get(compute, files=[items.name])
        results.append(BenchmarkResult.from_jsonl(record["summary"], items.read_text(encoding="utf-8")))
    return dataclasses.replace(variant, results=tuple(results))


def _record(
    job: Job, attributions: Attributions, request: NeuronAttribution, variants: Sequence[_Suppressed]
) -> dict[str, Any]:
    empty = {"adapter": "", "export_gap": None}
    entries = [
        {
            "name": variant.label,
            "seed": variant.seed,
            **trade_off(variant.results),
            **empty,
            "benchmarks": [result.summary() for result in variant.results],
            "rows": [list(rows) for rows in variant.rows],
        }
        for variant in variants
    ]
    highest, lowest = variants[:2]
    return {
        "base": job.recipe.model,
        "attribution": request,
        "texts": attributions.samples,
        "nodes": attributions.nodes,
        "layers": list(attributions.layers),
        "modules": list(attributions.modules),
        "methods": entries,
        "gaps": [_gap(*both, job.seed) for both in zip(highest.results, lowest.results, strict=True)],
        "profile": layer_profile(attributions).tolist(),
        "density": density(attributions),
    }


def _gap(highest: BenchmarkResult, lowest: BenchmarkResult, seed: int) -> Mapping[str, Any]:
    """Returns how much better the model scores without the lowest nodes than without the highest, item by item."""
    weights = np.array([float(item.get("tokens", 1)) for item in highest.items])
    first, second = (weights * [item["after"] for item in result.items] for result in (highest, lowest))
    low, high = paired_interval(first, second, seed, weights=weights)
    return {"name": highest.name, "metric": highest.metric, "S-L less S-H": lowest.after - highest.after} | {
        "interval": [low, high]
    }
