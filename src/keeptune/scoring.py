"""The evaluate stage: the exported adapter, as a user will load it, scored on and off on the same items."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from peft import PeftModel

from keeptune.adapter.export import check_base
from keeptune.core.artefact import content_key, file_fingerprint, read_json, write_bytes, write_json
from keeptune.core.errors import ArtefactError, ModelError
from keeptune.evaluate.harness import evaluate
from keeptune.evaluate.pairs import AdapterPair, ModelPair, TwoModels
from keeptune.evaluate.tasks import Benchmark
from keeptune.job import Job
from keeptune.model.load import load_model

__all__ = ["evaluate_stage", "load_pair"]

_log = logging.getLogger(__name__)


def evaluate_stage(job: Job, adapter: Path | None = None) -> None:
    """Score every benchmark that is not scored yet; results are kept one by one.

    Args:
        job: The job.
        adapter: An adapter or merged model to score; None takes the run's own.
    """
    folder = _find_result(job) if adapter is None else adapter
    pair: ModelPair | None = None
    for benchmark in job.recipe.evaluate:
        key = _result_key(benchmark, folder)
        target = job.output / "evaluation" / f"{benchmark.name}.json"
        if _done(target, key):
            _log.info("evaluate: %s taken from %s", benchmark.name, target)
            continue
        pair = pair or load_pair(job, folder)
        started = time.perf_counter()
        result = evaluate(pair, job.tokenizer, benchmark, Path(), seed=job.seed)
        write_bytes(target.with_suffix(".items.jsonl"), result.to_jsonl().encode())
        seconds = time.perf_counter() - started
        write_json(target, {"key": key, "seconds": seconds, "seed": job.seed, "summary": result.summary()})


def load_pair(job: Job, folder: Path) -> ModelPair:
    """Load a result on a fresh base, by stock PEFT or as a whole model.

    Args:
        job: The job.
        folder: An adapter, or a merged model.

    Returns:
        The model before and after.
    """
    if (folder / "adapter_config.json").is_file():
        check_base(folder, job.base_fingerprint)
        return AdapterPair(PeftModel.from_pretrained(job.base(), str(folder)))
    return TwoModels(job.base(), load_model(str(folder), dtype=job.recipe.dtype, device=job.device))


def _find_result(job: Job) -> Path:
    for name in ("adapter", "merged"):
        if (job.output / name / "export.json").is_file():
            return job.output / name
    raise ModelError(
        f"evaluate {job.output}",
        got="no exported adapter",
        wanted="a run that was trained and exported",
        next_step="Run `keeptune export` with the same recipe first, or give --adapter.",
    )


def _result_key(benchmark: Benchmark, folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    return content_key([benchmark, file_fingerprint([Path(benchmark.file)]), file_fingerprint(weights)])


def _done(path: Path, key: str) -> bool:
    try:
        return bool(read_json(path)["key"] == key) and path.with_suffix(".items.jsonl").is_file()
    except (ArtefactError, KeyError, TypeError):
        return False
