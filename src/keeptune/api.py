"""The Python interface: a plan for a model you already have, training with any trainer, export, scores and repair.

plan = keeptune.plan(model, tokenizer, keeptune.LoraNull(rank=8), knowledge=texts)
tuned = keeptune.install(model, plan)            # a PeftModel: train it with TRL or Transformers
keeptune.export(tuned, plan, "adapter", base=path)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter import export as exporting
from keeptune.adapter.export import Exported, ExportOptions
from keeptune.core.errors import ModelError
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration
from keeptune.data.completions import TaskExamples, knowledge_of
from keeptune.data.examples import Examples
from keeptune.data.labelled import LabelledExamples, Texts, label_indices
from keeptune.data.self_written import SelfWritten
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate as evaluate_one
from keeptune.evaluation.model_pairs import ModelPair
from keeptune.evaluation.results import BenchmarkResult
from keeptune.methods.base import Method
from keeptune.model.blocks import head_of, positions
from keeptune.model.head import Head, body_fingerprint
from keeptune.model.offloaded import load_floats
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.model.quantization import quantised_on_load
from keeptune.penalties.base import Penalty
from keeptune.pipeline.machine import check_folder
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.request import DataRole
from keeptune.statistics.self_generated import SelfGeneration, write_texts
from keeptune.statistics.store import StatStore

_ALL_TARGETS, _PORTABLE, _OWN_TEXTS = PlanOptions(), ExportOptions(), SelfGeneration()


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    *,
    knowledge: Sequence[str] | Sequence[tuple[str, str]] | None = None,
    task: Sequence[tuple[str, str]] | Sequence[tuple[str, float]] | None = None,
    penalties: Sequence[Penalty] = (),
    options: PlanOptions = _ALL_TARGETS,
) -> Plan:
    """Collects the statistics a method needs and makes its plan.

    Args:
        model: The base model, as loaded, quantised or not; it is not changed.
        tokenizer: Its tokenizer.
        method: Such as ``LoraNull(rank=8)``.
        knowledge: Texts that hold what the model should keep, or prompts and completions.
        task: Prompts and completions, for methods that look at the task; all of them are used. Of a classifier texts
            and labels (those of its config), or scores.
        penalties: Terms of the loss, such as ``L2(strength=1.0)``; :func:`keeptune.attach` adds them to a trainer.
        options: Which targets are planned, such as ``PlanOptions(targets=["q_proj", "down_proj"])``.

    Returns:
        The plan, for :func:`keeptune.install`.

    Raises:
        PlanError: A role or a block does not exist, or an option does not fit a target.
        StatisticsError: The method needs knowledge or a task and none is given, or activations are not finite.
        DataError: A text has no tokens, or a label is not one of the classifier's.
        RecipeError: The store is no folder.
    """
    length = min(options.max_length, positions(model) or options.max_length)
    data: dict[DataRole, Calibration] = {}
    if knowledge is not None:
        data["knowledge"] = knowledge_of(knowledge).calibration(tokenizer, max_length=length)
    if task is not None:
        data["task"] = _task_examples(Head.of(model), task).calibration(tokenizer, max_length=length)
    provenance = {"knowledge": None} | {role: tokens.fingerprint for role, tokens in data.items()}
    options = replace(options, provenance=provenance | dict(options.provenance))
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        folder, limit = (options.store, options.store_limit) if options.store else (scratch, sys.maxsize)
        store = StatStore(Path(folder), limit)
        check_folder("PlanOptions.store", store.folder)
        return plan_for(model, method, store, data=data, penalties=penalties, options=options)


def generate_knowledge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: SelfGeneration = _OWN_TEXTS,
    *,
    store: Path | str | None = None,
) -> SelfWritten:
    """Has a base write texts to keep, where there is no file of knowledge.

    Args:
        model: The base, as loaded, quantised or not; it is not changed.
        tokenizer: Its tokenizer; one with a chat template gets questions and answers too.
        options: How many texts, from which prompts, such as ``SelfGeneration(generate=64, prompts=questions)``.
        store: Folder where texts are kept, so that a next call takes or continues them; None keeps none.

    Returns:
        The texts, for ``plan(knowledge=...)`` and ``repair(knowledge=...)``; what was left out is in ``account``.

    Raises:
        DataError: Hardly any text is of use, or a file of prompts is wrong.
        ModelError: A classifier, or a model without a token to start from.
    """
    if head_of(model):
        raise ModelError(
            "generate_knowledge",
            got="a classifier",
            wanted="a model that writes text",
            next_step="Load the base with AutoModelForCausalLM.",
        )
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        kept = StatStore(Path(store or scratch))
        return write_texts(lambda: model, tokenizer, options, kept, fingerprint=body_fingerprint(model))


def _task_examples(head: Head | None, task: Sequence[tuple[str, Any]]) -> Examples:
    prompts, answers = (tuple(part) for part in zip(*task, strict=True))
    if head is None:
        return TaskExamples(prompts, answers)
    labels = label_indices(answers, head.labels, where="task") if head.labels else tuple(map(float, answers))
    return LabelledExamples(Texts(prompts), labels, head.labels)


@out_of_memory("export")
def export(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    folder: Path | str,
    options: ExportOptions = _PORTABLE,
    *,
    base: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Exported:
    """Writes what was trained as an adapter for the untouched base, and checks it on a fresh copy of it.

    Args:
        model: The trained model.
        plan: Its plan.
        folder: Where; it appears whole or not at all.
        options: What is written, such as ``ExportOptions(format="peft", rank=4)``, and how it is checked.
        base: Path or hub id of the base; one that was quantised as it was loaded is quantised again for the check.
        tokenizer: Saved along when given.

    Returns:
        Where it is and how large the gap is; of a quantised base also that to its original.

    Raises:
        ExportError: The gap is above the bound, or the format does not fit the plan.
    """
    head = Head.of(model.get_base_model() if isinstance(model, PeftModel) else model)
    dtype: Any = str(model.dtype).removeprefix("torch.")
    floats = LoadOptions(dtype=dtype, device=model.device, head=head)
    fields = quantised_on_load(model)
    load = partial(load_model, base, replace(floats, quantization=fields))
    original = options.original or (None if fields is None else base)
    source = exporting.Base(base, load, partial(load_floats, options=floats), original, fields)
    return exporting.export(model, plan, folder, options, base=source, tokenizer=tokenizer)


@out_of_memory("evaluate")
def measure(
    pair: ModelPair, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Benchmark], *, seed: int = 0
) -> list[BenchmarkResult]:
    """Scores benchmarks before and after tuning, on the same items.

    Args:
        pair: ``AdapterPair(peft_model)`` or ``TwoModels(base, tuned)``.
        tokenizer: The base's.
        benchmarks: Such as ``FileBenchmark(name="facts", role="knowledge", ...)``.
        seed: Of the bootstrap intervals.

    Returns:
        One result per benchmark, with per-item records.

    Raises:
        DataError: A file is missing or malformed.
    """
    return [evaluate_one(pair, tokenizer, benchmark, Path(), seed=seed) for benchmark in benchmarks]
