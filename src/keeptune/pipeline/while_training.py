"""Benchmarks while training: those of the recipe, scored with the model as it is and with the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import KeptAnswers, ModelPair, TwoModels
from keeptune.evaluation.results import BenchmarkResult, trade_off
from keeptune.pipeline.job import Job
from keeptune.training.evaluations import FORGETTING, LEARNED, Evaluations
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


def evaluations_of(job: Job, plan: Plan, tuned: Any) -> Evaluations | None:
    """Returns what is scored while an installed model trains; None where the recipe asks for nothing."""
    if job.recipe.training.get("eval_strategy", "no") == "no":
        return None
    kept = KeptAnswers(job.output / "base-answers", content_key([job.base_fingerprint, job.device]))

    @cache
    def pair() -> ModelPair:
        if isinstance(tuned, PeftModel) and job.head is None and not any(map(plan.peft.get, _BESIDE)):
            return InTraining(tuned, plan)
        return TwoModels(job.base(), tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned)

    def score() -> dict[str, float]:
        return metrics_of([evaluate(pair(), job.tokenizer, b, Path(), kept=kept) for b in job.recipe.evaluate])

    return Evaluations(score, job.recipe.stop_at_loss)


def metrics_of(results: Sequence[BenchmarkResult]) -> dict[str, float]:
    """Returns the metrics of an evaluation: each benchmark's score and KL to the base, and what they come to.

    ``forgetting`` is ``1 - K``; ``learned`` the mean score of the task benchmarks that are shares, else of the others
    in nats, negative, so that more is better.
    """
    metrics = {result.name: result.after for result in results}
    metrics |= {f"{result.name}_kl_to_base": result.kl_to_base for result in results if result.kl_to_base is not None}
    forgetting = trade_off(results)["average_forgetting"]
    if forgetting is not None:
        metrics[FORGETTING] = forgetting
    tasks = [result for result in results if result.role == "task"]
    learned = [one.after for one in tasks if not lower_is_better(one.metric)] or [-one.after for one in tasks]
    return metrics | ({LEARNED: math.fsum(learned) / len(learned)} if learned else {})
