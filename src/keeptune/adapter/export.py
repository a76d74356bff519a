"""export: the trained change, relative to the original base, as files that stock PEFT loads; merge: a whole model.

``portable``: scale folded into B, zero-padded to one uniform rank that servers allow, plain config.
``peft``: per-module ranks in ``rank_pattern``, no padding. ``merged``: a whole model. A change of a larger rank than
servers take is merged, or, where a ``rank`` is set, cut to it by an SVD; the error is stated.

Every export is loaded again by stock PEFT on a freshly loaded base, and the gap in logits to the trained
model is measured; above the bound the export fails and leaves nothing.

Trained on a quantised base, an adapter is for that base, and a merged model is made of the original weights: never of
four bits. What the same change computes on the original differs by ``W - dequant(W4)``; that gap is stated beside.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.load import (
    GENERATION,
    SIDECAR,
    load_adapter,
    read_config,
    refuse_foreign,
    tensor_names,
    write_tokenizer,
)
from keeptune.adapter.probe import BOUNDS, Gap, logits_of, random_probe
from keeptune.adapter.sidecar import About
from keeptune.adapter.trained_change import (
    change_of,
    hold_change,
    put_change,
    truncated_changes,
    write_lora,
    written_rank,
)
from keeptune.adapter.trained_head import head_names, labels_of, task_type, token_rows
from keeptune.adapter.vllm_rules import SERVED_RANKS, VllmVerdict, vllm_verdict
from keeptune.core.artefact import atomic_directory, seal, write_json, write_text
from keeptune.core.errors import ExportError
from keeptune.core.offload import aligned, device_of, save_model
from keeptune.core.plan import Plan
from keeptune.core.weights import is_quantised

_log = logging.getLogger(__name__)
_TOO_FAR = "On a 16-bit base train with `anchor: twin`, or state a larger `max_gap`. Nothing was written."
Format = Literal["portable", "peft", "merged"]


@dataclass(frozen=True, slots=True, eq=False)
class ExportOptions:
    """What is written, and how it is checked.

    Args:
        format: ``"portable"``, ``"peft"`` or ``"merged"``. What has no form as a portable LoRA is merged, and the
            log and ``note`` say why.
        rank: Take the nearest change of this rank where that of the trained one is larger; ``error`` says what is left
            out, and what is written is checked against that change, not against the trained model.
        probe: Token ids ``(batch, length)`` for the check; None draws some.
        max_gap: Largest relative gap allowed; None takes 1e-4 for a float32 base, 2e-2 for float16 and
            1e-1 for bfloat16. Of a smaller rank, None allows any.
        original: Path or hub id of what a base that is stored quantised was before, for :func:`keeptune.export`.
    """

    format: Format = "portable"
    rank: int | None = None
    probe: Tensor | None = None
    max_gap: float | None = None
    original: str | None = None


_AS_TRAINED = ExportOptions()


@dataclass(frozen=True, slots=True)
class Base:
    """The base that an export is for.

    Args:
        name: Path or hub id, written into the adapter's config.
        load: Loads it afresh, quantised where it was for the training.
        floats: Loads a model of floats by path or hub id, with its weights left on disk: merges are then streamed, else
            made in memory.
        original: Path or hub id of what the base was before it was quantised; None where it is not quantised, or the
            original is not at hand.
        quantization: Fields of the quantisation that the base is loaded with; None loads it as it is stored.
        ends: Tokens that end the turns of the tokenizer's chat template.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    floats: Callable[[str], PreTrainedModel] | None = None
    original: str | None = None
    quantization: Mapping[str, Any] | None = None
    ends: Collection[int | None] = ()


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote and how well it reproduces the trained model.

    Args:
        folder: Where.
        format: Which.
        rank: The adapter's rank; 0 for a merged model.
        gap: Largest difference in logits to the trained model on the probe, absolute.
        relative_gap: The same over the largest logit.
        bound: The relative gap above which the export would have failed; with an ``error``, that to the change of the
            smaller rank.
        serve: How to serve it, or how to load a classifier.
        note: Why the format is not the one wanted; empty when it is.
        error: What a smaller rank left out of the change, relative (Frobenius); 0 where it is whole.
        original: Path or hub id of the original of a quantised base, where that is at hand.
        original_gap: Largest difference in logits between the trained model and its change on that original; None
            without one.
        original_relative_gap: The same over the largest logit.
        vllm: Whether vLLM's loader takes the adapter, by its rules; empty for a merged model.
    """

    folder: str
    format: Format
    rank: int
    gap: float
    relative_gap: float
    bound: float
    serve: str
    note: str = ""
    error: float = 0.0
    original: str | None = None
    original_gap: float | None = None
    original_relative_gap: float | None = None
    vllm: str = ""


def format_for(plan: Plan, wanted: Format, rank: int | None = None) -> tuple[Format, str]:
    """Returns the format a plan's result can have, and why it is not the one wanted (empty when it is).

    Raises:
        ExportError: An adapter with ranks of its own, or of a smaller ``rank``, is wanted and there is none.
    """
    reason = _no_lora(plan, rank)
    if rank is not None and (wanted == "merged" or reason):
        raise ExportError(
            f"export of {plan.method}",
            got=f"rank {rank}" + (" with format merged" if wanted == "merged" else ""),
            wanted="none: a merged model has no rank",
            next_step=f"{reason}. Leave `export.rank` out." if reason else "Leave `export.rank` or the format out.",
        )
    if wanted == "merged" or not reason or (wanted == "peft" and plan.scope == "adapter"):
        return wanted, ""
    if wanted == "peft":
        raise ExportError(
            f"export of {plan.method}",
            got='format "peft"',
            wanted='"merged"',
            next_step=f"{reason}. Set `export: {{format: merged}}`.",
        )
    return "merged", reason


def _no_lora(plan: Plan, wanted: int | None = None) -> str:
    if plan.scope == "all":
        return "A change of every weight has no adapter form"
    if any("magnitude" in target_plan.vectors for target_plan in plan.targets):
        return (
            "New lengths for a weight's rows are no change of low rank, and vLLM refuses DoRA adapters"
            " (format peft writes one for PEFT)"
        )
    if any("bias" in target_plan.vectors for target_plan in plan.targets):
        return "Biases were trained, and vLLM refuses adapters with biases (format peft writes one for PEFT)"
    if plan.experts:
        return (
            "Experts of fused weights were trained, whose adapters servers read in forms that differ by architecture,"
            " if at all (vLLM #52194; format peft writes one for PEFT)"
        )
    if task_type(plan) == "CAUSAL_LM" and (head_names(plan) or token_rows(plan)):
        return (
            f"Beside the factors {', '.join([*head_names(plan), *token_rows(plan)])} was trained, and vLLM refuses"
            " adapters with modules_to_save or rows of tokens (format peft writes one for PEFT)"
        )
    rank = written_rank(plan)
    if max(SERVED_RANKS) < min(rank, wanted or rank):
        return (
            f"The change has rank {rank}, and vLLM takes adapters of rank {max(SERVED_RANKS)} at most"
            " (format peft writes one for PEFT; export.rank takes the nearest change of a smaller rank)"
        )
    return ""


def export(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    folder: Path | str,
    options: ExportOptions = _AS_TRAINED,
    *,
    base: Base,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Exported:
    """Writes the trained change and checks it on a freshly loaded base. The folder appears whole or not at all.

    Raises:
        ExportError: The gap is above the bound, the format does not fit the plan, the folder holds something that
            keeptune did not write, or a change of a quantised base is to be merged without its original.
    """
    format, note = format_for(plan, options.format, options.rank)
    if format == "merged" and base.original is None and is_quantised(model):
        raise _no_original(folder, base.name, note)
    if note:
        _log.warning("export %s: merged into a whole model. %s", folder, note)
    refuse_foreign(Path(folder))
    probe = random_probe(model) if options.probe is None else options.probe
    trained, labels = logits_of(model, probe), labels_of(model)
    with atomic_directory(Path(folder)) as fresh:
        written = _write(model, plan, fresh, options, format, base)
        on_original = None if base.original is None else _on_original(model, plan, fresh, base, probe)
        wanted = trained if format != "merged" or on_original is None else on_original
        del model  # where the caller does not hold it, there is one base at a time
        product = written.load()
        logits = logits_of(product, probe)
        if tokenizer is not None:
            write_tokenizer(tokenizer, product, fresh, base.ends)
        del product
        gap = Gap.between(logits, wanted)
        bound = BOUNDS[written.dtype] if options.max_gap is None else options.max_gap
        if written.cut is not None:
            cut_gap = Gap.between(logits, logits_of(written.cut, probe))
            cut_gap.refuse_above(BOUNDS[written.dtype], f"export {folder}", "the change of the smaller rank", _TOO_FAR)
        if written.cut is None or options.max_gap is not None:
            gap.refuse_above(bound, f"export {folder}", "the trained model", _TOO_FAR)
        done = Exported(str(folder), format, written.rank, gap.gap, gap.relative, bound, "", note, written.error)
        if on_original is not None:
            apart = Gap.between(on_original, trained)
            done = replace(done, original=base.original, original_gap=apart.gap, original_relative_gap=apart.relative)
        return _describe(fresh, plan, base, done, labels)


def _describe(fresh: Path, plan: Plan, base: Base, done: Exported, labels: Sequence[str] | None) -> Exported:
    """Writes the record and the README of an export, and returns it with the line that serves it."""
    merged = done.format == "merged"
    about = About(plan, base.name, labels, base.quantization)
    if merged and base.original is not None:
        about = replace(about, base=base.original, trained_on=base.name)
    verdict = None if merged else about.judged(verdict_on(fresh))
    done = replace(done, serve=about.serve_line(done.folder, verdict))
    if " --lora-modules " in done.serve and (fresh / GENERATION).is_file():  # vLLM would take the base's own
        done = replace(done, serve=f"{done.serve} {shlex.join(['--generation-config', done.folder])}")
    if verdict is not None:
        done = replace(done, vllm=verdict.line(shlex.join(["keeptune", "merge", done.folder, "merged"])))
        _log.info("export: %s", done.vllm)
    write_json(fresh / SIDECAR, about.record(asdict(done)))
    write_text(fresh / "README.md", about.readme(asdict(done)))
    seal(fresh, asdict(done))
    return done


def verdict_on(adapter: Path) -> VllmVerdict:
    """Returns what vLLM's loader makes of an adapter's files."""
    return vllm_verdict(read_config(adapter), tensor_names(adapter))


def _no_original(folder: Path | str, name: str, note: str) -> ExportError:
    return ExportError(
        f"export {folder}",
        got=f"a merged model of {name}, which is quantised" + (f" ({note[0].lower()}{note[1:]})" if note else ""),
        wanted="the original weights: a merge in four bits would round the change away",
        next_step="Set `original:` to the model that was quantised, or `export.format` to peft. Nothing was written.",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """The adapter's rank, the dtype that the bound is for, what loads it, and what it was cut to."""

    rank: int
    dtype: torch.dtype
    load: Callable[[], Any]
    cut: PreTrainedModel | None = None
    error: float = 0.0


