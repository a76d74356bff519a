"""What predicts forgetting? Every run of the other studies: facts lost against four measures of how far it moved.

Run it after them: `python studies/what_predicts.py runs/all-methods runs/all-penalties` (some minutes). It writes
docs/results/what-predicts.md and docs/results/what-predicts.png.

    relative change      mean_t ‖E_t‖² / ‖W_t‖²
    feature drift        mean_t tr(E Ω Eᵀ) / tr(W Ω Wᵀ)            Ω = E[h hᵀ] on the knowledge
    curvature            1/2 sum_t N/T tr(Γ E Ω Eᵀ)                 nats per token, to second order
    KL                   KL(base || tuned) per token, measured on questions and answers that no run was held by

E is the change of a weight over the whole training, for any method. For LoRA runs the table also has LaLoRA's own form
(b-kfac), which at B_0 = 0 cannot see A.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from drawing import INK, MUTED, bare, finish, page, png, themed
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from scipy.stats import spearmanr
from torch import Tensor

from keeptune import atlas
from keeptune.core.artefact import read_json, read_tensors, write_bytes, write_json
from keeptune.core.errors import ArtefactError, ModelError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration, tokenize_calibration
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens, losses_and_divergence
from keeptune.linalg.symmetric import Dense
from keeptune.model.blocks import find_targets
from keeptune.model.runner import Runner
from keeptune.penalties.laplace import block_kronecker
from keeptune.pipeline.demo import demo_recipe
from keeptune.pipeline.job import Job
from keeptune.pipeline.scoring import find_result, load_pair
from keeptune.pipeline.trained_changes import Change, TrainedModel
from keeptune.recipe.schema import make_recipe
from keeptune.statistics.collect import Statistics, collect
from keeptune.statistics.covariance import GradientCovariance, InputCovariance, TokenCount, tokens_per_learned
from keeptune.statistics.store import StatStore

OMEGA, GAMMA = InputCovariance("knowledge"), GradientCovariance("knowledge", "sampled")
COUNT = TokenCount("knowledge")
MEASURES = {
    "change": "relative change, mean ‖ΔW‖² / ‖W‖²",
    "drift": "relative feature drift",
    "curvature": "curvature, nats/token",
    "kl": "measured KL, nats/token",
}
HELD_OUT = 256
READING = """\
How far the answers moved on what is to be kept tells nearly all of what was lost, whatever the method. Next
come the curvature of the loss, the drift of features, and the size of the change, each blind to more than the
one before. A small drift was always enough to keep most facts (upper right), and not necessary: `replay`, `kl`,
the cubic `l2` and `b-kfac` drifted ten times as far as other runs that lost as little. `replay` also lost less
than its KL says.

