"""What truncated Ω and Γ cost keep: task score and forgetting against whole matrices, on three bases.

Run it: ``python studies/factors.py DATA [OUTPUT] [MODEL ...]``. DATA has the whole files of which assets/data has
slices (assets/SOURCE.md says where they are from); MODEL is ``atlas``, ``stories`` or the folder of SmolLM2 that
studies/models.py writes (the first two by default). Killed and started again, it goes on; it prints a table.

``factor_rank: auto`` keeps 288 directions of Ω and 64 of Γ of matrices over 1,024 wide, which these bases have hardly
any of. So all sides are cut: to the very ranks (a), or to the share of the width that the ranks are of 4,096 (b) and of
14,336 (c), an 8B model's. *One number* is (b) with the mean of the remainder in the place of its diagonal.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cells import kept, read_rows, write_rows
from safetensors.torch import load_file
from torch import Tensor

from keeptune import atlas
from keeptune.core.artefact import read_json
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.linalg.symmetric import LowRankDiagonal, PsdMatrix, psd_matrix_from
from keeptune.penalties import measured
from keeptune.penalties.kronecker import KroneckerChange
from keeptune.statistics.low_rank_covariance import Covariance, read_factor, unpacked

Rank = Callable[[Any, int, int], int | None]
_TOPIC = {"prompt": "{text}\nTopic:", "answer": "{topic}", "metric": "exact_match", "max_new_tokens": 12}
BUDGETS = {"atlas": (0.0003,), "stories": (0.003,), "smollm2": (0.00003,)}


def _share(of: int) -> Rank:
    return lambda asked, width, auto: max(1, round(auto * width / of))


FORMS: dict[str, Rank] = {
    "whole": lambda asked, width, auto: None,
    "(a) 288 and 64": lambda asked, width, auto: min(auto, width),
    "(b) share of 4,096": _share(4096),
    "(c) share of 14,336": _share(14336),
    "(b), one number": _share(4096),
    "(b), raised": _share(4096),
}


def one_number(request: Covariance, value: Tensor) -> PsdMatrix:
    """Read a factor as it was kept before: the mean of the remainder for all that is outside the directions."""
    factor = read_factor(request, value)
    if not isinstance(factor, LowRankDiagonal) or factor.rank == factor.size:
        return factor
    rest = factor.rest.sum() / (factor.size - factor.rank)
    return LowRankDiagonal(factor.U, (factor.values - rest).clamp_min(0), rest.expand(factor.size).clone())


def raised(request: Covariance, value: Tensor) -> PsdMatrix:
    """Read a factor whose rest costs inputs, not random directions, what they cost: ``d ||R||² / ||d||²``."""
    factor = read_factor(request, value)
    if not isinstance(factor, LowRankDiagonal) or factor.rank == factor.size:
        return factor
    error, own = unpacked(value).error, factor.dense().square().sum()
    off = own * error**2 / (1 - error**2)
    more = 1 + off / factor.rest.square().sum()
    return LowRankDiagonal(factor.U, factor.values, factor.rest * more)


@contextmanager
def cut(form: str) -> Iterator[None]:
    """Have penalties keep as many directions as a form says."""
    reader = {"one number": one_number, "raised": raised}.get(form.partition(", ")[2], read_factor)
    with patch.object(measured, "chosen_rank", FORMS[form]), patch.object(measured, "read_factor", reader):
        yield


def recipe(model: str, base: str, data: Path, output: Path) -> dict[str, Any]:
    """Give the recipe of a base, but for the budget and the run folder."""
    topics, topic = {"prompt": "{text}\nTopic:", "completion": " {topic}"}, {"role": "task", **_TOPIC}
    if model == "atlas":
        facts = {"prompt": "{question}\nAnswer:", "answer": "{answer}", "metric": "exact_match", "max_new_tokens": 16}
        text = "{question}\nAnswer: {answer}"
        told = {"file": "atlas:facts.jsonl", "role": "knowledge"}
        return {
            "model": "atlas",
            "knowledge": {"file": "atlas:calibration.jsonl", "text": text, "examples": 256},
            "task": {"train": "atlas:topics.train.jsonl", **topics},
            "train": {"learning_rate": 2e-3, "max_steps": 120, "per_device_train_batch_size": 32},
            "evaluate": [
                {"name": "task", "file": "atlas:topics.test.jsonl", **topic},
                {"name": "kept", **told, **facts},
                {"name": "text", **told, "text": text, "metric": "cross_entropy"},
            ],
        }
    texts = {"text": "{text}", "metric": "cross_entropy", "max_length": 128}
    if model == "stories":
        stories = read_rows(data / "tinystories/stories.jsonl")
        write_rows(output / "knowledge.jsonl", stories[:128])
        write_rows(output / "kept.jsonl", stories[128:228])
        problem = {"prompt": "Problem:", "completion": " {question}\n{answer}", "examples": 2000}
        solved = {"text": "Problem: {question}\n{answer}", "examples": 100}
        return {
            "model": base,
            "knowledge": {"file": str(output / "knowledge.jsonl"), "text": "{text}", "max_length": 128},
            "task": {"train": str(data / "gsm8k/train.jsonl"), **problem},
            "train": {
                "learning_rate": 2e-3,
                "max_steps": 120,
                "per_device_train_batch_size": 8,
                "max_length": 128,
            },
            "evaluate": [
                {"name": "task", "role": "task", "file": str(data / "gsm8k/test.jsonl"), **texts, **solved},
                {"name": "text", "role": "knowledge", "file": str(output / "kept.jsonl"), **texts},
            ],
        }
    web, labelled = read_rows(data / "c4_text/c4.jsonl"), read_rows(atlas.data_path("topics.train.jsonl"))
    write_rows(output / "knowledge.jsonl", web[:128])
    write_rows(output / "kept.jsonl", web[200:260])
    write_rows(output / "task.jsonl", labelled[:1600])
    write_rows(output / "task-test.jsonl", read_rows(atlas.data_path("topics.test.jsonl")) + labelled[1600:1700])
    return {
        "model": base,
        "knowledge": {"file": str(output / "knowledge.jsonl"), "text": "{text}", "max_length": 128},
        "task": {"train": str(output / "task.jsonl"), **topics},
        "train": {"learning_rate": 1e-3, "max_steps": 100, "per_device_train_batch_size": 16},
        "evaluate": [
            {"name": "task", "file": str(output / "task-test.jsonl"), **topic},
            {"name": "text", "role": "knowledge", "file": str(output / "kept.jsonl"), **texts},
        ],
    }


def estimates(whole: Path, own: Path) -> dict[str, float]:
    """Read what a training's budget was counted in at its end, by its own factors and by the whole matrices."""
    weights = load_file(own / "trained" / "factors.safetensors")
    found = {}
    for name, folder in (("own", own), ("true", whole)):
        plan = Plan.load(folder / "plan")
        found[name] = sum(_nats(plan, at, weights) for at in range(len(plan.targets)))
    return found


