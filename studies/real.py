"""What methods forget on real language models: cells of (model, task, entry, seed), one after the other.

    python -m studies.real DATA --models FOLDER [--work runs/real] [--out docs/results/real] [--limit N]
    python -m studies.real DATA --models FOLDER --instructions     # IFEval of some of them: OUT/ifeval.jsonl
    python -m studies.real --tables [--out docs/results/real]      # OUT.md and OUT/real.png, from the records alone

FOLDER has the models that studies/models.py writes. A finished cell is a line of OUT/cells.jsonl, which is committed;
started again, the driver does what is missing, in the order of :func:`schedule`. Weights stay in the work folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import logging
import resource
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import keeptune
from keeptune.core.artefact import content_key, read_json, write_json
from keeptune.core.errors import KeeptuneError
from keeptune.evaluation.model_pairs import KeptAnswers
from keeptune.experiments.posthoc_variants import VARIANTS, Variant, score_variants
from keeptune.methods.base import methods
from keeptune.pipeline.export import export_stage
from keeptune.pipeline.run import plan_stage, start
from keeptune.pipeline.scoring import evaluate_stage, result_fingerprint
from keeptune.pipeline.training import train_stage
from keeptune.posthoc.repair_files import Files, read_files
from keeptune.recipe.schema import make_recipe
from studies.cells import read_rows
from studies.models import has_bfloat16
from studies.real_data import Row, Sizes, held_out_texts, instructions, kept_benchmarks, task_of, write_data
from studies.real_tables import cell_of, write_page

VERSION = 2  # of what a cell does: raise it with every change of that, and all cells are run anew
RATE = 1e-3
Cell = tuple[str, str, str, int]  # model, task, entry, seed


def lora(rank: int = 8, name: str = "lora", **options: Any) -> Row:
    """A section ``method``."""
    return {"name": name, "rank": rank, **({"alpha": 2 * rank} if name == "lora" else {}), **options}


@dataclass(frozen=True)
class Entry:
    """A row of the tables: what it adds to a recipe, or the entry ``parent`` whose result it scales or repairs.

    ``rate`` is the peak learning rate, ``knowledge`` is ``"generated"``, ``"general"`` or none, ``steps`` a share.
    """

    method: Row = field(default_factory=lora)
    changes: Row = field(default_factory=dict)
    rate: float = RATE
    knowledge: str | None = None
    steps: float = 1.0
    parent: str | None = None
    variant: Variant | None = None
    repair: Row | None = None


def entries() -> dict[str, Entry]:
    """All entries; what stands before the comma of a label is its family."""
    base, own = f"lora, {RATE:g}", "generated"
    found = {
        **{f"lora, {rate:g}": Entry(rate=rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)},
        **{f"lora scaled, {s:g}": Entry(parent=base, variant=Variant("scale", s)) for s in (0.25, 0.5, 0.75)},
        **{f"fapm, {s:g}": Entry(parent=base, variant=Variant("pruned", s)) for s in (0.5, 0.9)},
        "lora rank 2": Entry(lora(2)),
        "lora half the steps": Entry(steps=0.5),
        **{f"repair, {mu:g}": Entry(parent=base, repair={"mu": mu}) for mu in (0.3, 1.0)},
        **{f"full, {rate:g}": Entry({"name": "full"}, {"anchor": "twin"}, rate) for rate in (1e-5, 5e-5)},
        **{f"loss {loss}": Entry(changes={"task": {"loss": loss}}) for loss in ("dft", "eaft", "asft")},
        "loss sdft": Entry(
            changes={"task": {"loss": {"name": "sdft", "temperature": 0.0, "max_completion_length": 32}}}
        ),
        "loss stm": Entry(changes={"task": {"stm_threshold": 2.5}}),
        **{f"keep, {n:g}": Entry({"name": "keep", "nats": n}, knowledge=own) for n in (0.0025, 0.005, 0.02)},
        "keep, defaults": Entry({"name": "keep"}, knowledge=own),
        **{f"keep, rate {rate:g}": Entry({"name": "keep"}, rate=rate, knowledge=own) for rate in (3e-4, 3e-3)},
        "keep, one text": Entry({"name": "keep", "batch_size": 1}, knowledge=own),
        "keep general": Entry({"name": "keep"}, knowledge="general"),
        "ewc-lora": Entry(changes={"penalties": [{"name": "ewc"}]}, knowledge=own),
        "loki": Entry({"name": "loki"}, knowledge=own),
    }
    for name in ("milora", "pissa", "dora", "l2-lora", "farss", "oplora"):
        found[name] = Entry(lora(name=name))
    for boundary in (0, 4, 15):  # a quarter of the depth unless it is said: Fig. 5
        found[f"farss, boundary {boundary}"] = Entry(lora(name="farss", boundary=boundary))
    for name in ("corda", "lalora"):
        found[name] = Entry(lora(name=name), knowledge=own)
    for variant in ("v1", "v2"):
        found[f"lora-null {variant}"] = Entry(lora(name="lora-null", variant=variant), knowledge=own)
    for kind in (own, "general"):
        for share in (0.1, 0.3):
            found[f"replay {kind}, {share:g}"] = Entry(changes={"replay": share}, knowledge=kind)
        for strength in (0.3, 1.0, 3.0):
            kl = {"penalties": [{"name": "kl", "strength": strength, "batch_size": 4}]}
            found[f"kl {kind}, {strength:g}"] = Entry(changes=kl, knowledge=kind)
    for strength in (1.0, 3.0, 10.0):  # at keep's cost: what it chooses to measure on, and when
        kl = {"penalties": [{"name": "kl", "strength": strength, "every": None, "batch_size": None}]}
        found[f"kl sparse, {strength:g}"] = Entry(changes=kl, knowledge=own)
    return found


def schedule() -> Iterator[Cell]:
    """The cells in an order in which wherever it stops, what is there is a table."""
    rates = [f"lora, {rate:g}" for rate in (1e-3, 3e-4, 3e-3)]
    held = ["keep, defaults", "kl generated, 1", "lora-null v1", "replay generated, 0.3"]
    sparse = ["kl sparse, 1", "kl sparse, 3", "kl sparse, 10"]
    starts = ["oplora", "corda", "milora", "l2-lora", "lalora", "farss", "ewc-lora"]
    cells = [("smollm2", "labels", name) for name in [*rates[:2], *held[:2], "lora scaled, 0.5", *held[2:]]]
    cells += [("gemma3", "labels", name) for name in (rates[0], *held[:2])]
    cells += [("smollm2", task, name) for task in ("gsm8k", "calls") for name in (rates[0], held[0])]
    cells += [("smollm2", "labels", name) for name in [rates[2], *starts]]
    cells += [("smollm2", task, name) for task in ("labels", "calls", "gsm8k") for name in [*sparse, *held[1:]]]
    cells += [("smollm2", "labels", name) for name in entries()]
    yield from ((*cell, 0) for cell in dict.fromkeys(cells))


def instructed() -> Iterator[Cell]:
    """The cells whose answers to instructions are scored as well: an answer takes longer than a label."""
    ways = [f"lora, {RATE:g}", "keep, defaults", "lora scaled, 0.5", "lora-null v1", "corda", "kl generated, 1"]
    yield from (("smollm2", "labels", name, 0) for name in [*ways, "replay generated, 0.3"])
    yield from (("smollm2", "calls", name, 0) for name in ways[:2])


@dataclass(frozen=True)
class Study:
    """A study: the folders of data, models, runs and records, how much is scored and trained, and whether IFEval is."""

    data: Path
    models: Path
    work: Path
    out: Path
    sizes: Sizes = field(default_factory=Sizes)
    instructions: bool = False

    @property
    def records(self) -> Path:
        """The file of the records."""
        return self.out / ("ifeval.jsonl" if self.instructions else "cells.jsonl")

    @property
    def done(self) -> set[Cell]:
        """The cells that have a record of this version."""
        rows = [row for row in read_rows(self.records) if row["v"] == VERSION] if self.records.is_file() else []
        return {*map(cell_of, rows)}

    def recipe(self, cell: Cell) -> Row:
        """The recipe of a cell, or of the one that it starts from."""
        model, task, name, seed = cell
        name = entries()[name].parent or name
        entry, sizes, files = entries()[name], self.sizes, self.work / "data"
        section, batch, learned = task_of(task, files, sizes)
        changes = dict(entry.changes)
        generated = {"generate": sizes.knowledge}
        written = {"knowledge": generated if entry.knowledge == "generated" else entry.knowledge}
        slug = "-".join((model, task, name.replace(",", "").replace(" ", "_"), str(seed)))
        scored = [learned, *kept_benchmarks(self.data, files, self.work / model, sizes)]
        train = {"learning_rate": entry.rate, "max_steps": round(sizes.steps * entry.steps), "max_length": 160}
        return {
            "model": str(self.models / model),
            **({} if has_bfloat16() else {"dtype": "float32"}),
            "method": entry.method,
            **(written if entry.knowledge else {}),
            "task": section | changes.pop("task", {}),
            "train": {**train, "per_device_train_batch_size": batch, "seed": seed, "save_strategy": "no"},
            "evaluate": [instructions(files, sizes)] if self.instructions else scored,
            "output": str(self.work / "runs" / slug),
            "store": str(self.work / "store"),
            "device": "cpu",
            **changes,
        }


def run_cell(study: Study, cell: Cell) -> Row:
    """Runs a cell, or what is left of it, and returns its record."""
    entry, seconds, values = entries()[cell[2]], dict[str, float](), study.recipe(cell)
    job = start(make_recipe(values, folder=Path(), where=f"study {cell[2]}"))
    with timed(seconds, "plan"):
        plan = plan_stage(job)
    with timed(seconds, "train"):
        train_stage(job, plan)
    took = job.output / "seconds.json"  # of the first time, where a killed cell is gone on with
    seconds = read_json(took) if took.is_file() else seconds
    write_json(took, {key: seconds[key] for key in ("plan", "train")})
    export_stage(job, plan)
    trained = read_json(job.output / "trained" / "train.json")
    kept = KeptAnswers(study.work / "base", content_key([job.base_fingerprint, "cpu"]))
    folder = job.output / "evaluation"
    if entry.repair is not None:
        with timed(seconds, "repair"):
            repaired = repaired_adapter(job.output, entry.repair, study.work / "store")
        folder = job.output / f"evaluation-{result_fingerprint(repaired)[:12]}"
    with timed(seconds, "score"):
        if entry.variant is not None:
            score_variants(job, [entry.variant], kept=kept)
            folder = job.output / VARIANTS / entry.variant.slug
        else:
            evaluate_stage(job, None if entry.repair is None else repaired, kept=kept)
    if (job.output / "merged").is_dir():  # a whole model; no cell starts from one
        for name in ("merged", "trained", "plan"):
            shutil.rmtree(job.output / name, ignore_errors=True)
    named = ("method", "penalties", "replay", "knowledge", "train", "dtype")
    about = {key: values[key] for key in named if key in values}
    last = {key: value for key, value in trained["loss"][-1].items() if key.startswith(("loss", "held_out", "step"))}
    return {
        **{"v": VERSION, "model": cell[0], "task": cell[1], "entry": cell[2], "seed": cell[3]},
        "scores": {one.name: scores_of(folder, one.name) for one in job.recipe.evaluate},
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        **{"recipe": about, "trained": trained["trained_parameters"], "last": last, "notes": trained["notes"]},
        "git": head(),
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),  # of another, seconds are of another machine
    }


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes the processor seconds that a block takes in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds[name] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def repaired_adapter(run: Path, options: Row, store: Path) -> Path:
    """Repairs the adapter of a run with the run's own data and the base's own texts, unless that is done."""
    folder = run.with_name(f"{run.name}-repaired-{'-'.join(map(str, options.values()))}")
    if not (folder / "adapter_config.json").is_file():
        data = read_files(str(run), Files())
        keeptune.repair(
            run, folder, keeptune.Repair(**options, store=str(store)), knowledge=data.knowledge, task=data.task
        )
    return folder


def scores_of(folder: Path, name: str) -> Row:
    """A benchmark: n, before, after, the interval of the difference, KL to the base, and what was right as bits."""
    found = read_json(folder / f"{name}.json")["summary"]
    scores: Row = {key: found[key] for key in ("n", "before", "after")}
    scores["interval"] = [round(end, 5) for end in found["interval"]]
    if found["kl_to_base"] is not None:
        scores["kl"] = round(found["kl_to_base"], 6)
    if found["metric"] != "cross_entropy":
        right = "".join("1" if row["after"] else "0" for row in read_rows(folder / f"{name}.items.jsonl"))
        scores["bits"] = f"{int(right, 2):x}"
    return scores


def append(path: Path, row: Row) -> None:
    """Writes a line at a file's end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def head() -> str:
    """The commit that is checked out here; nothing in a copy without git."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def run_study(study: Study, cells: Iterable[Cell], limit: int | None = None) -> int:
    """Runs the cells that have no record, ``limit`` at most, and writes a line for each at once; returns how many.

    A cell that fails is told, and tried again with another commit. Those of models and methods not here are left out.
    """
    done, run, failed = study.done, 0, study.work / "failed.jsonl"
    done |= {tuple(row["cell"]) for row in read_rows(failed) if row["git"] == head()} if failed.is_file() else set()
    write_data(study.data, study.work / "data", study.sizes)
    for cell in cells:
        here = (study.models / cell[0]).is_dir() and entries()[cell[2]].method["name"] in methods()
        if cell in done or not here or run == limit:
            continue
        run += 1
        held_out_texts(study.models / cell[0], study.work / cell[0], study.work / "store", study.sizes)
        try:
            record = run_cell(study, cell)
        except KeeptuneError as error:
            print(f"{cell}: {error}", flush=True)
            append(failed, {"cell": cell, "git": head(), "error": str(error)})
            continue
        append(study.records, record)
        told = ", ".join(f"{name} {one['before']:.3f} > {one['after']:.3f}" for name, one in record["scores"].items())
        print(f"{cell}: {told}; {record['seconds']}", flush=True)
        gc.collect()
    return run


def main() -> None:
    """Runs what is missing, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="the whole files of which assets/data has slices")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--work", type=Path, default=Path("runs/real"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/real"))
    parser.add_argument("--limit", type=int, help="cells at most")
    parser.add_argument("--instructions", action="store_true", help="score IFEval, which takes longer, of some cells")
    parser.add_argument("--tables", action="store_true", help="write the page from the records")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    if given.tables:
        write_page(given.out)
    elif given.data is None:
        parser.error("DATA is missing")
    else:
        study = Study(given.data, given.models, given.work, given.out, instructions=given.instructions)
        run_study(study, instructed() if given.instructions else schedule(), given.limit)


if __name__ == "__main__":
    main()
