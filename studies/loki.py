"""Does attribution find the nodes that matter on atlas, and how far do its definitions agree?

Run it: `make study`, or `python studies/loki.py [folder]` (some minutes). Attributions and scores are kept, so that it
goes on where it was stopped. Training with LoKI is in studies/all_methods.py.

Nodes are attributed over 256 of atlas' 400 questions of calibration, drawn with seeds 0 to 2, and scored on the 360
facts of which none is among them: nats per answer token, and the share of facts whose every answer token is the
likeliest (what greedy decoding gets right), both given the answer so far.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from drawing import INK, bare, finish, page, png, themed
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from keeptune.core.artefact import content_key, read_json, write_bytes, write_json
from keeptune.core.bootstrap import paired_interval
from keeptune.data.sources import read_jsonl
from keeptune.linalg.selections import Rows, overlap_of, overlaps
from keeptune.model.probes.block_calls import without_nodes
from keeptune.pipeline.demo import demo_recipe
from keeptune.pipeline.job import Job
from keeptune.recipe.paths import resolve_file
from keeptune.recipe.schema import make_recipe
from keeptune.report.figures import write_figure
from keeptune.report.pages.study_charts import density_charts
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution, layer_profile
from keeptune.studies.overlap import PRESETS, Where, attributions_of, chosen_rows, density
from keeptune.studies.suppress import drawn_rows

SEEDS = (0, 1, 2)
SHARES = (1.0, 5.0, 10.0, 20.0)
DRAWS = {"layer-balanced": 5, "global": 2}
TEXTS, DEFINED = 256, 64
_LABELS = {"S-H": "highest (S-H)", "S-L": "lowest (S-L)", "absolute": "least absolute", "random": "random"}
_COLOURS = {"S-H": "#c44e12", "S-L": "#0b5c96", "absolute": "#009e73", "random": INK}


@dataclass(frozen=True)
class Study:
    """Atlas with some of its calibration questions.

    Args:
        output: Where everything is kept.
        seed: Draws the questions; None takes all 400 in their order.
    """

    output: Path
    seed: int | None = None

    @cached_property
    def job(self) -> Job:
        """The recipe with these questions."""
        rows = read_jsonl(Path(resolve_file("atlas:calibration.jsonl")), where="calibration")
        file = self.output / f"questions-{self.seed}.jsonl"
        if self.seed is not None:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
            rows = [rows[place] for place in order[:TEXTS]]
        write_bytes(file, "".join(f"{_json(row)}\n" for row in rows).encode())
        values = demo_recipe({"name": "loki"}, 1e-3, self.output / "run", seed=0, store=self.output / "store")
        values["knowledge"] = {
            "file": str(file),
            "prompt": "{question}\nAnswer:",
            "completion": " {answer}",
            "examples": len(rows),
        }
        return Job(make_recipe(values, folder=Path(), where="study loki"))

    def found(self, request: NeuronAttribution | None = None) -> Attributions:
        """Attribute the nodes."""
        return attributions_of(self.job, request or NeuronAttribution())


@dataclass(frozen=True)
class Facts:
    """The facts as tokens, answers given, and atlas."""

    study: Study

    @cached_property
    def model(self) -> Any:
        """The base."""
        return self.study.job.base()

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention and which tokens are answers, ``(N, S)``."""
        tokenizer: Any = self.study.job.tokenizer
        rows = read_jsonl(Path(resolve_file("atlas:facts.jsonl")), where="facts")
        pairs = [
            (
                tokenizer(f"{row['question']}\nAnswer:")["input_ids"],
                tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"],
            )
            for row in rows
        ]
        shape = len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids, mask, answers = torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.zeros(shape)
        for place, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            ids[place, :end] = torch.tensor(prompt + answer)
            mask[place, :end] = 1
            answers[place, len(prompt) : end] = 1
        return ids, mask.long(), answers.bool()

    @torch.no_grad()
    def score(self, modules: Sequence[str], rows: Rows) -> dict[str, list[float]]:
        """Score every fact with rows switched off: ``right``, and ``nats`` and ``tokens`` of its answer."""
        ids, mask, answers = self.tokens
        with without_nodes(self.model, dict(zip(modules, rows, strict=True))):
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        wanted, counted = ids[:, 1:], answers[:, 1:]
        lost = -logits.log_softmax(-1).gather(-1, wanted[..., None]).squeeze(-1)
        right = ((logits.argmax(-1) == wanted) | ~counted).all(-1)
        return {
            "right": right.float().tolist(),
            "nats": (lost * counted).sum(-1).tolist(),
            "tokens": counted.sum(-1).tolist(),
        }


