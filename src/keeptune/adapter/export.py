"""export: the trained change, relative to the original base, as files that stock PEFT loads; merge: a whole model.

``portable``: scale folded into B, zero-padded to one uniform rank that servers allow, plain config.
``peft``: per-module ranks in ``rank_pattern``, no padding. ``merged``: a whole model. A change of a larger rank than
servers take is merged, or, where a ``rank`` is set, cut to it by an SVD; the error is stated.

Every export is loaded again by stock PEFT on a freshly loaded base, and the gap in logits to the trained
model is measured; above the bound the export fails and leaves nothing.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.load import SIDECAR, load_adapter, refuse_foreign
from keeptune.adapter.probe import BOUNDS, Gap, logits_of, random_probe
from keeptune.adapter.trained_change import (
    SERVED_RANKS,
    change_of,
    put_change,
    truncated_changes,
    write_lora,
    written_rank,
)
from keeptune.adapter.trained_head import labels_of
from keeptune.core.artefact import atomic_directory, write_json, write_text
from keeptune.core.errors import ExportError
from keeptune.core.plan import Plan

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
    """

    format: Format = "portable"
    rank: int | None = None
    probe: Tensor | None = None
    max_gap: float | None = None


_AS_TRAINED = ExportOptions()


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
    if plan.scope == "subspace":
        return "A change of all but the top singular directions is not of low rank and has no adapter form"
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
    base: str,
    load_base: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Exported:
    """Writes the trained change and checks it on a freshly loaded base.

    ``base``, its path or hub id, goes into the adapter's config. The folder appears whole or not at all.

    Raises:
        ExportError: The gap is above the bound, the format does not fit the plan, or the folder holds something
            that keeptune did not write.
    """
    format, note = format_for(plan, options.format, options.rank)
    if note:
        _log.warning("export %s: merged into a whole model. %s", folder, note)
    refuse_foreign(Path(folder))
    probe = random_probe(model) if options.probe is None else options.probe
    wanted = logits_of(model, probe)
    with atomic_directory(Path(folder)) as fresh:
        written = _write(model, plan, fresh, options, format, base, load_base)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        logits = logits_of(written.load(), probe)
        gap = Gap.between(logits, wanted)
        bound = BOUNDS[written.dtype] if options.max_gap is None else options.max_gap
        if written.cut is not None:
            cut_gap = Gap.between(logits, logits_of(written.cut, probe))
            cut_gap.refuse_above(BOUNDS[written.dtype], f"export {folder}", "the change of the smaller rank", _TOO_FAR)
        if written.cut is None or options.max_gap is not None:
            gap.refuse_above(bound, f"export {folder}", "the trained model", _TOO_FAR)
        labels = labels_of(model)
        serve = _serve_line(plan, format, written.rank, base, folder, labels)
        done = Exported(str(folder), format, written.rank, gap.gap, gap.relative, bound, serve, note, written.error)
        write_json(fresh / SIDECAR, _sidecar(plan, base, done, labels))
        write_text(fresh / "README.md", _card(plan, base, done, labels))
    return done


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """The adapter's rank, the dtype that the bound is for, a loader, and a base with the change of a smaller rank."""

    rank: int
    dtype: torch.dtype
    load: Callable[[], Any]
    cut: PreTrainedModel | None = None
    error: float = 0.0


def _write(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    folder: Path,
    options: ExportOptions,
    format: Format,
    base: str,
    load_base: Callable[[], PreTrainedModel],
) -> _Written:
    if format == "merged":
        merged = load_base()
        write_merged(model, plan, folder, merged)
        return _Written(0, merged.dtype, lambda: _load_whole(merged, folder))
    assert isinstance(model, PeftModel)
    change, cut, error = change_of(model, plan), None, 0.0
    if options.rank is not None and options.rank < written_rank(plan):
        change, error = truncated_changes(change, options.rank)
        cut = load_base()
        put_change(cut, change, plan, model)
    rank = write_lora(change, plan, folder, base, portable=format == "portable")
    return _Written(rank, model.dtype, lambda: load_adapter(load_base(), folder), cut, error)


