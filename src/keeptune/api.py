"""The Python interface: a plan for a model you already have, training with any trainer, export, scores and repair.

plan = keeptune.plan(model, tokenizer, keeptune.LoraNull(rank=8), knowledge=texts)
tuned = keeptune.install(model, plan)            # a PeftModel: train it with TRL or Transformers
keeptune.export(tuned, plan, "adapter", base=path)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter import export as exporting
from keeptune.adapter.export import Exported, ExportOptions, Format
from keeptune.adapter.install import install
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration
from keeptune.data.completions import TaskExamples
from keeptune.data.knowledge import knowledge_of
from keeptune.data.labelled import LabelledExamples, Texts, label_indices
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate as evaluate_one
from keeptune.evaluation.model_pairs import ModelPair
from keeptune.evaluation.results import BenchmarkResult
from keeptune.methods.base import Method
from keeptune.model.blocks import positions
from keeptune.model.head import Head
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.penalties.base import Penalty
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.posthoc.repair import Repair, repair
from keeptune.statistics.request import DataRole
from keeptune.statistics.store import StatStore
from keeptune.training.attach import attach

__all__ = ["Repair", "attach", "export", "install", "measure", "plan", "repair"]


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    *,
    knowledge: Sequence[str] | Sequence[tuple[str, str]] | None = None,
    task: Sequence[tuple[str, str]] | Sequence[tuple[str, float]] | None = None,
    penalties: Sequence[Penalty] = (),
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    max_length: int = 1024,
    store: Path | str | None = None,
    low_memory: bool = False,
) -> Plan:
    """Collects the statistics a method needs and makes its plan.

    Args:
        model: The base model, as loaded; it is not changed.
        tokenizer: Its tokenizer.
        method: Such as ``LoraNull(rank=8)``.
        knowledge: Texts that hold what the model should keep, or prompts and completions.
        task: Prompts and completions, for methods that look at the task; all of them are used. Of a classifier texts
            and labels (those of its config), or scores.
        penalties: Terms of the loss, such as ``L2(strength=1.0)``; :func:`keeptune.attach` gives them to a trainer.
        targets: Roles, such as ``["q_proj", "down_proj"]``; None is all linear maps but the head.
        layers: Indices of the blocks to tune, such as ``[4, 5, 6, 7]``; None is all.
        max_length: Texts are cut to this many tokens, or to the model's positions.
        store: Folder where statistics are kept for later plans; None keeps them for this call only.
        low_memory: Hold no more covariances at a time than take the memory of the largest.

    Returns:
        The plan, for :func:`keeptune.install`.

    Raises:
        PlanError: A role or a block does not exist, or an option does not fit a target.
        StatisticsError: The method needs knowledge or a task and none is given, or activations are not finite.
        DataError: A text has no tokens, or a label is not one of the classifier's.
    """
    max_length = min(max_length, positions(model) or max_length)
    data: dict[DataRole, Calibration] = {}
    if knowledge is not None:
        data["knowledge"] = knowledge_of(knowledge).calibration(tokenizer, max_length=max_length)
    if task is not None:
        data["task"] = _task_calibration(Head.of(model), task, tokenizer, max_length)
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        return plan_for(
            model,
            method,
            StatStore(Path(scratch if store is None else store)),
            data=data,
            penalties=penalties,
            options=PlanOptions(
                roles=targets,
                layers=layers,
                low_memory=low_memory,
                provenance={"knowledge": None} | {role: tokens.fingerprint for role, tokens in data.items()},
            ),
        )


def _task_calibration(
    head: Head | None,
    task: Sequence[tuple[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Calibration:
    read, said = (tuple(part) for part in zip(*task, strict=True))
    if head is None:
        return TaskExamples(read, said).calibration(tokenizer, max_length=max_length)
    labels = label_indices(said, head.labels, where="task") if head.labels else tuple(map(float, said))
    return LabelledExamples(Texts(read), labels, head.labels).calibration(tokenizer, max_length=max_length)


def export(
    model: Any,
    plan: Plan,
    folder: Path | str,
    *,
    base: str,
    format: Format = "portable",
    rank: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    probe: Tensor | None = None,
    max_gap: float | None = None,
) -> Exported:
    """Writes what was trained as an adapter for the untouched base, and checks it on a fresh copy of it.

    Args:
        model: The trained model.
        plan: Its plan.
        folder: Where; it appears whole or not at all.
        base: Path or hub id of the base.
        format: ``"portable"``, ``"peft"`` or ``"merged"``.
        rank: Take the nearest change of this rank where that of the trained one is larger; the result says what is
            left out.
        tokenizer: Saved along when given.
        probe: Token ids ``(batch, length)`` for the check; None draws some.
        max_gap: Largest relative gap in logits allowed; None takes the bound for the base's dtype.

    Returns:
        Where it is and how large the gap is.

    Raises:
        ExportError: The gap is above the bound, or the format does not fit the plan.
    """
    head = Head.of(model.get_base_model() if isinstance(model, PeftModel) else model)
    names: Any = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
    return exporting.export(
        model,
        plan,
        folder,
        ExportOptions(format, rank, probe, max_gap),
        base=base,
        load_base=lambda: load_model(base, LoadOptions(dtype=names[str(model.dtype)], device=model.device, head=head)),
        tokenizer=tokenizer,
    )


def measure(
    pair: ModelPair, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Benchmark], *, seed: int = 0
) -> list[BenchmarkResult]:
    """Scores benchmarks before and after tuning, on the same items.

    Args:
        pair: ``AdapterPair(peft_model)`` or ``TwoModels(base, tuned)``.
        tokenizer: The tokenizer.
        benchmarks: What to score.
        seed: Seed of the bootstrap intervals.

    Returns:
        One result per benchmark, with per-item records.

    Raises:
        DataError: A file is missing or malformed.
    """
    return [evaluate_one(pair, tokenizer, benchmark, Path(), seed=seed) for benchmark in benchmarks]
