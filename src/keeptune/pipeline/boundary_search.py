"""The boundary search: short training runs decide an option of a method before its plan is made.

FARSS (Section 3.1) names a "lightweight boundary search" between an eighth and a quarter of the depth that balances
task and knowledge, without an algorithm. Here: each candidate is planned and trained for a few steps on a part of the
task; with W the mean probability per token on knowledge texts and S the same on completions that were held out,

    K = W / W_base,  T = S / max S over the candidates,  KT = 2 K T / (K + T)

and the largest KT wins, the first of equal ones. The paper's T is relative to full fine-tuning, which a short search
cannot afford. Evaluation sets are never looked at. Each trial is kept, so that a killed search goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keeptune.adapter.install import install
from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError, RecipeError
from keeptune.data.calibration import Calibration
from keeptune.data.completions import TaskExamples
from keeptune.data.examples import draw_rows
from keeptune.evaluation.likelihood import log_likelihoods
from keeptune.evaluation.metrics import harmonic
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens
from keeptune.methods.base import Method
from keeptune.methods.combined import parts_of, replaced
from keeptune.model.blocks import depth
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.request import DataRole
from keeptune.training.arguments import sft_config
from keeptune.training.trainer import train

__all__ = ["Choice", "Trial", "choose_boundary"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method with nothing left to search.

    Args:
        method: The method.
        notes: How it was chosen, for the plan; empty where nothing was searched.
    """

    method: Method
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate's scores.

    Args:
        boundary: What was tried.
        kept: W, mean probability per token on knowledge texts.
        learned: S, the same on held-out completions.
        K: W over the base's.
        T: S over the best candidate's.
        KT: Their harmonic mean.
    """

    boundary: int
    kept: float
    learned: float
    K: float
    T: float
    KT: float


@dataclasses.dataclass(frozen=True)
class _Slices:
    """What trials are trained and scored on."""

    task: TaskExamples
    calibration: Calibration
    held_out: Sequence[ScoredTokens]
    knowledge: Sequence[ScoredTokens]


def choose_boundary(job: Job) -> Choice:
    """Decides an option that the recipe leaves open; the trials are under ``search`` in the run folder.

    Raises:
        RecipeError: A search is needed, and there is no knowledge to weigh the task against, or the model is a
            classifier, whose knowledge no head can tell.
        DataError: There are too few task examples to hold some out.
    """
    method: Method | None = next((part.method for part in parts_of(job.method) if part.method.search), None)
    if method is None or method.search is None:
        return Choice(job.method)
    search = method.search
    if job.head is not None:
        raise RecipeError(
            "method.boundary",
            got=f"auto, with task.kind {job.recipe.task.kind}",
            wanted="a number of blocks: what an encoder keeps of its knowledge cannot be scored by its head",
            next_step="Set the boundary, an eighth to a quarter of the depth; of 12 blocks 2 or 3.",
        )
    blocks = depth(job.base())
    candidates = {one.boundary: replaced(job.method, method, one) for one in method.candidates(blocks)}
    if len(candidates) == 1:
        ((boundary, only),) = candidates.items()
        return Choice(only, (f"boundary {boundary}: the only one in the range",))
    folder = job.output / "search"
    inputs = {name: value for name, value in job.plan_inputs.items() if name != "method"}
    common = content_key([inputs, job.task.fingerprint, job.recipe.train, job.recipe.anchor])
    key = content_key([common, list(candidates.values())])

    def compute() -> dict[str, Any]:
        slices = _slices(job, search.examples)
        return {"trials": _trials(job, candidates, slices, folder, common, search.steps)}

    scored = [Trial(**trial) for trial in Stored("search", folder / "search.json", key).get(compute)["trials"]]
    best = max(scored, key=lambda trial: trial.KT)
    curve = ", ".join(f"{trial.boundary}: {trial.KT:.4f}" for trial in scored)
    note = f"boundary {best.boundary} chosen by short runs of {search.steps} steps; KT by boundary: {curve}"
    _log.info("search: %s", note)
    return Choice(candidates[best.boundary], (note,))


def _trials(
    job: Job, candidates: Mapping[int, Any], slices: _Slices, folder: Path, common: str, steps: int
) -> list[Trial]:
    base = _probability(job, job.base(), slices.knowledge)
    raw = {}
    for boundary, candidate in candidates.items():
        key = content_key([common, candidate])
        raw[boundary] = _trial(job, candidate, slices, folder / f"boundary-{boundary}", key, steps)
    best = max(learned for _, learned in raw.values())
    trials = []
    for boundary, (kept, learned) in raw.items():
        K, T = kept / base, learned / best
        trials.append(Trial(boundary, kept, learned, K, T, harmonic(K, T) or 0.0))
    return trials


def _trial(job: Job, candidate: Any, slices: _Slices, folder: Path, key: str, steps: int) -> tuple[float, float]:
    """Trains one candidate for a few steps and scores it; done once, however often the search is started."""

    def compute() -> dict[str, float]:
        _log.info("search: %s", folder.name)
        data: dict[DataRole, Calibration] = {**job.data, "task": slices.calibration}
        model, recipe = job.base(), job.recipe
        plan = plan_for(
            model,
            candidate,
            job.store,
            data=data,
            penalties=job.penalties,
            options=job.plan_options,
        )
        arguments = {"seed": 0, **recipe.train, "max_steps": steps}
        checkpoints = folder / key[:12]
        config = sft_config(arguments, checkpoints, dtype=model.dtype, device=job.device, positions=job.positions)
        tuned = install(model, plan, anchor=recipe.anchor)
        train(tuned, plan, job.tokenizer, slices.task, config)
        tuned.eval()
        kept, learned = (_probability(job, tuned, tokens) for tokens in (slices.knowledge, slices.held_out))
        shutil.rmtree(checkpoints, ignore_errors=True)
        return {"kept": kept, "learned": learned}

    record = Stored(f"search {folder.name}", folder / "result.json", key).get(compute)
    return record["kept"], record["learned"]


def _slices(job: Job, wanted: int) -> _Slices:
    if job.calibration is None:
        raise RecipeError(
            "method.boundary",
            got="auto, without a `knowledge` section",
            wanted="knowledge texts, which the search weighs against the task",
            next_step="Add `knowledge`, or give the boundary as a number of blocks.",
        )
    assert isinstance(job.task, TaskExamples)
    count = len(job.task.prompts)
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
    texts = job.calibration.sequences
    drawn = draw_rows(len(texts), wanted, seed=1)
    return _Slices(
        task=rest,
        calibration=job.kind.calibration(rest, job.tokenizer, options, job.positions),
        held_out=[
            ScoredTokens(ids, max(start, 1), False)
            for ids, start in zip(scored.sequences, scored.prompts or (), strict=True)
        ],
        knowledge=[ScoredTokens(texts[index], 1, False) for index in drawn],
    )


def _part(task: TaskExamples, rows: Sequence[int]) -> TaskExamples:
    return TaskExamples(tuple(task.prompts[i] for i in rows), tuple(task.completions[i] for i in rows))


def _probability(job: Job, model: PreTrainedModel, sequences: Sequence[ScoredTokens]) -> float:
    """Returns the mean probability per scored token, geometrically."""
    pad = job.tokenizer.pad_token_id or 0
    sums = log_likelihoods(model, sequences, Passes(rows=32, pad=pad, where="search"))
    return math.exp(math.fsum(sums) / sum(len(tokens.ids) - tokens.start for tokens in sequences))