def _load_whole(model: Any, folder: Path) -> Any:
    return type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)


def write_merged(model: PreTrainedModel | PeftModel, plan: Plan, folder: Path, base: PreTrainedModel) -> None:
    """Writes the whole model in the dtype of a freshly loaded base, which is changed."""
    if plan.scope == "all":
        base.load_state_dict(model.state_dict())
    else:
        assert isinstance(model, PeftModel)
        put_change(base, change_of(model, plan), plan, model)
    base.save_pretrained(folder)


def merge(
    adapter: Path | str,
    folder: Path | str,
    *,
    load_base: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Merges any LoRA adapter that PEFT loads into a fresh base, writes the whole model, and returns the gap in logits.

    Raises:
        ModelError: The adapter does not fit the base.
        ExportError: The folder holds something else, or the merged model's logits are not finite.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    if (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"merge to {folder}",
            got="an adapter there",
            wanted="a folder for a whole model",
            next_step="Choose another.",
        )
    wrapped = load_adapter(load_base(), Path(adapter))
    probe = random_probe(wrapped)
    wanted = logits_of(wrapped, probe)
    merged: Any = wrapped.merge_and_unload()
    with atomic_directory(folder) as fresh:
        merged.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        gap = Gap.between(logits_of(_load_whole(merged, fresh), probe), wanted).gap
        if not math.isfinite(gap):
            raise ExportError(
                f"merge to {folder}",
                got="logits that are NaN or infinite",
                wanted="a finite difference to the adapter on its base",
                next_step="Check the adapter's weights, or merge with --dtype float32. Nothing was written.",
            )
        write_json(fresh / SIDECAR, {"base": wrapped.peft_config["default"].base_model_name_or_path, "gap": gap})
    return gap


def _serve_line(
    plan: Plan, format: Format, rank: int, base: str, folder: Path | str, labels: Sequence[str] | None
) -> str:
    if labels is not None:  # vLLM serves no classifier with an adapter
        load = "AutoModelForSequenceClassification.from_pretrained"
        whole = f'{load}("{base}", num_labels={max(1, len(labels))})'
        return f'{load}("{folder}")' if format == "merged" else f'PeftModel.from_pretrained({whole}, "{folder}")'
    if format == "merged":
        return shlex.join(["vllm", "serve", str(folder)])
    if _no_lora(plan, rank):
        return f"{shlex.join(['keeptune', 'merge', str(folder), 'merged'])} && vllm serve merged"
    options = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"tuned={folder}"]
    return shlex.join(["vllm", "serve", base, *options])


def _sidecar(plan: Plan, base: str, done: Exported, labels: list[str] | None) -> dict[str, Any]:
    return {
        "base": base,
        "labels": labels,
        "method": plan.method,
        "options": dict(plan.options),
        "provenance": dict(plan.provenance),
        "plan": plan.key,
        "export": asdict(done),
    }


def _card(plan: Plan, base: str, done: Exported, labels: list[str] | None) -> str:
    options = json.dumps(dict(plan.options))
    note = f"\nA merged model. {done.note}.\n" if done.note else ""
    if done.error:
        note += f"\nCut to a smaller rank: {done.error:.2%} of the trained change (Frobenius) is left out.\n"
    note += f"\nLabels, in the order of the outputs: {', '.join(labels)}.\n" if labels else ""
    return f"""---
base_model: {base}
library_name: {"transformers" if done.format == "merged" else "peft"}
tags: [keeptune, {plan.method}]
---

Tuned from `{base}` by keeptune with the method `{plan.method}` ({options}).

Checked on a freshly loaded base: largest difference in logits {done.gap:.1e}, relative {done.relative_gap:.1e}.
{note}
    {done.serve}
"""
