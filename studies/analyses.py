"""The papers' analyses of a real model, once each, for docs/results/analyses.md.

    python -m studies.analyses DATA MODEL [--work runs/analyses] [--out docs/results/analyses] STEP ...

DATA has relations/relations.jsonl (templates, subjects, objects) and c4_text/c4.jsonl; MODEL is a model folder. Steps
are those of STEPS, in their order; each leaves its records in the work folder and its figures in OUT.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import keeptune
from keeptune import atlas
from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer
from keeptune.recipe.schema import Recipe, make_recipe
from keeptune.statistics.layer_effect import LayerEffect
from keeptune.studies.curvature import curvature
from keeptune.studies.energy import energy
from keeptune.studies.overlap import overlap
from keeptune.studies.suppress import suppress
from keeptune.studies.trace import TraceOptions, trace_models
from studies.cells import read_rows, run_once, write_rows

ENDS = ["\n", ".", ","]
PAIR = {"prompt": "{prompt}", "completion": " {answer}"}
EXACT = {"role": "knowledge", "prompt": "{prompt}", "answer": "{answer}", "metric": "exact_match"}


@dataclass(frozen=True)
class Analyses:
    """Where everything is."""

    data: Path
    model: Path
    work: Path
    out: Path

    def recipe(self, name: str, method: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """The label task of the demo on the model; facts are attributed, web texts are kept."""
        scored = {"file": str(self.work / "known.jsonl"), "max_new_tokens": 8, "stop": ENDS, **EXACT}
        topics = {"file": "atlas:topics.test.jsonl", "prompt": "{text}\nTopic:", "answer": "{topic}", "examples": 100}
        topics |= {"name": "topics", "role": "task", "metric": "exact_match", "max_new_tokens": 12}
        web = {"name": "web", "role": "knowledge", "file": str(self.work / "web.jsonl"), "text": "{text}"}
        return {
            "model": str(self.model),
            "dtype": "bfloat16",
            "method": dict(method or {"name": "lora", "rank": 8, "alpha": 16}),
            "knowledge": {"file": str(self.work / "facts.jsonl"), **PAIR},
            "task": {"train": "atlas:topics.train.jsonl", "prompt": "{text}\nTopic:", "completion": " {topic}"},
            "train": {"learning_rate": 1e-3, "max_steps": 100, "per_device_train_batch_size": 8, "max_length": 160},
            "evaluate": [topics, {"name": "known", **scored}, {**web, "metric": "cross_entropy", "max_length": 128}],
            "output": str(self.work / name),
            "store": str(self.work / "store"),
            "device": "cpu",
        } | more

    def made(self, name: str, **more: Any) -> Recipe:
        """The same, read."""
        return make_recipe(self.recipe(name, **more), folder=Path(), where="analyses")

    def show(self, figure: Path, name: str) -> None:
        """Copies a figure to the docs."""
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figure, self.out / f"{name}.png")


def facts(at: Analyses) -> None:
    """Facts to be attributed, others that the model completes, and web texts."""
    taken = {row["subject"] for row in read_rows(atlas.data_path("topics.train.jsonl"))}
    relations: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(at.data / "relations" / "relations.jsonl"):
        if row["subject"] not in taken and not any(end in row["object"] for end in ENDS):
            relations.setdefault(row["relation"], []).append(row)
    draws, found = random.Random(0), dict[str, str]()
    for _, own in sorted(relations.items()):
        found |= {row["template"].format(row["subject"]): row["object"] for row in draws.sample(own, min(50, len(own)))}
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]
    draws.shuffle(rows)
    write_rows(at.work / "scored.jsonl", rows[300:])
    write_rows(at.work / "facts.jsonl", rows[:300])
    web = [{"text": row["text"]} for row in read_rows(at.data / "c4_text" / "c4.jsonl")[:40]]
    write_rows(at.work / "web.jsonl", web)
    model, tokenizer = load_model(str(at.model), LoadOptions(dtype="bfloat16")), load_tokenizer(str(at.model))
    benchmark = keeptune.FileBenchmark(
        name="facts", file=at.work / "scored.jsonl", max_new_tokens=8, stop=ENDS, **EXACT
    )
    (scored,) = keeptune.measure(keeptune.TwoModels(model, model), tokenizer, [benchmark])
    known = [row for row, item in zip(rows[300:], scored.items, strict=True) if item["before"]]
    print(f"{len(known)} of {scored.n} facts are known")
    write_rows(at.work / "known.jsonl", known)


def train(at: Analyses) -> None:
    """Plain LoRA, also without a third of the blocks (FARSS Table 1), and LaLoRA on the label task."""
    run_once(at.recipe("lora"), "lora")
    blocks = load_model(str(at.model)).config.num_hidden_layers
    run_once(at.recipe("without-shallow", layers=list(range(blocks // 3, blocks))), "without the shallow third")
    run_once(at.recipe("without-deep", layers=list(range(blocks - blocks // 3))), "without the deep third")
    held = {"name": "lalora", "rank": 8, "alpha": 16, "curvature": "delta-kfac", "strength": 1, "batches": None}
    run_once(at.recipe("lalora", held), "lalora")


def concentration(at: Analyses) -> None:
    """FARSS Fig. 1."""
    energy(str(at.model), at.work / "energy.png")
    at.show(at.work / "energy.png", "energy")


def tracing(at: Analyses) -> None:
    """L2-LoRA Figs. 2 and 3, both readings of eq. 2."""
    for reading in ("positions", "diagonal"):
        output = at.work / f"trace-{reading}"
        options = TraceOptions(
            str(at.model),
            at.work / "known.jsonl",
            PAIR["prompt"],
            PAIR["completion"],
            output,
            adapter=str(at.work / "lora"),
            examples=40,
            store=at.work / "store",
            device="cpu",
            dtype="bfloat16",
        )
        trace_models(options, LayerEffect("knowledge", reading=reading))
        at.show(output / "layers.png", f"trace-{reading}")
    at.show(at.work / "trace-positions" / "heat.png", "trace-heat")


def suppressing(at: Analyses) -> None:
    """LoKI Table 5a and Fig. 2."""
    for q, over in ((1.0, "global"), (10.0, "layer-balanced")):
        record = suppress(at.made("loki"), q=q, over=over, draws=2)
        for entry in record["methods"]:
            print(q, over, entry["name"], [(one["name"], one["before"], one["after"]) for one in entry["benchmarks"]])
        print(record["gaps"])
    at.show(Path(record["folder"]) / "nodes.png", "nodes")  # the same for both


def overlapping(at: Analyses) -> None:
    """LoKI's 97.57%, and how far its definitions agree."""
    for first, second in (("50", "all"), ("150", "all"), ("layer-balanced", "layer-high"), ("release,50", "paper,50")):
        record = overlap(at.made("loki"), first=first, second=second)
        print(first, second, record["all"], flush=True)
        if first == "50":
            at.show(Path(record["folder"]) / "overlap.png", "overlap")


def stiffness(at: Analyses) -> None:
    """LaLoRA Fig. 3a."""
    curvature(at.work / "lalora", [str(at.work / "lora")], at.work / "curvature.png")
    at.show(at.work / "curvature.png", "curvature")


STEPS: Mapping[str, Callable[[Analyses], None]] = {
    "facts": facts,
    "energy": concentration,
    "train": train,
    "trace": tracing,
    "suppress": suppressing,
    "overlap": overlapping,
    "curvature": stiffness,
}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS])
    parser.add_argument("--work", type=Path, default=Path("runs/analyses"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/analyses"))
    words = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words.work.mkdir(parents=True, exist_ok=True)
    for name in words.steps or STEPS:
        STEPS[name](Analyses(words.data, words.model, words.work, words.out))


if __name__ == "__main__":
    main()