def main(output: Path, docs: Path) -> None:
    """Measure, and write the page and the figures."""
    output.mkdir(parents=True, exist_ok=True)
    facts = Facts(Study(output))
    base = _kept(output, "base", lambda: facts.score((), ()))
    cells = [
        _kept(output, f"{over}-{q:g}-{seed}", lambda over=over, q=q, seed=seed: cell(facts, output, over, q, seed))
        for over in ("layer-balanced", "global")
        for q in SHARES
        for seed in SEEDS
    ]
    beside = _kept(output, "beside", lambda: [besides(facts, output, q) for q in SHARES])
    agreement = _kept(output, "overlaps", lambda: agreements(output))
    where = _kept(output, "where", lambda: _where(Study(output).found()))
    write_figure(density_charts(where), docs / "results" / "loki-nodes.png")
    png(suppression_figure(cells, base), docs / "results" / "loki.png")
    write_bytes(docs / "results" / "loki-tables.md", report(cells, base, beside, agreement, where).encode())


def cell(facts: Facts, output: Path, over: str, q: float, seed: int) -> dict[str, Any]:
    """Score atlas without the highest, the lowest, the least absolute and random nodes."""
    study, whole = Study(output, seed), over == "global"
    found = study.found()
    least = study.found(replace(NeuronAttribution(), signed=False))
    high, low = _wheres(over)
    chosen = {
        "S-H": chosen_rows(found, q, high),
        "S-L": chosen_rows(found, q, low),
        "absolute": chosen_rows(least, q, low),
    }
    drawn = [
        drawn_rows(chosen["S-L"], found.nodes, DRAWS[over] * seed + draw, whole=whole) for draw in range(DRAWS[over])
    ]
    print(f"{over}, {q:g}%, seed {seed}", flush=True)
    return {
        "over": over,
        "q": q,
        "seed": seed,
        "rows": {name: [len(own) for own in rows] for name, rows in chosen.items()},
        "common": overlap_of(overlaps(chosen["S-H"], chosen["S-L"], found.nodes)).share,
        **{name: facts.score(found.modules, rows) for name, rows in chosen.items()},
        "random": [facts.score(found.modules, rows) for rows in drawn],
    }


def besides(facts: Facts, output: Path, q: float) -> dict[str, Any]:
    """Score atlas without random nodes of the blocks that the lowest of all blocks together lie in, as many of each."""
    scores = []
    for seed in SEEDS:
        found = Study(output, seed).found()
        rows = drawn_rows(chosen_rows(found, q, "global-low"), found.nodes, seed, whole=False)
        scores.append(facts.score(found.modules, rows))
    return {"q": q, "scores": scores}


def _wheres(over: str) -> tuple[Where, Where]:
    return ("global-high", "global-low") if over == "global" else ("layer-high", "layer-balanced")