**KL on the task's own data** is in every report (forward, per token of the right answers), since RL's Razor
(arXiv 2509.04259) says that it predicts forgetting. On a [real model](real.md) it does so less well than the KL on
texts that the base wrote itself: it compares settings of one way of training, not ways that keep with ways that do
not."""


def main(roots: list[Path], docs: Path) -> None:
    """Measure every run, write the page and the picture."""
    folders = sorted({path.parent for root in roots for path in root.glob("*/report.json")})
    first = make_recipe(
        demo_recipe({"name": "lora"}, 1e-3, Path("unused"), seed=0, store=roots[0] / "store"),
        folder=Path(),
        where="study",
    )
    job = Job(first)
    statistics = known(job, roots[0] / "store")
    texts = held_out(job)
    rows = []
    for folder in folders:
        kept = folder / "predictors.json"
        if not kept.is_file():
            try:
                write_json(kept, measured(folder, job, statistics, texts))
            except (ModelError, ArtefactError) as error:  # a run of another atlas, or one that was not finished
                print(f"{folder} is left out: {error}", flush=True)
                continue
        rows.append(read_json(kept) | {"held": bool(Plan.load(folder / "plan").penalties)})
        print(json.dumps(rows[-1]), flush=True)
    png(figure(rows), docs / "results" / "what-predicts.png")
    write_bytes(docs / "results" / "what-predicts.md", text(rows).encode())


def known(job: Job, store: Path) -> Statistics:
    """Collect Ω and Γ over the knowledge that the studies use."""
    model = job.base()
    targets = find_targets(model)
    requests: Any = {target: frozenset({OMEGA, GAMMA, COUNT}) for target in targets}
    assert job.calibration is not None
    data: Any = {"knowledge": job.calibration}
    fingerprint = job.base_fingerprint
    return collect(Runner(model), requests, data, StatStore(store), model_fingerprint=fingerprint)


def held_out(job: Job) -> list[ScoredTokens]:
    """Tokenise facts that are scored and never calibrated on, whole."""
    lines = atlas.data_path("facts.jsonl").read_text(encoding="utf-8").splitlines()[:HELD_OUT]
    texts = [f"{row['question']}\nAnswer: {row['answer']}" for row in map(json.loads, lines)]
    made: Calibration = tokenize_calibration(texts, job.tokenizer, max_length=64, where="facts")
    return [ScoredTokens(ids, 1, cut=False) for ids in made.sequences]


def measured(folder: Path, job: Job, statistics: Statistics, texts: list[ScoredTokens]) -> dict[str, Any]:
    """Measure one run.

    Args:
        folder: The run folder.
        job: Any job on the same base.
        statistics: Ω and Γ of all targets.
        texts: For the KL.

    Returns:
        Its name, what it kept and learned, and the measures.
    """
    entry = read_json(folder / "report.json")["methods"][0]
    facts, topics = entry["benchmarks"][:2]
    parts: dict[str, list[float]] = {"change": [], "drift": [], "curvature": []}
    blind = 0.0
    started = starts(folder) if entry["method"] in ("lora", "lalora", "l2-lora", "keep") else {}
    for target, W, change in TrainedModel.of(str(folder), base=job.recipe.model).changes():
        stats = statistics.view(target)
        Omega, Gamma, per_learned = stats[OMEGA].double(), stats[GAMMA].double(), tokens_per_learned(stats, COUNT)
        E, W = dense(change, W), W.double()
        EO = E @ Omega
        parts["change"].append(float(E.square().sum() / W.square().sum()))
        parts["drift"].append(float((EO * E).sum() / ((W @ Omega) * W).sum()))
        parts["curvature"].append(per_learned / 2 * float((Gamma * (EO @ E.T)).sum()))
        if target.name in started:
            scale, first, last = started[target.name]
            form = block_kronecker(Dense(Omega), Dense(Gamma), scale=scale, weight=per_learned / 2, start=first)
            blind += float(form(last)[0])
    found = losses_and_divergence(load_pair(job, find_result(folder)), texts, Passes(rows=64, pad=0, where=str(folder)))
    return {
        "run": folder.name,
        "method": entry["method"],
        "lost": 1 - facts["after"] / facts["before"],
        "learned": topics["after"],
        "change": sum(parts["change"]) / len(parts["change"]),
        "drift": sum(parts["drift"]) / len(parts["drift"]),
        "curvature": sum(parts["curvature"]),
        "kl": sum(one["kl"] * one["tokens"] for one in found) / sum(one["tokens"] for one in found),
        "b-kfac": blind if started else None,
    }


def starts(folder: Path) -> dict[str, tuple[float, LowRank, LowRank]]:
    """Read each target's scale, and its factors before and after training, float64."""
    plan = Plan.load(folder / "plan")
    record = read_json(folder / "trained" / "train.json")
    state: Mapping[str, Tensor] = read_tensors(folder / "trained" / "factors.safetensors", record["sha256"])
    found = {}
    for t in plan.targets:
        name = t.target.name
        last = LowRank(state[f"{name}.B"].double(), state[f"{name}.A"].double())
        found[name] = (t.scale, t.init.to(torch.float64), last)
    return found


def dense(change: Change | None, W: Tensor) -> Tensor:
    """Form a change, float64: atlas is small."""
    if change is None:
        return torch.zeros_like(W, dtype=torch.float64)
    return (change if isinstance(change, Tensor) else change.dense()).double()


def figure(rows: list[dict[str, Any]]) -> Any:
    """Draw facts lost against each measure."""
    with themed():
        made = page(9.0, 6.6)
        panels = made.subplots(2, 2, sharey=True)
        for axes, (key, name) in zip(panels.flat, MEASURES.items(), strict=True):
            held = [row for row in rows if is_held(row)]
            free = [row for row in rows if not is_held(row)]
            for some, colour, label in ((free, "#0072b2", "without a penalty"), (held, "#d55e00", "with a penalty")):
                points = [(row[key], row["lost"]) for row in some if row[key] > 0]
                axes.scatter(*zip(*points, strict=True), s=20, c=colour, alpha=0.75, lw=0, label=label)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(name)
            axes.set_title(f"ρ = {correlation(rows, key):.2f}", color=INK)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(visible=True)
            bare(axes, ("left", "bottom"))
        for axes in panels[:, 0]:
            axes.set_ylabel("facts lost", color=MUTED)
        panels[0, 0].legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="upper left")
        return finish(made)


def is_held(row: Mapping[str, Any]) -> bool:
    """Tell whether a run was trained with a penalty on what it changed."""
    return bool(row["held"])


def correlation(rows: list[dict[str, Any]], key: str) -> float:
    """Spearman's rank correlation of a measure with the share of facts lost."""
    return float(spearmanr([row[key] for row in rows], [row["lost"] for row in rows]).statistic)


def text(rows: list[dict[str, Any]]) -> str:
    """Write the page."""
    lines = [
        "# What predicts forgetting?",
        "",
        f"Made by `python studies/what_predicts.py` from {len(rows)} runs on atlas: methods of",
        "[all-methods.md](all-methods.md) and penalties of [all-penalties.md](all-penalties.md), at the rates,",
        "strengths and seeds that were run. ρ is Spearman's rank correlation with the share of facts lost.",
        "",
        "![Facts lost against four measures](what-predicts.png)",
        "",
        "| measure | ρ, all runs | ρ, runs that learned 80% |",
        "| --- | ---: | ---: |",
    ]
    able = [row for row in rows if row["learned"] >= 0.8]
    for key, name in MEASURES.items():
        lines.append(f"| {name} | {correlation(rows, key):.2f} | {correlation(able, key):.2f} |")
    return "\n".join([*lines, "", READING]) + "\n"


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]], Path(__file__).parents[1] / "docs")
