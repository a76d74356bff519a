"""keeptune suppress: does the attribution find the nodes that matter (LoKI, Table 5a)?

    S-H      the q per cent of nodes that texts name most often as highest give zero
    S-L      those that they name most often as lowest
    random   as many, drawn; the control

If the attribution is right, S-H loses much and S-L little. The paper has no control: what S-L loses means little
without what any other rows of the same number lose.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.errors import RecipeError, need_known
from keeptune.evaluation.model_pairs import TwoModels
from keeptune.evaluation.results import BenchmarkResult, interval_between, trade_off
from keeptune.linalg.selections import Rows
from keeptune.pipeline.job import Job
from keeptune.pipeline.scoring import score
from keeptune.recipe.schema import Recipe
from keeptune.report.figures import write_figure
from keeptune.report.pages.study_charts import density_charts
from keeptune.report.pages.sweep_charts import sweep_charts, sweep_note
from keeptune.statistics.neuron_attribution import layer_profile
from keeptune.studies.figure_files import write_figure_files
from keeptune.studies.overlap import Where, attributions_of, check_share, chosen_rows, density, loki_of

Over = Literal["layer-balanced", "global"]


def suppress(
    recipe: Recipe, *, q: float = 1.0, over: str = "layer-balanced", draws: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Scores a recipe's base without the highest, the lowest, and as many random nodes; a killed run resumes.

    Args:
        recipe: A recipe with knowledge, over which nodes are attributed (as by its LoKI, else by default), and with
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
        RecipeError: An option is out of range, or the recipe has no knowledge benchmark.
        KeeptuneError: The model or the data cannot be attributed or scored.
    """
    job = Job(recipe)
    _check(job, q, over, draws)
    request = loki_of(job).attribution
    attributions = attributions_of(job, request)
    whole = over == "global"
    kinds: tuple[Where, Where] = ("global-high", "global-low") if whole else ("layer-high", "layer-balanced")
    highest, lowest = (chosen_rows(attributions, q, kind) for kind in kinds)
    variants = [("S-H", 0, highest), ("S-L", 0, lowest)]
    for number in range(seed, seed + draws):
        variants.append(("random", number, drawn_rows(lowest, attributions.nodes, number, whole=whole)))
    folder = recipe.output / "suppress" / f"q{q:g}-{over}-{content_key([request])[:8]}"
    model = job.base()
    scores, entries = [], []
    for name, number, rows in variants:
        results = _scored(job, model, dict(zip(attributions.modules, rows, strict=True)), folder / f"{name}-{number}")
        scores.append(results)
        entry = {"name": name, "seed": number, **trade_off(results), "adapter": "", "export_gap": None}
        summaries = [result.summary() for result in results]
        entries.append(entry | {"benchmarks": summaries, "rows": [list(own) for own in rows]})
    record = {
        "base": recipe.model,
        "attribution": request,
        "texts": attributions.samples,
        "nodes": attributions.nodes,
        "layers": list(attributions.layers),
        "modules": list(attributions.modules),
        "methods": entries,
        "gaps": [_gap(high, low, job.seed) for high, low in zip(scores[0], scores[1], strict=True)],
        "profile": layer_profile(attributions).tolist(),
        "density": density(attributions),
        "q": q,
        "over": over,
    }
    points = [{**entry, "x": None, "method": entry["name"]} for entry in entries]
    swept = {"rows": points, "when": "without the nodes"}
    write_figure_files(folder / "suppress.png", record, sweep_charts(swept), sweep_note(swept))
    write_figure(density_charts(record), folder / "nodes.png")
    return record | {"folder": str(folder)}


def _check(job: Job, q: float, over: str, draws: int) -> None:
    check_share(q)
    if draws < 0:
        raise RecipeError("--draws", got=str(draws), wanted="0 or more", next_step="Example: --draws 3")
    need_known(over, get_args(Over), "--over", " or ".join(get_args(Over)))
    job.check()
    if not any(benchmark.role == "knowledge" for benchmark in job.recipe.evaluate):
        raise RecipeError(
            "evaluate",
            got="no benchmark of role knowledge",
            wanted="one or more: what the model knows is scored",
            next_step="Add one to the recipe.",
        )


def drawn_rows(like: Rows, nodes: int, seed: int, *, whole: bool) -> Rows:
    """Draws as many rows as a selection has, ascending, of the ``nodes`` of each block.

    Laws: the number of rows is the same, of each block unless ``whole``; none twice; the same seed draws the same.
    """
    generator = torch.Generator().manual_seed(seed)
    if not whole:
        return tuple(tuple(sorted(torch.randperm(nodes, generator=generator)[: len(rows)].tolist())) for rows in like)
    places = torch.randperm(nodes * len(like), generator=generator)[: sum(map(len, like))].tolist()
    return tuple(tuple(sorted(p % nodes for p in places if p // nodes == layer)) for layer in range(len(like)))


def _scored(job: Job, model: PreTrainedModel, rows: Mapping[str, Sequence[int]], folder: Path) -> list[BenchmarkResult]:
    """Scores each knowledge benchmark that has no result yet without some rows; results are kept one by one."""
    rows = {name: own for name, own in rows.items() if own}
    pair = TwoModels(model, model, rows)
    results = []
    for benchmark in job.recipe.evaluate:
        if benchmark.role == "knowledge":
            record = score(job, benchmark, lambda: pair, folder, job.base_fingerprint, None, {"suppressed": rows})
            items = (folder / f"{benchmark.name}.items.jsonl").read_text(encoding="utf-8")
            results.append(BenchmarkResult.from_jsonl(record["summary"], items))
    return results


def _gap(highest: BenchmarkResult, lowest: BenchmarkResult, seed: int) -> dict[str, Any]:
    """Returns how much better the model scores without the lowest nodes than without the highest, item by item."""
    gap = {"name": highest.name, "metric": highest.metric, "S-L less S-H": lowest.after - highest.after}
    return gap | {"interval": list(interval_between(highest, lowest, seed))}