def _write(
    model: PreTrainedModel | PeftModel, plan: Plan, folder: Path, options: ExportOptions, format: Format, base: Base
) -> _Written:
    if format == "merged":
        # What is trained in full is in memory as it is.
        floats = None if plan.scope == "all" else base.floats
        whole = base.load() if floats is None else floats(base.original or base.name)
        write_merged(model, plan, folder, whole)
        kind: Any = type(whole)
        saved = partial(kind.from_pretrained, folder, dtype=whole.dtype, use_safetensors=True)
        return _Written(0, whole.dtype, saved if floats is None else partial(floats, str(folder)))
    assert isinstance(model, PeftModel)
    change, cut, error = change_of(model, plan), None, 0.0
    if options.rank is not None and options.rank < written_rank(plan):
        change, error = truncated_changes(change, options.rank)
        cut = base.load()
        if is_quantised(cut):
            hold_change(cut, change)
        else:
            put_change(cut, change, plan)
    rank = write_lora(change, plan, folder, base.name, portable=format == "portable")
    return _Written(rank, model.dtype, lambda: load_adapter(base.load(), folder), cut, error)


def _on_original(model: Any, plan: Plan, folder: Path, base: Base, probe: Tensor) -> Tensor:
    """Computes the logits of the original of a quantised base with the trained change, as PEFT adds it."""
    assert base.original is not None
    assert base.floats is not None
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        if not (folder / "adapter_config.json").is_file():
            folder = Path(scratch)
            write_lora(change_of(model, plan), plan, folder, base.name, portable=False)
        whole = base.floats(base.original)
        # An adapter that only adds to outputs needs no W; others compute with it, so that it has to be in memory.
        computes = plan.experts or any("magnitude" in t.trainable for t in plan.targets)
        with aligned(whole.modules(), device_of(whole)) if computes else nullcontext():
            return logits_of(load_adapter(whole, folder), probe)


def write_merged(model: PreTrainedModel | PeftModel, plan: Plan, folder: Path, base: PreTrainedModel) -> None:
    """Writes the whole model in the dtype of a freshly loaded base, which is changed."""
    if plan.scope == "all":
        base.load_state_dict(model.state_dict())
    else:
        assert isinstance(model, PeftModel)
        put_change(base, change_of(model, plan), plan)
    save_model(base, folder)
