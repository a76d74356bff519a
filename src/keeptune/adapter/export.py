"""export: the trained change, relative to the original base, as files that stock PEFT loads.

``portable``: scale folded into B, zero-padded to one uniform rank that servers allow, plain config.
``peft``: per-module ranks in ``rank_pattern``, no padding. ``merged``: a whole model.

Every export is loaded again by stock PEFT on a freshly loaded base, and the gap in logits to the trained
model is measured; above the bound the export fails and leaves nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.install import trained_factors
from keeptune.core.artefact import (
    atomic_directory,
    read_json,
    write_bytes,
    write_json,
    write_tensors,
)
from keeptune.core.errors import ExportError, ModelError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan

__all__ = [
    "SIDECAR",
    "Exported",
    "Format",
    "change_of",
    "check_base",
    "export",
    "load_adapter",
    "merge",
    "random_probe",
]

Format = Literal["portable", "peft", "merged"]
SIDECAR = "keeptune.json"
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM accepts
_BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-4}


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote and how well it reproduces the trained model.

    Args:
        folder: Where.
        format: Which.
        rank: The adapter's rank; 0 for a merged model.
        gap: Largest difference in logits to the trained model on the probe, absolute.
        relative_gap: The same over the largest logit.
        bound: The relative gap above which the export would have failed.
        serve: How to serve it.
    """

    folder: str
    format: Format
    rank: int
    gap: float
    relative_gap: float
    bound: float
    serve: str


def change_of(model: PeftModel, plan: Plan) -> dict[str, LowRank]:
    """Compute each target's change relative to the original base: ``s (B A - B0 A0)``, exactly.

    Args:
        model: The trained model.
        plan: Its plan.

    Returns:
        Target name to change, scale folded into B; rank r, or 2 r where the start was a part of W and both
        factors were trained.
    """
    changes = {}
    for name, factors in trained_factors(model, plan).items():
        target_plan = plan[name]
        change = factors.minus(target_plan.anchor) if target_plan.anchored else factors
        changes[name] = change.scaled(target_plan.scale)
    return changes


def export(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    folder: Path | str,
    *,
    base: str,
    load_base: Callable[[], PreTrainedModel],
    format: Format = "portable",
    tokenizer: PreTrainedTokenizerBase | None = None,
    probe: Tensor | None = None,
    max_gap: float | None = None,
) -> Exported:
    """Write the trained change and check it on a freshly loaded base.

    Args:
        model: The trained model, from :func:`keeptune.adapter.install.install`.
        plan: Its plan.
        folder: Where; it appears whole or not at all.
        base: Path or hub id of the base, written into the adapter's config.
        load_base: Loads a fresh base.
        format: ``"portable"``, ``"peft"`` or ``"merged"``; full fine-tuning can only be merged.
        tokenizer: Saved along when given.
        probe: Token ids ``(batch, length)`` for the check; None draws some.
        max_gap: Largest relative gap allowed; None takes 1e-4 for a float32 base, 2e-2 for float16 and
            1e-1 for bfloat16.

    Returns:
        Where it is and how large the gap is.

    Raises:
        ExportError: The gap is above the bound, the format does not fit the plan, or the folder holds something
            that keeptune did not write.
    """
    if plan.scope == "all" and format != "merged":
        raise ExportError(
            f"export {folder}",
            got=f'format "{format}" for full fine-tuning',
            wanted='"merged"',
            next_step="A change of every weight has no adapter form.",
        )
    _refuse_foreign(Path(folder))
    probe = random_probe(model) if probe is None else probe
    wanted = _logits(model, probe)
    with atomic_directory(Path(folder)) as fresh:
        if format == "merged":
            rank, merged = 0, load_base()
            _write_merged(model, plan, fresh, merged)
            dtype = merged.dtype
            again: Any = type(merged).from_pretrained(fresh, dtype=dtype, use_safetensors=True)
        else:
            rank = _write_adapter(change_of(model, plan), plan, fresh, base, portable=format == "portable")
            dtype = model.dtype
            again = PeftModel.from_pretrained(load_base(), str(fresh))
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        gap = float((_logits(again, probe) - wanted).abs().max())
        relative = gap / max(float(wanted.abs().max()), 1e-30)
        bound = _BOUNDS[dtype] if max_gap is None else max_gap
        done = Exported(str(folder), format, rank, gap, relative, bound, _serve_line(format, rank, base, folder))
        if not relative <= bound:
            raise ExportError(
                f"export {folder}",
                got=f"logits that differ from the trained model by {relative:.2e} (relative)",
                wanted=f"at most {bound:.0e}",
                next_step="On a 16-bit base train with `anchor: twin`, or state a larger `max_gap`. "
                "Nothing was written.",
            )
        write_json(fresh / SIDECAR, _sidecar(plan, base, done))
        write_bytes(fresh / "README.md", _card(plan, base, done).encode())
    return done


