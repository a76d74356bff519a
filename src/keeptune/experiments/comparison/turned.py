"""Finished cells with a knob turned: scored as cells of their own, and written out where one is chosen.

Beside the cell, ``knobs/<knob>/`` has a record and the items of each benchmark, and ``knob.json``: the knob, the
weights that it was turned on, and why it could not be turned where it could not. The turned weights themselves are not
kept: they follow from the cell's and the knob, and :func:`write_turned` writes those that are chosen.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.adapter.export import BOUNDS
from keeptune.adapter.load import SIDECAR, load_adapter, refuse_foreign
from keeptune.adapter.probe import logits_of, random_probe
from keeptune.core.artefact import (
    atomic_directory,
    content_key,
    has_key,
    read_json,
    write_bytes,
    write_json,
    write_tensors,
)
from keeptune.core.errors import ArtefactError, ExportError, ModelError
from keeptune.evaluation.base_answers import KeptAnswers
from keeptune.evaluation.benchmark_data import data_fingerprint
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import AdapterPair, ModelPair, TwoModels
from keeptune.experiments.comparison.knobs import Knob, Layers, Scale
from keeptune.experiments.comparison.record import Cell
from keeptune.experiments.comparison.turning import interpolate, put_adapter, refusal, turned_adapter
from keeptune.model.blocks import head_of
from keeptune.model.pretrained import load_model
from keeptune.pipeline.job import Job
from keeptune.pipeline.scoring import find_result, load_pair, result_fingerprint

__all__ = ["KNOBS", "copy_result", "knob_cell", "knobs_stage", "write_turned"]

_log = logging.getLogger(__name__)
KNOBS = "knobs"
_OTHER = "Choose another cell."
_WEIGHTS = "adapter_model.safetensors"


def knob_cell(cell: Cell, knob: Knob) -> Cell:
    """Name the cell that a knob makes of another.

    Args:
        cell: A trained cell.
        knob: The knob.

    Returns:
        The new cell, with a label of its own and the status of the trained one.
    """
    return replace(
        cell,
        name=f"{cell.name}/{knob.slug}",
        label=f"{cell.label}, {knob.family}",
        of=cell.label,
        variant=knob.plain(),
        folder=cell.folder / KNOBS / knob.slug,
    )


def knobs_stage(job: Job, knobs: Sequence[Knob], *, kept: KeptAnswers | None = None) -> dict[str, str]:
    """Score the knobs of a finished run that are not scored yet.

    Args:
        job: The run's job.
        knobs: The knobs.
        kept: Where the base's answers are; None asks the base.

    Returns:
        Folder name of each knob that cannot be turned on this result to the reason.
    """
    folder = find_result(job.output)
    weights = result_fingerprint(folder)
    data = [data_fingerprint(benchmark) for benchmark in job.recipe.evaluate]
    bench: _Turner | None = None
    refused = {}
    for knob in knobs:
        place = job.output / KNOBS / knob.slug
        if why := _refused(place, weights):
            refused[knob.slug] = why
            continue
        missing = [
            (benchmark, key)
            for benchmark, of in zip(job.recipe.evaluate, data, strict=True)
            if not _scored(place, benchmark.name, key := _key(job, benchmark, of, weights, knob))
        ]
        if missing:
            bench = bench or _turner(job, folder)
            why = bench.refusal(knob)
            if not why:
                pair = bench.turn(knob)
                for benchmark, key in missing:
                    _score(job, pair, benchmark, key, place, weights, kept)
        if why:
            _log.warning("%s: %s is left out: %s", job.output.name, knob.slug, why)
            refused[knob.slug] = why
        names = [benchmark.name for benchmark in job.recipe.evaluate]
        head = {"variant": knob.plain(), "weights": weights, "benchmarks": names, "message": why}
        write_json(place / "knob.json", head)
    return refused


def _refused(place: Path, weights: str) -> str:
    """Read why a knob could not be turned on these weights; empty where that was not tried."""
    try:
        head = read_json(place / "knob.json")
        return str(head["message"]) if head["weights"] == weights else ""
    except (ArtefactError, KeyError, TypeError):
        return ""


def _key(job: Job, benchmark: Any, data: str, weights: str, knob: Knob) -> str:
    return content_key([benchmark, data, weights, job.base_fingerprint, job.seed, knob.plain()])


def _scored(place: Path, name: str, key: str) -> bool:
    return has_key(place / f"{name}.json", key) and (place / f"{name}.items.jsonl").is_file()


def _score(
    job: Job, pair: ModelPair, benchmark: Any, key: str, place: Path, weights: str, kept: KeptAnswers | None
) -> None:
    started = time.perf_counter()
    result = evaluate(pair, job.tokenizer, benchmark, Path(), seed=job.seed, kept=kept)
    write_bytes(place / f"{benchmark.name}.items.jsonl", result.to_jsonl().encode())
    record = {"key": key, "weights": weights, "benchmark": benchmark, "seed": job.seed}
    seconds = time.perf_counter() - started
    write_json(place / f"{benchmark.name}.json", record | {"seconds": seconds, "summary": result.summary()})


@dataclass(frozen=True)
class _Turner:
    """A loaded result on which one knob after the other is turned.

    Args:
        refusal: Says why a knob cannot be turned.
        turn: Turns one, from the result as trained, and gives the models before and after.
    """

    refusal: Callable[[Knob], str]
    turn: Callable[[Knob], ModelPair]


def _turner(job: Job, folder: Path) -> _Turner:
    pair = load_pair(job, folder)
    if isinstance(pair, AdapterPair):
        return _adapter_turner(pair.peft_model, load_file(folder / _WEIGHTS))
    assert isinstance(pair, TwoModels)
    return _model_turner(pair)


def _adapter_turner(wrapped: PeftModel, tensors: Mapping[str, Tensor]) -> _Turner:
    def turn(knob: Knob) -> ModelPair:
        put_adapter(wrapped, turned_adapter(wrapped, tensors, knob))
        return AdapterPair(wrapped)

    return _Turner(lambda knob: refusal(knob, tensors, wrapped.peft_config["default"]), turn)


def _model_turner(pair: TwoModels) -> _Turner:
    tuned = {name: weight.detach().clone() for name, weight in pair.tuned.named_parameters()}

    def turn(knob: Knob) -> ModelPair:
        assert isinstance(knob, Scale | Layers)
        interpolate(pair.tuned, pair.base, tuned, knob, head_of(pair.tuned))
        return pair

    return _Turner(lambda knob: refusal(knob, None), turn)


def write_turned(job: Job, knob: Knob, output: Path) -> Path:
    """Write a run's result with a knob turned, and check it on a freshly loaded base.

    Args:
        job: The run's job.
        knob: The knob.
        output: The folder; it appears whole or not at all.

    Returns:
        The folder.

    Raises:
        ModelError: The knob cannot be turned on this result.
        ExportError: What was written does not reproduce the turned model, or the folder holds something else.
    """
    folder = find_result(job.output)
    refuse_foreign(output)
    bench = _turner(job, folder)
    if why := bench.refusal(knob):
        raise ModelError(f"knob {knob.slug}", got=why, wanted="a result that it can be turned on", next_step=_OTHER)
    pair = bench.turn(knob)
    with pair.after() as model:
        probe = random_probe(model)
        wanted = logits_of(model, probe)
    with atomic_directory(output) as fresh:
        copy_result(folder, fresh, output, weights=False)
        again = _written(job, pair, folder, fresh, knob)
        found = logits_of(again, probe)
        gap = float((found - wanted).abs().max())
        relative, bound = gap / max(float(wanted.abs().max()), 1e-30), BOUNDS[again.dtype]
        if not relative <= bound:
            raise ExportError(
                f"export {output}",
                got=f"logits that differ from the turned model by {relative:.2e} (relative)",
                wanted=f"at most {bound:.0e}",
                next_step="Nothing was written; please report this.",
            )
        sidecar = read_json(fresh / SIDECAR)
        export = sidecar["export"] | {"gap": gap, "relative_gap": relative, "bound": bound}
        write_json(fresh / SIDECAR, sidecar | {"export": export, "variant": knob.plain()})
    return output


def copy_result(folder: Path, fresh: Path, output: Path, *, weights: bool = True) -> None:
    """Copy an exported result; what its texts say of its place is changed to the new one.

    Args:
        folder: The result.
        fresh: Where the files go.
        output: Where they will be in the end.
        weights: Copy the weights too.
    """
    skipped = ["export.json", *([] if weights else ["*.safetensors", "*.safetensors.index.json"])]
    shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns(*skipped), dirs_exist_ok=True)
    was = read_json(folder / SIDECAR)["export"]["folder"]
    for name in (SIDECAR, "README.md"):
        text = (fresh / name).read_text(encoding="utf-8")
        write_bytes(fresh / name, text.replace(was, str(output)).encode())


def _written(job: Job, pair: ModelPair, folder: Path, fresh: Path, knob: Knob) -> Any:
    """Write the turned weights, and load them as a user will."""
    if isinstance(pair, AdapterPair):
        names = load_file(folder / _WEIGHTS)
        tensors = turned_adapter(pair.peft_model, names, knob)
        write_tensors(fresh / _WEIGHTS, tensors, {"format": "pt"})
        return load_adapter(job.base(), fresh)
    assert isinstance(pair, TwoModels)
    model: PreTrainedModel = pair.tuned
    model.save_pretrained(fresh)
    return load_model(str(fresh), dtype=job.recipe.dtype, device=job.device, head=job.head)
