"""The evaluate stage: the exported adapter, as a user will load it, scored on and off on the same items."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from keeptune.adapter.load import check_base, load_adapter
from keeptune.core.artefact import EXPORT, checked, content_key, file_fingerprint, write_text
from keeptune.core.errors import ModelError
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.processes import by_first, is_first
from keeptune.evaluation.benchmark_data import data_fingerprint, engine_of
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import AdapterPair, KeptAnswers, ModelPair, TwoModels
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.job import Job

_log = logging.getLogger(__name__)


@out_of_memory("evaluate")
def evaluate_stage(job: Job, adapter: Path | None = None, *, kept: KeptAnswers | None = None) -> list[dict[str, Any]]:
    """Scores every benchmark that is not scored yet; results are kept one by one.

    Args:
        job: The run.
        adapter: An adapter or merged model to score; None takes the run's own. Another's results go to
            ``evaluation-<fingerprint>`` in the run folder and never mix with the run's own.
        kept: The base's answers from earlier runs; None scores the base anew.

    Returns:
        One summary per benchmark.
    """
    folder = by_first(lambda: find_result(job.output) if adapter is None else checked(adapter))
    weights = by_first(lambda: result_fingerprint(folder))
    results = job.output / ("evaluation" if adapter is None else f"evaluation-{weights[:12]}")
    pair = cache(lambda: load_pair(job, folder))  # not loaded where every benchmark is scored
    merged = _is_into_original(job, folder)
    kept, variant = (None, {"before": job.original}) if merged else (kept, None)
    scores = [score(job, one, pair, results, weights, kept, variant)["summary"] for one in job.recipe.evaluate]
    if merged:
        _log.info("evaluate: the result is merged into the original, and before and after are scores of the original")
    elif job.recipe.export.check_original:
        original, adapted = job.original, cache(lambda: AdapterPair(load_adapter(job.load_original(), folder)))
        place = results.with_name(f"{results.name}-original")
        for one in job.recipe.evaluate:
            found = score(job, one, adapted, place, weights, None, {"on": original})["summary"]
            told = one.name, original, found["before"], found["after"]
            _log.info("%s on the original %s: %.3f before, %.3f after", *told)
    return scores


def _is_into_original(job: Job, folder: Path) -> bool:
    """Whether a result is a whole model of floats of a quantised base: its base is the original."""
    return not (folder / "adapter_config.json").is_file() and job.original is not None


def score(
    job: Job,
    benchmark: Benchmark,
    pair: Callable[[], ModelPair],
    results: Path,
    weights: str,
    kept: KeptAnswers | None,
    variant: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores one benchmark, unless that is done, and returns the record.

    Args:
        job: The run.
        benchmark: One of its recipe, or another.
        pair: Loads the models.
        results: The folder of the record and of the items' records.
        weights: Fingerprint of the tuned weights.
        kept: The base's answers from earlier runs; None scores the base anew.
        variant: The post-hoc variant of the weights that is scored, if it is one.
    """
    own = [] if variant is None else [variant]
    data = data_fingerprint(benchmark, job.tokenizer)
    key = content_key([benchmark, data, weights, job.base_fingerprint, job.seed, *own])
    stored = Stored(f"evaluate {benchmark.name}", results / f"{benchmark.name}.json", key)
    items = stored.path.with_suffix(".items.jsonl")

    def compute() -> dict[str, Any]:
        models = pair()
        started = time.perf_counter()
        result = evaluate(models, job.tokenizer, benchmark, Path(), seed=job.seed, kept=kept)
        if is_first():
            write_text(items, result.to_jsonl())
        return {
            "weights": weights,
            "benchmark": benchmark,
            "engine": engine_of(benchmark),
            "seed": job.seed,
            "seconds": time.perf_counter() - started,
            "summary": result.summary(),
        }

    return stored.get(compute, files=[items.name])


def load_pair(job: Job, folder: Path) -> AdapterPair | TwoModels:
    """Loads a result, an adapter or a merged model, with a fresh base: the model before and after."""
    if (folder / "adapter_config.json").is_file():
        check_base(folder, job.base_fingerprint, None if job.head is None else job.head.labels)
        return AdapterPair(load_adapter(job.base(), folder))
    options = LoadOptions(dtype=job.recipe.dtype, device=job.device, head=job.head)
    base = job.load_original if _is_into_original(job, folder) else job.base
    return TwoModels(base(), load_model(str(folder), options))


def find_result(output: Path) -> Path:
    """Returns what a run exported: its ``adapter`` or ``merged`` folder, the newer one if there are both.

    Raises:
        ModelError: Nothing was exported yet.
        ArtefactError: It is damaged, or was changed.
    """
    folders = [output / name for name in ("adapter", "merged") if (output / name / EXPORT).is_file()]
    if not folders:
        raise ModelError(
            f"run {output}",
            got="no exported adapter",
            wanted="a run that was trained and exported",
            next_step="Run `keeptune export` with its recipe first, or set --adapter.",
        )
    found = max(folders, key=lambda folder: (folder / EXPORT).stat().st_mtime)
    return checked(found)


def result_fingerprint(folder: Path) -> str:
    """Returns the fingerprint of a result's weights; of another origin, also of how they are used.

    Raises:
        ModelError: There are no safetensors weights in it.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"adapter {folder}",
            got="no safetensors weights" if folder.is_dir() else "no such folder",
            wanted="an adapter folder of PEFT, or a whole model",
            next_step="Check the path.",
        )
    config = folder / "adapter_config.json"  # whose scale may change; where keeptune exported it, it is checked
    return file_fingerprint(weights + [config] * (config.is_file() and not (folder / EXPORT).is_file()))