def merge(
    adapter: Path | str,
    folder: Path | str,
    *,
    load_base: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Merge an adapter into its base and write the whole model.

    Args:
        adapter: Any LoRA adapter that PEFT loads.
        folder: Where the model goes.
        load_base: Loads a fresh base.
        tokenizer: Saved along when given.

    Returns:
        The largest difference in logits between adapter on base and merged model.

    Raises:
        ModelError: The adapter does not fit the base.
        ExportError: The folder holds something else, or the merged model gives no numbers.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    if (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"merge to {folder}",
            got="an adapter there",
            wanted="a folder for a whole model",
            next_step="Choose another.",
        )
    wrapped = load_adapter(load_base(), Path(adapter))
    probe = random_probe(wrapped)
    wanted = _logits(wrapped, probe)
    merged: Any = wrapped.merge_and_unload()
    with atomic_directory(folder) as fresh:
        merged.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        again = type(merged).from_pretrained(fresh, dtype=merged.dtype, use_safetensors=True)
        gap = float((_logits(again, probe) - wanted).abs().max())
        if not math.isfinite(gap):
            raise ExportError(
                f"merge to {folder}",
                got="logits that are NaN or infinite",
                wanted="a finite difference to the adapter on its base",
                next_step="Check the adapter's weights, or merge with --dtype float32. Nothing was written.",
            )
        write_json(fresh / SIDECAR, {"base": wrapped.peft_config["default"].base_model_name_or_path, "gap": gap})
    return gap


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put an adapter from disk on a base, by stock PEFT, from safetensors only.

    Args:
        model: The base.
        folder: The adapter's folder.

    Returns:
        The model with the adapter, in evaluation mode.

    Raises:
        ModelError: The folder holds no adapter for this base.
    """
    _need_safetensors(folder)
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder))
    # RuntimeError: other shapes; ValueError: other module names; TypeError and KeyError: another config.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"adapter {folder}",
            got=" ".join(str(error).split())[:300],
            wanted=f"a PEFT adapter for this base ({model.name_or_path})",
            next_step="Pass the base that the adapter was trained on.",
        ) from error
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _refuse_foreign(folder: Path) -> None:
    """Never replace what keeptune did not write; its own results have a sidecar."""
    if not folder.exists() or (folder / SIDECAR).is_file() or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise ExportError(
        str(folder),
        got="something that keeptune did not write",
        wanted="a new or an empty folder",
        next_step="Choose another folder, or remove this one.",
    )


def _need_safetensors(folder: Path) -> None:
    wanted = ("adapter_config.json", "adapter_model.safetensors")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"adapter {folder}",
            got=f"no {missing[0]}" if folder.is_dir() else "no such folder",
            wanted="a PEFT adapter with safetensors weights; pickled ones are not loaded",
            next_step="Give the `adapter` folder of a run.",
        )


def check_base(adapter: Path | str, fingerprint: str) -> None:
    """Refuse an adapter that was made for another base.

    Args:
        adapter: The adapter's folder; one without keeptune's sidecar is not checked.
        fingerprint: Of the base at hand.

    Raises:
        ModelError: The adapter belongs to another base.
    """
    sidecar = Path(adapter) / SIDECAR
    if not sidecar.is_file():
        return
    record = read_json(sidecar)
    made_for = record.get("provenance", {}).get("model")
    if made_for is not None and made_for != fingerprint:
        raise ModelError(
            f"adapter {adapter}",
            got="a base whose weights are not the ones it was made for",
            wanted=f"{record['base']} (fingerprint {made_for[:12]}, not {fingerprint[:12]})",
            next_step="Pass the base that the adapter was trained on, in the dtype it was trained in.",
        )


def random_probe(model: PreTrainedModel | PeftModel, seed: int = 0) -> Tensor:
    """Draw token ids to compare logits on.

    Args:
        model: The model.
        seed: The seed.

    Returns:
        ``(4, 32)`` token ids on the model's device.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (4, 32), generator=generator)
    return ids.to(model.device)


def _logits(model: Any, probe: Tensor) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=probe.to(model.device)).logits.float().cpu()
    model.train(training)
    return logits


def _write_adapter(changes: Mapping[str, LowRank], plan: Plan, folder: Path, base: str, *, portable: bool) -> int:
    rank = max(change.rank for change in changes.values())
    if portable:
        rank = next((r for r in _SERVED_RANKS if r >= rank), rank)
        changes = {name: change.padded(rank) for name, change in changes.items()}
    ranks = {name: change.rank for name, change in changes.items() if change.rank != rank}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(changes),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=plan.targets[0].target.transposed,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, change in changes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = change.A
        tensors[f"base_model.model.{name}.lora_B.weight"] = change.B
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return rank


def _write_merged(model: PreTrainedModel | PeftModel, plan: Plan, folder: Path, fresh: PreTrainedModel) -> None:
    """Write the whole model in the base's dtype, whatever it was trained in."""
    if plan.scope == "all":
        fresh.load_state_dict(model.state_dict())
        fresh.save_pretrained(folder)
        return
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for name, change in change_of(model, plan).items():
            weight = fresh.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            delta = change.to(torch.float32, weight.device).dense()
            delta = delta.T if plan[name].target.transposed else delta
            weight.copy_((weight.float() + delta).to(weight.dtype))
    fresh.save_pretrained(folder)


def _serve_line(format: Format, rank: int, base: str, folder: Path | str) -> str:
    if format == "merged":
        return f"vllm serve {folder}"
    return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={folder}"


def _sidecar(plan: Plan, base: str, done: Exported) -> dict[str, Any]:
    return {
        "base": base,
        "method": plan.method,
        "options": dict(plan.options),
        "provenance": dict(plan.provenance),
        "plan": plan.key,
        "export": asdict(done),
    }


def _card(plan: Plan, base: str, done: Exported) -> str:
    options = json.dumps(dict(plan.options))
    return f"""---
base_model: {base}
library_name: {"transformers" if done.format == "merged" else "peft"}
tags: [keeptune, {plan.method}]
---

Tuned from `{base}` by keeptune with the method `{plan.method}` ({options}).

Checked on a freshly loaded base: largest difference in logits {done.gap:.1e}, relative {done.relative_gap:.1e}.

    {done.serve}
"""
