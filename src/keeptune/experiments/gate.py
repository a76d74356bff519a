"""keeptune check: a trained model against its base on a suite of benchmarks, with a limit on what each may lose.

What was lost of a benchmark is before - after for shares and after - before for nats per token, over its items. It is
too much where the estimate of it is above the limit:

    mean     the loss itself: the default, as a release should not depend on how few items a suite has
    lower    the lower end of its 95% interval: too much is lost for certain
    upper    the upper end: it is not certain that so little is lost
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from keeptune.adapter.load import check_base, load_adapter
from keeptune.core.artefact import canonical_json
from keeptune.core.errors import RecipeError, need_known
from keeptune.core.intervals import lower_is_better
from keeptune.core.out_of_memory import out_of_memory
from keeptune.evaluation.benchmark_data import data_fingerprint
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.items import load_items
from keeptune.evaluation.model_pairs import AdapterPair, ModelPair, Side, TwoModels
from keeptune.evaluation.results import BenchmarkResult
from keeptune.evaluation.served import Server, score_served
from keeptune.experiments.choice import limits_of
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import load_tokenizer
from keeptune.pipeline.machine import device_named
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.recipe.schema import load_suite

_log = logging.getLogger(__name__)
Bound = Literal["mean", "lower", "upper"]


@out_of_memory("evaluate")
def check(
    adapter: str,
    suite: Path | str,
    max_loss: float | Mapping[str, float] = 0.01,
    *,
    base: str | None = None,
    estimate: Bound = "mean",
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Scores a trained model and its base on the same items of each benchmark.

    Args:
        adapter: Any PEFT adapter, a run folder, or with ``base`` a whole model.
        suite: A YAML file with an ``evaluate`` list as a recipe has it; a recipe is one.
        max_loss: The most that each benchmark may lose, a share or nats per token; or benchmark to number for some.
        base: Path or hub id; None takes what the adapter names.
        estimate: What is held against the limit: ``"mean"``, ``"lower"`` or ``"upper"`` end of the interval.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        seed: Of the bootstrap intervals; nothing else is random.

    Returns:
        ``passed``, and of each benchmark its summary with ``loss``, ``loss_interval``, ``limit`` and ``lost``.

    Raises:
        RecipeError: The suite is missing, empty or wrong, or a limit is of none of its benchmarks.
        ModelError: The adapter or its base cannot be loaded, or do not belong together.
        DataError: A benchmark cannot be read.
    """
    benchmarks = load_suite(suite)
    need_known(estimate, get_args(Bound), "--estimate", "one of them")
    names = [benchmark.name for benchmark in benchmarks]
    limits = limits_of(max_loss, names, names, "a benchmark of the suite")
    trained = TrainedModel.of(adapter, base=base, device=device_named(device))
    tokenizer = trained.load_tokenizer()
    for benchmark in benchmarks:  # before a model is loaded
        if isinstance(benchmark, FileBenchmark):
            load_items(benchmark, Path())
        data_fingerprint(benchmark, tokenizer)
    pair = _pair(trained)
    rows = []
    for benchmark in benchmarks:
        result = evaluate(pair, tokenizer, benchmark, Path(), seed=seed)
        (loss, ends), limit = _loss(result), limits.get(benchmark.name)
        lost = limit is not None and {"mean": loss, "lower": ends[0], "upper": ends[1]}[estimate] > limit
        judged = {"loss": loss, "loss_interval": ends, "limit": limit, "lost": lost}
        rows.append(result.summary() | judged)
        _log.info("check %s: %.4f before, %.4f after", result.name, result.before, result.after)
    record = {
        "adapter": str(trained.folder),
        "base": trained.base,
        "suite": str(suite),
        "estimate": estimate,
        "passed": not any(row["lost"] for row in rows),
        "benchmarks": rows,
    }
    return dict(json.loads(canonical_json(record)))


def _pair(trained: TrainedModel) -> ModelPair:
    base = trained.load_base()
    if not trained.is_adapter:
        return TwoModels(base, trained.load_tuned())
    check_base(trained.folder, body_fingerprint(base), None if trained.head is None else trained.head.labels)
    model = load_adapter(base, trained.folder)
    if getattr(model.active_peft_config, "bias", "none") == "none":
        return AdapterPair(model)
    return TwoModels(trained.load_base(), model.get_base_model().eval())  # its biases cannot be switched off


def _loss(result: BenchmarkResult) -> tuple[float, list[float]]:
    """Returns what was lost of a benchmark, and its 95% interval."""
    sign = 1.0 if lower_is_better(result.metric) else -1.0  # 0 has no sign
    return sign * (result.after - result.before) + 0.0, sorted(sign * end + 0.0 for end in result.interval)


def compare_served(
    url: str,
    base_url: str,
    suite: Path | str,
    *,
    model: str | None = None,
    base_model: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores two running OpenAI-compatible servers on the same items, through lm-eval's API models.

    Args:
        url: Address of the server of the tuned model.
        base_url: Address of the server of the base; the same one may serve both.
        suite: A YAML file with an ``evaluate`` list as a recipe has it; a recipe is one.
        model: The tuned model's name at its server; None takes the only one there.
        base_model: The base's.
        tokenizer: Folder or hub id of the tokenizer of both; None takes the base's name.
        seed: Of the bootstrap intervals.

    Returns:
        Of each benchmark its summary with ``loss`` and ``loss_interval``, and which servers answered.

    Raises:
        RecipeError: The suite is wrong, or a benchmark in it is of a kind that servers do not answer.
        ModelError: A server does not answer, has other tokens, or gives no log-probabilities where they are needed.
    """
    benchmarks = load_suite(suite)
    servers: dict[Side, Server] = {"before": Server.at(base_url, base_model), "after": Server.at(url, model)}
    if servers["before"] == servers["after"]:
        got, step = f"{servers['after'].model} at {url} twice", "Name the models with --model and --base-model."
        raise RecipeError("--base-url", got=got, wanted="the tuned model and its base", next_step=step)
    own = load_tokenizer(tokenizer or servers["before"].model)
    rows = []
    for benchmark in benchmarks:
        result = score_served(servers, own, benchmark, seed=seed)
        loss, ends = _loss(result)
        rows.append(result.summary() | {"loss": loss, "loss_interval": ends})
    asked: dict[str, Any] = {side: {"url": one.url, "model": one.model} for side, one in servers.items()}
    return dict(json.loads(canonical_json(asked | {"suite": str(suite), "benchmarks": rows})))
