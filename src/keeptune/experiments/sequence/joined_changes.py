"""What a sequence makes: one change for the original base, the sum of what the stages changed.

    W_k = W + sum_{i<=k} B_i A_i = W + [B_1 .. B_k] [A_1; ..; A_k]        (1)

The factors stand side by side, so nothing is lost and the rank is the sum of the ranks. Stage k trains on W_{k-1} in
float32, formed from the base and the factors of (1) that are on disk: a sequence that goes on after a kill forms the
same bits. Where a stage has no low-rank form (full fine-tuning, DoRA), the product from there on is a whole model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from keeptune.adapter.export import Exported, ExportOptions, export
from keeptune.adapter.install import install
from keeptune.adapter.load import SIDECAR, write_tokenizer
from keeptune.adapter.vllm_rules import SERVED_RANKS
from keeptune.core.artefact import atomic_directory, write_json
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.model.blocks import find_targets
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import starting_from
from keeptune.recipe.sections import ExportSpec

_PREFIX = "base_model.model."


def read_changes(folder: Path) -> dict[str, LowRank]:
    """Reads the changes, by target, of an adapter that keeptune exported, whose scale is 1.

    Zeros that padded them, and targets that did not change, are left out.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            A, B = tensors[key].float(), tensors[f"{stem}.lora_B.weight"].float()
            used = A.any(dim=1) & B.any(dim=0)
            if bool(used.any()):
                changes[stem.removeprefix(_PREFIX)] = LowRank(B[:, used].contiguous(), A[used].contiguous())
    return changes


def joined(earlier: Mapping[str, LowRank], later: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Adds two changes of a model, each target name to change (1).

    Laws: the sum at each target; a target of one of them alone stays as it is; ranks add up.
    """
    both = {name: earlier[name].plus(change) if name in earlier else change for name, change in later.items()}
    return {**earlier, **both}


def add_changes(model: PreTrainedModel, changes: Mapping[str, LowRank]) -> PreTrainedModel:
    """Adds changes to the weights of a float32 model, and returns it."""
    targets = {target.name: target for target in find_targets(model)}
    with torch.no_grad():
        for name, change in changes.items():
            weight = targets[name].view(model.get_parameter(targets[name].parameter))
            weight += change.dense().to(weight.device)
    return model


def plan_of(
    model: PreTrainedModel, changes: Mapping[str, LowRank], options: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Plan:
    """Returns the plan whose installation gives the model with some changes."""
    return Plan(
        method="sequence",
        options=options,
        targets=starting_from([target for target in find_targets(model) if target.name in changes], changes),
        provenance=provenance,
    )


def write_adapter(
    base: Job, changes: Mapping[str, LowRank], folder: Path, wanted: ExportSpec, options: Mapping[str, Any]
) -> Exported:
    """Writes changes as an adapter for the original base, checked on a freshly loaded one.

    A portable adapter of a rank that no server takes keeps its own; ``options`` are how it was made, for the record.

    Raises:
        ExportError: The gap is above the bound, or the folder holds something that keeptune did not write.
    """
    model = base.base()
    made_of = {"model": base.base_fingerprint, "dtype": base.recipe.dtype, "seed": base.seed}
    plan = plan_of(model, changes, options, made_of)
    rank = max(change.rank for change in changes.values())
    too_large = wanted.rank is None and rank > max(SERVED_RANKS)
    tuned = install(model, plan)
    assert isinstance(tuned, PeftModel)
    form = "peft" if too_large and wanted.format == "portable" else wanted.format
    how = ExportOptions(format=form, rank=wanted.rank, max_gap=wanted.max_gap)
    return export(tuned.eval(), plan, folder, how, base=base.export_base, tokenizer=base.tokenizer)


def write_whole(base: Job, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes a whole model in a dtype, with its tokenizer and the name of its base, whole or not at all."""
    with atomic_directory(folder) as fresh:
        model.to(dtype).save_pretrained(fresh)
        write_tokenizer(base.tokenizer, model, fresh, base.export_base.ends)
        write_json(fresh / SIDECAR, {"base": base.recipe.model})
