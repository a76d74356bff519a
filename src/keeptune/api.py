"""The Python interface: a plan for a model you already have, training with any trainer, export, scores and repair.

plan = keeptune.plan(model, tokenizer, keeptune.LoraNull(rank=8), knowledge=texts)
tuned = keeptune.install(model, plan)            # a PeftModel: train it with TRL or Transformers
keeptune.export(tuned, plan, "adapter", base=path)
"""

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter import export as exporting
from keeptune.adapter.export import Exported, ExportOptions
from keeptune.core.errors import ModelError
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration
from keeptune.data.chat_template import turn_ends
from keeptune.data.completions import TaskExamples, knowledge_of
from keeptune.data.examples import Examples
from keeptune.data.labelled import LabelledExamples, Texts, label_indices
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate as evaluate_one
from keeptune.evaluation.model_pairs import ModelPair
from keeptune.evaluation.results import BenchmarkResult
from keeptune.methods.base import Method
from keeptune.methods.loki import Loki
from keeptune.model.blocks import find_targets, head_of, positions
from keeptune.model.head import Head, body_fingerprint
from keeptune.model.pretrained import LoadOptions, load_floats, load_model
from keeptune.model.quantization import quantised_on_load
from keeptune.model.runner import Runner
from keeptune.penalties.base import Penalty
from keeptune.pipeline.machine import check_folder
from keeptune.pipeline.planning import PlanOptions, collect_for, plan_for, statistics_for
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution
from keeptune.statistics.request import DataRole, RowRequest
from keeptune.statistics.self_generated import SelfGeneration, SelfWritten, write_texts
from keeptune.statistics.store import StatStore

_log = logging.getLogger(__name__)
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
    data, notes = tokens_of(model, tokenizer, {"knowledge": knowledge, "task": task}, options)
    provenance = {"knowledge": None} | {role: tokens.fingerprint for role, tokens in data.items()}
    noted = {"notes": [*options.provenance.get("notes", ()), *notes]} if notes else {}
    options = replace(options, provenance={**provenance, **options.provenance, **noted})
    with store_of(options) as store:
        return plan_for(model, method, store, data=data, penalties=penalties, options=options)


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: RowRequest,
    data: Sequence[str] | Sequence[tuple[str, Any]],
    *,
    options: PlanOptions = _ALL_TARGETS,
) -> dict[str, Tensor]:
    """Collects a statistic of a model's linear maps.

    Args:
        model: The base model, as loaded; it is not changed.
        tokenizer: Its tokenizer.
        request: ``InputCovariance("knowledge")`` for Ω, ``(n, n)``, ``GradientCovariance("knowledge", "sampled")`` for
            Γ, ``(m, m)``, or another one; ``"knowledge"`` or ``"task"`` says how the data are read.
        data: As :func:`plan` takes them.
        options: Which targets are measured; the store, the memory and the device.

    Returns:
        The statistic by the target's name, in memory; experts that no token reached are left out.

    Raises:
        StatisticsError: Activations are not finite.
    """
    calibration, _ = tokens_of(model, tokenizer, {request.data: data}, options)
    targets = find_targets(model, options.targets, options.layers)
    with store_of(options) as store:
        found = collect_for(Runner(model), dict.fromkeys(targets, frozenset({request})), calibration, store, options)
        return {target.name: found.view(target)[request] for target in targets if target.name not in found.unseen}


def attribute(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: NeuronAttribution,
    data: Sequence[str] | Sequence[tuple[str, str]],
    *,
    options: PlanOptions = _ALL_TARGETS,
) -> Attributions:
    """Attributes the next token of every text, or prompt, to the outputs of the MLPs, as LoKI does.

    Args:
        model: The base model, as loaded; it is not changed.
        tokenizer: Its tokenizer.
        request: ``NeuronAttribution()``, or ``NeuronAttribution.as_paper()``.
        data: As :func:`plan` takes knowledge.
        options: The store, the memory and the device.

    Returns:
        The attributions, in memory, in the order of the texts' tokens; :func:`keeptune.chosen_rows` selects from them.

    Raises:
        ModelError: The model is no causal language model, or no block has an MLP down-projection.
    """
    calibration, _ = tokens_of(model, tokenizer, {request.data: data}, options)
    with store_of(options) as store:
        targets, found = statistics_for(model, Loki(attribution=request), store, data=calibration, options=options)
        opened = found.view(targets[0]).attributions(request)
        return replace(opened, read=torch.cat(list(opened.chunks())).__getitem__)


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


@contextmanager
def store_of(options: PlanOptions) -> Iterator[StatStore]:
    """The store that is named, or one for this call."""
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        folder, limit = (options.store, options.store_limit) if options.store else (scratch, sys.maxsize)
        store = StatStore(Path(folder), limit)
        check_folder("PlanOptions.store", store.folder)
        yield store


def tokens_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Mapping[DataRole, Sequence[Any] | None],
    options: PlanOptions,
) -> tuple[dict[DataRole, Calibration], list[str]]:
    """Returns the data as tokens, and what is to be said of them."""
    length = min(options.max_length, positions(model) or options.max_length)
    data: dict[DataRole, Calibration] = {}
    notes = []
    for role, own in given.items():
        if own is None:
            continue
        examples = _task_examples(Head.of(model), own, options.end_token) if role == "task" else knowledge_of(own)
        data[role] = examples.calibration(tokenizer, max_length=length)
        if isinstance(examples, TaskExamples) and (end := examples.end_of(tokenizer)):
            notes.append(f"each completion of the task ends with {end} (end_token=False leaves it out)")
            _log.info("task: %s", notes[0])
    return data, notes


def _task_examples(head: Head | None, task: Sequence[tuple[str, Any]], end: bool) -> Examples:
    prompts, answers = (tuple(part) for part in zip(*task, strict=True))
    if head is None:
        return TaskExamples(prompts, answers, end)
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
    source = replace(base_of(model, base, options.original), ends=turn_ends(tokenizer))
    return exporting.export(model, plan, folder, options, base=source, tokenizer=tokenizer)


def base_of(model: PreTrainedModel | PeftModel, name: str, original: str | None = None) -> exporting.Base:
    """Returns the base of a model in training, to be loaded afresh: in its dtype, and quantised again if it was."""
    head = Head.of(model.get_base_model() if isinstance(model, PeftModel) else model)
    dtype: Any = str(model.dtype).removeprefix("torch.")
    floats = LoadOptions(dtype=dtype, device=model.device, head=head)
    fields = quantised_on_load(model)
    load = partial(load_model, name, replace(floats, quantization=fields))
    original = original or (None if fields is None else name)
    return exporting.Base(name, load, partial(load_floats, options=floats), original, fields)


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
