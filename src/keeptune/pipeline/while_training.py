"""Benchmarks while training: those of the recipe, scored with the model as it is and with the base."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.intervals import lower_is_better
from keeptune.core.plan import Plan
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import KeptAnswers, ModelPair, TwoModels
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.training.evaluations import FORGETTING, LEARNED
from keeptune.training.output_passes import at_start

_BESIDE = ("modules_to_save", "trainable_token_indices")


@dataclass(frozen=True)
class InTraining:
    """An installed model in training: "before" is the model with the factors that it started from."""

    model: PeftModel
    plan: Plan

    @contextmanager
    def before(self) -> Iterator[PreTrainedModel]:
        """The transformers model inside, as it started."""
        with at_start(self.model, self.plan):
            yield self.model.get_base_model()

    def after(self) -> Any:
        """The transformers model inside, as it is."""
        return nullcontext(self.model.get_base_model())


def scores(
    tuned: Any, plan: Plan, tokenizer: Any, benchmarks: Sequence[Benchmark], *, base: Callable[[], Any], folder: Path
) -> Callable[[], dict[str, float]]:
    """Returns a function that scores a model in training; the base's answers are kept in a folder."""
    inner = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned
    kept = KeptAnswers(folder / "base-answers", content_key([plan.provenance, str(inner.device), str(inner.dtype)]))

    @cache
    def pair() -> ModelPair:
        alone = inner is not tuned and not any(map(plan.peft.get, _BESIDE))
        return InTraining(tuned, plan) if alone else TwoModels(base(), inner)

    return lambda: metrics_of([evaluate(pair(), tokenizer, one, Path(), kept=kept) for one in benchmarks])


def metrics_of(results: Sequence[BenchmarkResult]) -> dict[str, float]:
    """Returns the metrics of an evaluation: each benchmark's score and KL to the base, and what they come to.

    ``eval_forgetting`` is ``1 - K``; ``eval_learned`` the mean score of the task benchmarks that are shares, else of
    the others in nats, negative, so that more is better.
    """
    metrics = {f"eval_{one.name}": one.after for one in results}
    metrics |= {f"eval_{one.name}_kl_to_base": one.kl_to_base for one in results if one.kl_to_base is not None}
    forgetting = trade_off(results)["average_forgetting"]
    tasks = [one for one in results if one.role == "task"]
    learned = [one.after for one in tasks if not lower_is_better(one.metric)] or [-one.after for one in tasks]
    metrics |= {} if forgetting is None else {FORGETTING: forgetting}
    return metrics | ({LEARNED: math.fsum(learned) / len(learned)} if learned else {})