def agreements(output: Path) -> list[dict[str, Any]]:
    """Compare selections of LoKI's 10% between definitions, numbers of texts, data and selections."""
    study, q = Study(output), 10.0
    whole = study.found()
    known = {name: study.found(replace(request, examples=DEFINED)) for name, request in PRESETS.items()}
    plain = study.found(replace(NeuronAttribution(), times_activation=False, examples=DEFINED))
    absolute = study.found(replace(NeuronAttribution(), signed=False, examples=DEFINED))
    release = known["release"]
    pairs: list[tuple[str, str, Attributions, Attributions, Where, Where]] = []

    def add(table: str, name: str, one: Attributions, other: Attributions, *where: Where) -> None:
        pairs.append((table, name, one, other, *(where or ("layer-balanced", "layer-balanced"))))  # type: ignore[arg-type]

    add("definitions", "first release, paper", release, known["paper"])
    add("definitions", "first release, current", release, known["current"])
    add("definitions", "paper, current", known["paper"], known["current"])
    add("definitions", "first release, without its factor z", release, plain)
    add("definitions", "paper, first release without its factor z", known["paper"], plain)
    add("definitions", "first release, absolute values", release, absolute)
    for number in (10, 25, 50, 100, 200):
        add("texts", f"first {number}, all 400", study.found(NeuronAttribution(examples=number)), whole)
    halves = [_part(whole, slice(0, 200)), _part(whole, slice(200, 400))]
    add("texts", "one half, the other half", *halves)
    add("selections", "lowest, highest", whole, whole, "layer-balanced", "layer-high")
    add("selections", "lowest, highest: of all blocks together", whole, whole, "global-low", "global-high")
    add("selections", "layer-balanced, global-low", whole, whole, "layer-balanced", "global-low")
    rows = []
    for table, name, one, other, first, second in pairs:
        found = overlap_of(overlaps(chosen_rows(one, q, first), chosen_rows(other, q, second), one.nodes))
        rows.append({"table": table, "name": name, "share": found.share, "chance": found.chance})
    return rows


def _part(found: Attributions, part: slice) -> Attributions:
    """Take some texts; they are in the order of their tokens, so every second of all is a half of the same kind."""
    places = list(range(found.samples))
    places = (places[::2] + places[1::2])[part]
    return replace(found, samples=len(places), read=lambda at: found.read(places[at]))


def _where(found: Attributions) -> dict[str, Any]:
    return {
        "density": density(found),
        "profile": layer_profile(found).tolist(),
        "layers": list(found.layers),
        "rows": {
            f"{where} {q:g}": [len(rows) for rows in chosen_rows(found, q, where)]
            for where in ("global-low", "global-high")
            for q in SHARES
        },
    }


def _totals(
    scores: Sequence[Mapping[str, Sequence[float]]], base: Mapping[str, Sequence[float]]
) -> tuple[float, float]:
    """Give per cent of facts right, and nats per answer token more than the base, averaged."""
    right = statistics.mean(100 * statistics.mean(score["right"]) for score in scores)
    nats = [math.fsum(score["nats"]) / math.fsum(score["tokens"]) for score in scores]
    return right, statistics.mean(nats) - math.fsum(base["nats"]) / math.fsum(base["tokens"])


def suppression_figure(cells: Sequence[Mapping[str, Any]], base: Mapping[str, Sequence[float]]) -> Any:
    """Plot nats lost against the share of nodes, a panel for each way of selecting."""
    with themed():
        figure = page(8.4, 3.6)
        for axes, over in zip(figure.subplots(1, 2, sharey=True), ("layer-balanced", "global"), strict=True):
            for name, label in _LABELS.items():
                points = [[_lost(c, name, base) for c in cells if (c["over"], c["q"]) == (over, q)] for q in SHARES]
                means = [statistics.mean(found) for found in points]
                style: dict[str, Any] = {"ls": "--"} if name == "random" else {}
                axes.plot(SHARES, means, marker="o", ms=5, lw=1.8, color=_COLOURS[name], label=label, **style)
                for q, found in zip(SHARES, points, strict=True):
                    axes.scatter([q] * len(found), found, s=9, color=_COLOURS[name], alpha=0.5, lw=0)
            axes.set_yscale("log")
            # The usual log labels are mathematics, which the theme turns off.
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_title("as many of each block" if over == "layer-balanced" else "of all blocks together")
            axes.set_xlabel("nodes switched off, %")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.grid(visible=True)
            bare(axes, ("left", "bottom"))
            if over == "layer-balanced":
                axes.set_ylabel("lost, nats per answer token")
                axes.legend(frameon=False, fontsize=9, labelcolor="linecolor")
        return finish(figure)


def _lost(found: Mapping[str, Any], name: str, base: Mapping[str, Sequence[float]]) -> float:
    scores = found[name] if name == "random" else [found[name]]
    return _totals(scores, base)[1]