def _nats(plan: Plan, at: int, weights: Mapping[str, Tensor]) -> float:
    planned, tensors = plan.targets[at], plan.penalties[0].tensors
    target = planned.target
    change = KroneckerChange(
        psd_matrix_from(tensors, f"Omega:{target.input_group}:"),
        psd_matrix_from(tensors, f"Gamma:{target.name}:"),
        planned.scale,
        tensors[f"share:{target.name}"],
    )
    return float(change.value(LowRank(weights[f"{target.name}.B"], weights[f"{target.name}.A"])))


def scores_of(whole: Path, folder: Path) -> dict[str, float]:
    """Read a run's scores."""
    scored = {b["name"]: b for b in read_json(folder / "report.json")["methods"][0]["benchmarks"]}
    found = {name: scored[name]["after"] for name in scored} | {"kl": scored["text"]["kl_to_base"]}
    return found | {"text before": scored["text"]["before"]} | estimates(whole, folder)


def main(data: Path, output: Path, bases: Mapping[str, str]) -> None:
    """Run what has not been run, and print the table."""
    print("| base, budget | Ω and Γ | task | kept | text | KL | own estimate / true |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for model, base in bases.items():
        here = output / model
        here.mkdir(parents=True, exist_ok=True)
        values = recipe(model, base, data, here) | {"store": str(here / "store"), "device": "cpu"}
        for budget in BUDGETS[model]:
            method = {"name": "keep", "rank": 8, "alpha": 16, "nats": budget}
            folders = {form: here / f"{budget:g}" / f"{place}" for place, form in enumerate(FORMS)}
            for form, folder in folders.items():
                asked = values | {"method": method, "output": str(folder)}
                with cut(form):
                    scores = kept(asked, f"{model}, {budget:g}, {form}", partial(scores_of, folders["whole"]))
                cells = [f"{scores[name]:.4g}" if name in scores else "" for name in ("task", "kept", "text", "kl")]
                ratio = scores["own"] / scores["true"]
                print(f"| {model}, {budget:g} | {form} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python studies/factors.py DATA [OUTPUT] [MODEL ...]")
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    named = sys.argv[3:] or ["atlas", "stories"]
    stories = str(Path(__file__).parents[1] / "assets/models/stories260K")
    main(
        Path(sys.argv[1]),
        Path([*sys.argv, "runs/factors"][2]),
        {name if name in BUDGETS else "smollm2": stories if name == "stories" else name for name in named},
    )
