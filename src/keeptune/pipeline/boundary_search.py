"""The boundary search: short training runs decide an option of a method before its plan is made.

FARSS (Section 3.1) names a "lightweight boundary search" between an eighth and a quarter of the depth that balances
task and knowledge, without an algorithm. Here: each candidate is planned and trained for a few steps on a part of the
task; with W the mean probability per token on knowledge texts and S the same on completions that were held out,

    K = W / W_base,  T = S / max S over the candidates,  KT = 2 K T / (K + T)

and the largest KT wins, the first of equal ones. The paper's T is relative to full fine-tuning, which a short search
cannot afford. Evaluation sets are never looked at. Each trial is kept, so that a killed search goes on.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keeptune.adapter.install import install
from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError, RecipeError
from keeptune.core.out_of_memory import out_of_memory
from keeptune.data.calibration import Calibration
from keeptune.data.examples import LanguageExamples, Mixed, draw_rows
from keeptune.evaluation.likelihood import log_likelihoods
from keeptune.evaluation.metrics import harmonic
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens
from keeptune.methods.base import Method
from keeptune.model.blocks import depth
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import plan_for
from keeptune.training.trainer import train

_log = logging.getLogger(__name__)


def choose_boundary(job: Job) -> tuple[Method, tuple[str, ...]]:
    """Decides an option that the recipe leaves open; the trials are under ``search`` in the run folder.

    Returns:
        The method with nothing left to search, and how it was chosen; no notes where nothing was searched.

    Raises:
        RecipeError: A search is needed, and there is no knowledge to weigh the task against, or the model is a
            classifier, whose knowledge no head can tell.
        DataError: There are too few task examples to hold some out.
    """
    method: Method = job.method
    if method.search is None:
        return method, ()
    if job.head is not None:
        raise RecipeError(
            "method.boundary",
            got=f"auto, with task.kind {job.recipe.task.kind}",
            wanted="a number of blocks: what an encoder keeps of its knowledge cannot be scored by its head",
            next_step="Set the boundary, an eighth to a quarter of the depth; of 12 blocks 2 or 3.",
        )
    blocks = depth(job.base())
    candidates = {one.boundary: one for one in method.candidates(blocks)}
    if len(candidates) == 1:
        ((boundary, only),) = candidates.items()
        return only, (f"boundary {boundary}: the only one in the range",)
    steps = method.search.steps
    trials = _Search(job, candidates, steps, method.search.examples).trials()
    best = max(trials, key=lambda trial: trial["KT"])["boundary"]
    curve = ", ".join(f"{trial['boundary']}: {trial['KT']:.4f}" for trial in trials)
    note = f"boundary {best} chosen by short runs of {steps} steps; KT by boundary: {curve}"
    _log.info("search: %s", note)
    return candidates[best], (note,)


@dataclass(frozen=True)
class _Search:
    """Short runs of a job with candidates for its method, of some steps, scored on some examples."""

    job: Job
    candidates: Mapping[int, Any]
    steps: int
    examples: int

    @cached_property
    def folder(self) -> Path:
        return self.job.output / "search"

    @cached_property
    def common(self) -> str:
        """The key of what all trials depend on."""
        job = self.job
        inputs = {name: value for name, value in job.plan_inputs.items() if name != "method"}
        return content_key([inputs, job.task.fingerprint, job.recipe.train, job.recipe.anchor])

    def trials(self) -> list[dict[str, Any]]:
        """Returns the boundary of each candidate, W (``kept``), S (``learned``), K, T and KT."""
        key = content_key([self.common, list(self.candidates.values())])
        trials: list[dict[str, Any]] = Stored("search", self.folder / "search.json", key).get(self._run)["trials"]
        return trials

    def _run(self) -> dict[str, Any]:
        slices = _slices(self.job, self.examples)
        base = _probability(self.job, self.job.base(), slices.knowledge)
        scores = {boundary: self._trial(boundary, slices) for boundary in self.candidates}
        best = max(score["learned"] for score in scores.values())
        trials = []
        for boundary, score in scores.items():
            K, T = score["kept"] / base, score["learned"] / best
            trials.append({"boundary": boundary, **score, "K": K, "T": T, "KT": harmonic(K, T) or 0.0})
        return {"trials": trials}

    @out_of_memory("train")
    def _trial(self, boundary: int, slices: _Slices) -> dict[str, float]:
        """Trains one candidate for a few steps and scores it; done once, however often the search is started."""
        job, candidate = self.job, self.candidates[boundary]
        folder = self.folder / f"boundary-{boundary}"
        key = content_key([self.common, candidate])

        def compute() -> dict[str, float]:
            _log.info("search: %s", folder.name)
            model, data = job.base(), {**job.data, "task": slices.calibration}
            plan = plan_for(model, candidate, job.store, data=data, penalties=job.penalties, options=job.plan_options)
            checkpoints = folder / key[:12]
            tuned = install(model, plan, anchor=job.recipe.anchor)
            train(tuned, plan, job.tokenizer, slices.task, job.config(checkpoints, model.dtype, max_steps=self.steps))
            tuned.eval()
            kept, learned = (_probability(job, tuned, tokens) for tokens in (slices.knowledge, slices.held_out))
            shutil.rmtree(checkpoints, ignore_errors=True)
            return {"kept": kept, "learned": learned}

        record = Stored(f"search {folder.name}", folder / "result.json", key).get(compute)
        return {name: record[name] for name in ("kept", "learned")}


@dataclass(frozen=True)
class _Slices:
    """What trials are trained and scored on."""

    task: LanguageExamples
    calibration: Calibration
    held_out: Sequence[ScoredTokens]
    knowledge: Sequence[ScoredTokens]


def _slices(job: Job, wanted: int) -> _Slices:
    if job.calibration is None:
        raise RecipeError(
            "method.boundary",
            got="auto, without a `knowledge` section",
            wanted="knowledge texts, which the search weighs against the task",
            next_step="Add `knowledge`, or set the boundary to a number of blocks.",
        )
    count = len(job.task)
    held = min(wanted, count // 5)  # the rest must still teach the task
    if held < 1:
        raise DataError(
            "task.train",
            got=f"{count} examples",
            wanted="at least 5, of which the boundary search holds one out",
            next_step="Add examples, or set the boundary to a number of blocks.",
        )
    order = draw_rows(count, count, seed=1)
    options = job.recipe.task.calibration
    rest = _part(job.task, sorted(order[held:]))
    everything = options.model_copy(update={"examples": held, "seed": 0})
    scored = job.kind.calibration(_part(job.task, order[:held]), job.tokenizer, everything, job.positions)
    completions = zip(scored.sequences, scored.prompts or (), strict=True)
    texts = job.calibration.sequences
    return _Slices(
        task=rest,
        calibration=job.kind.calibration(rest, job.tokenizer, options, job.positions),
        held_out=[ScoredTokens(ids, max(start, 1), False) for ids, start in completions],
        knowledge=[ScoredTokens(texts[index], 1, False) for index in draw_rows(len(texts), wanted, seed=1)],
    )


def _part(task: LanguageExamples, rows: Sequence[int]) -> LanguageExamples:
    return Mixed((task,), tuple((0, row) for row in rows))


def _probability(job: Job, model: PreTrainedModel, sequences: Sequence[ScoredTokens]) -> float:
    """Returns the mean probability per scored token, geometrically."""
    pad = job.tokenizer.pad_token_id or 0
    sums = log_likelihoods(model, sequences, Passes(rows=32, pad=pad, where="search"))
    return math.exp(math.fsum(sums) / sum(len(tokens.ids) - tokens.start for tokens in sequences))