_HEAD = """# LoKI's nodes on atlas: the numbers

Made by `python studies/loki.py` (part of `make study`). What they mean: [loki.md](loki.md). Atlas has {nodes} nodes in
4 blocks of 192. Nodes are attributed (first release's definition) over 256 of 400 questions, drawn with seeds 0 to 2,
and scored on 360 other facts, of which the base gets {right:.1f}% right at {nats:.4f} nats per answer token.

## Nodes switched off
Lost: nats per answer token over the base's; right: facts. Mean over three seeds (random: five draws each, or two of all
blocks). The last but one column: nats that S-H loses more than S-L, with the 95% interval over facts (pairs, seeds
averaged).

![What is lost when nodes are switched off](loki.png)
"""


def report(
    cells: Sequence[Mapping[str, Any]],
    base: Mapping[str, Sequence[float]],
    beside: Sequence[Mapping[str, Any]],
    agreement: Sequence[Mapping[str, Any]],
    where: Mapping[str, Any],
) -> str:
    """Write the page."""
    nats = math.fsum(base["nats"]) / math.fsum(base["tokens"])
    right = 100 * statistics.mean(base["right"])
    parts = [_HEAD.format(nodes=768, right=right, nats=nats)]
    for over, title in (("layer-balanced", "As many of each block"), ("global", "Of all blocks together")):
        columns = [f"{label}: lost | right, %" for label in _LABELS.values()]
        lines = [
            f"### {title}\n",
            f"| q | {' | '.join(columns)} | S-H loses more than S-L | in S-H and S-L |",
            "| --- |" + " ---: |" * 10,
        ]
        for q in SHARES:
            own = [c for c in cells if (c["over"], c["q"]) == (over, q)]
            texts = []
            for name in _LABELS:
                scores = [score for c in own for score in (c[name] if name == "random" else [c[name]])]
                correct, lost = _totals(scores, base)
                texts.append(f"{lost:.3f} | {correct:.1f}")
            common = statistics.mean(c["common"] for c in own)
            lines.append(f"| {q:g} | {' | '.join(texts)} | {_gap(own)} | {common:.0%} |")
        parts.append("\n".join(lines) + "\n")
    lines = ["Random nodes of the same blocks, as many of each as S-L takes of all blocks together:\n"]
    lines += ["| q | lost | right, % |", "| --- | ---: | ---: |"]
    for row in beside:
        correct, lost = _totals(row["scores"], base)
        lines.append(f"| {row['q']:g} | {lost:.3f} | {correct:.1f} |")
    parts.append("\n".join(lines) + "\n")
    rows = [f"| {name} | {', '.join(map(str, numbers))} |" for name, numbers in where["rows"].items()]
    parts.append(
        "## Where they lie\nOver all 400 questions: how many of each block a selection over all blocks takes.\n\n"
        "![Where the highest and lowest nodes lie](loki-nodes.png)\n\n"
        "| selection | blocks 0 to 3 |\n| --- | ---: |\n" + "\n".join(rows) + "\n"
    )
    titles = {
        "definitions": f"Definitions, over {DEFINED} questions",
        "texts": "Numbers of texts",
        "selections": "Selections, over all 400 questions",
    }
    parts.append("## Overlaps\nOf the 10% of rows that are selected (lowest, layer-balanced unless said otherwise).\n")
    for table, title in titles.items():
        rows = [f"| {r['name']} | {r['share']:.1%} | {r['chance']:.1%} |" for r in agreement if r["table"] == table]
        parts.append(f"### {title}\n\n| | common rows | by chance |\n| --- | ---: | ---: |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _gap(own: Sequence[Mapping[str, Any]]) -> str:
    """Average the seeds of each fact, so that facts are what is resampled."""
    tokens = [float(count) for count in own[0]["S-H"]["tokens"]]
    high, low = (
        [statistics.mean(values) for values in zip(*(c[name]["nats"] for c in own), strict=True)]
        for name in ("S-H", "S-L")
    )
    least, most = paired_interval(low, high, 0, weights=tokens)
    return f"{(math.fsum(high) - math.fsum(low)) / math.fsum(tokens):+.3f} [{least:+.3f}, {most:+.3f}]"


def _kept(output: Path, name: str, make: Callable[[], Any]) -> Any:
    path = output / "results" / f"{content_key(name)[:4]}-{name}.json"
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), ensure_ascii=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/loki"), Path(__file__).parents[1] / "docs")
