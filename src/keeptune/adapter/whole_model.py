"""Whole models: the trained change, or an adapter from disk, merged into its base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.install import lora_layer
from keeptune.adapter.load import SIDECAR, load_adapter, refuse_foreign
from keeptune.adapter.portable import biases_of, change_of, magnitudes_of
from keeptune.adapter.probe import logits_of, random_probe
from keeptune.adapter.subspace import subspace_change
from keeptune.adapter.trained_head import put_head, trained_head
from keeptune.core.artefact import atomic_directory, write_json
from keeptune.core.errors import ExportError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan

__all__ = ["merge", "put_changes", "write_merged"]


def write_merged(model: PreTrainedModel | PeftModel, plan: Plan, folder: Path, fresh: PreTrainedModel) -> None:
    """Write the whole model in the base's dtype, whatever it was trained in.

    Args:
        model: The trained model.
        plan: Its plan.
        folder: Where.
        fresh: A freshly loaded base; it is changed.
    """
    if plan.scope == "all":
        fresh.load_state_dict(model.state_dict())
        fresh.save_pretrained(folder)
        return
    assert isinstance(model, PeftModel)
    put_changes(fresh, model, plan, {} if plan.scope == "subspace" else change_of(model, plan))
    fresh.save_pretrained(folder)


def put_changes(fresh: PreTrainedModel, model: PeftModel, plan: Plan, changes: Mapping[str, LowRank]) -> None:
    """Write a trained change into the weights of a base.

    Args:
        fresh: A freshly loaded base; it is changed.
        model: The trained model, for what is no low-rank change.
        plan: Its plan.
        changes: Each target's change, where it is of low rank.
    """
    magnitudes = {} if plan.scope == "subspace" else magnitudes_of(model, plan)
    biases = {} if plan.scope == "subspace" else biases_of(model, plan)
    with torch.no_grad():
        for target_plan in plan.targets:
            name = target_plan.target.name
            module = fresh.get_submodule(name)
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor)
            turned = weight.T if target_plan.target.transposed else weight
            change = changes[name].dense() if name in changes else subspace_change(lora_layer(model, name))
            tuned = turned.float() + change.to(weight.device)
            if name in magnitudes:
                tuned *= (magnitudes[name].to(weight.device) / tuned.norm(dim=1))[:, None]
            turned.copy_(tuned.to(weight.dtype))
            if name in biases:
                assert isinstance(bias, Tensor)
                bias.copy_((bias.float() + biases[name].to(bias.device)).to(bias.dtype))
    put_head(fresh, plan, trained_head(model, plan))


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
        again = type(merged).from_pretrained(fresh, dtype=merged.dtype, use_safetensors=True)
        gap = float((logits_of(again, probe) - wanted).abs().max())
        if not math.isfinite(gap):
            raise ExportError(
                f"merge to {folder}",
                got="logits that are NaN or infinite",
                wanted="a finite difference to the adapter on its base",
                next_step="Check the adapter's weights, or merge with --dtype float32. Nothing was written.",
            )
        write_json(fresh / SIDECAR, {"base": wrapped.peft_config["default"].base_model_name_or_path, "gap": gap})
    return gap
