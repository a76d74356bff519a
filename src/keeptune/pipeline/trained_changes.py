"""The weight changes of any trained model: an adapter, a run folder of keeptune, or a whole model beside its base.

The change of a LoRA or DoRA adapter is given by its factors: the product B A is never formed. What has no such form
(a whole model, an adapter of another kind, one that rewrites its base when loaded: PiSSA) is compared weight by weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.adapter.load import SIDECAR, check_base, load_adapter
from keeptune.core.artefact import read_json
from keeptune.core.errors import ModelError, RecipeError
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target, read_weight
from keeptune.linalg.rescaled import Rescaled
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import Dtype, LoadOptions, load_model
from keeptune.pipeline.merge import base_of, head_of_adapter, trained_in
from keeptune.pipeline.scoring import find_result
from keeptune.recipe.paths import resolve_model

__all__ = ["Change", "labels_of", "not_finite", "open_changes", "result_of", "size_of"]

_log = logging.getLogger(__name__)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others take a part out of the base when loaded
_TUNED = (BaseTunerLayer, ModulesToSaveWrapper)
Change = LowRank | Rescaled | Tensor
_Changes = Iterator[tuple[Target, Tensor, Change | None]]


def open_changes(
    source: str, *, base: str | None = None, roles: Sequence[str] | None = None, device: str = "cpu"
) -> tuple[str, _Changes]:
    """Loads a trained model and its base, and yields the change of one target after the other.

    Args:
        source: A PEFT adapter folder, a run folder of keeptune, or a whole model.
        base: The base; None takes what the source names.
        roles: Roles of the targets; None is all linear maps but the head.
        device: Where the weights are.

    Returns:
        The base, and for each target its W and its change (None for one left alone): factors where it has them,
        with new lengths of rows for DoRA, else the difference of the weights.

    Raises:
        ModelError: The source or its base cannot be loaded or do not belong together.
        PlanError: A role does not exist.
    """
    folder = result_of(source)
    is_adapter = (folder / "adapter_config.json").is_file()
    name = resolve_model(base or (base_of(folder) if is_adapter else _named_by(folder, source)))
    head = head_of_adapter(folder)
    dtype: Dtype = (trained_in(folder) if is_adapter else None) or "auto"

    def load_base() -> PreTrainedModel:
        return load_model(name, LoadOptions(dtype=dtype, device=device, head=head))

    model = load_base()
    every, targets = find_targets(model), find_targets(model, roles)
    bar = tqdm(targets, desc="change", delay=2, disable=None, leave=False)
    if is_adapter:
        check_base(folder, body_fingerprint(model), None if head is None else head.labels)
        wrapped = load_adapter(model, folder)
        layers = _layers_of(wrapped, folder, {target.name for target in every})
        if layers is not None:
            return name, _from_layers(layers, model, bar)
        _log.info("%s: not plain LoRA or DoRA; merged into its base to be measured", folder)
        return name, _between(load_base(), _merged(wrapped, folder), bar, str(folder))
    tuned = load_model(str(folder) if folder.is_dir() else source, LoadOptions(device=device, head=head))
    return name, _between(model, tuned, bar, source)


def size_of(change: Change) -> float:
    """Computes the Frobenius norm of a change, in float64, from its factors where it has them.

    Args:
        change: The change.

    Returns:
        The norm.
    """
    if isinstance(change, LowRank):
        return float(change.to(torch.float64).norm_squared().clamp_min(0).sqrt())
    return change.norm() if isinstance(change, Rescaled) else float(change.double().norm())


def not_finite(source: str, target: Target) -> ModelError:
    """Returns the error of a change that is NaN or infinite.

    Args:
        source: The trained model.
        target: The target whose change it is.

    Returns:
        The error, to be raised.
    """
    return ModelError(
        f"{source}, {target.name}",
        got="a change that is NaN or infinite",
        wanted="finite weights",
        next_step="Check the training's losses; the adapter or model is damaged.",
    )


def _layers_of(wrapped: PeftModel, folder: Path, known: Set[str]) -> dict[str, Any] | None:
    """Returns the layers of a plain LoRA or DoRA by target; None for an adapter that is more than that."""
    inner, config = wrapped.get_base_model(), wrapped.peft_config["default"]
    tuned = {name: layer for name, layer in inner.named_modules() if isinstance(layer, _TUNED)}
    outside = sorted(tuned.keys() - known - set(head_of(inner)))
    if outside:
        _log.warning("%s: %s is no linear map of the model's body; left out", folder, ", ".join(outside))
    layers = {name: layer for name, layer in tuned.items() if name in known}
    plain = config.peft_type == "LORA" and config.init_lora_weights in _PLAIN_STARTS
    return layers if plain and all(_has_factors(layer) for layer in layers.values()) else None


def _has_factors(layer: Any) -> bool:
    """Whether a layer is LoRA's or DoRA's over a linear map."""
    variant = getattr(layer, "lora_variant", {}).get("default")
    return isinstance(layer, LoraLinear) and (variant is None or isinstance(variant, DoraLinearVariant))


def _from_layers(layers: Mapping[str, Any], model: PreTrainedModel, targets: Iterable[Target]) -> _Changes:
    """Yields the factors of each target that has a layer, and DoRA's magnitudes where it has those."""
    for target in targets:
        layer = layers.get(target.name)
        if layer is None:
            yield target, read_weight(model, target), None
            continue
        stored = layer.get_base_layer().weight.detach()
        W = (stored.T if target.transposed else stored).float()
        factors = LowRank(layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach())
        change = factors.to(torch.float64).scaled(layer.scaling["default"])
        if "default" in layer.lora_variant:
            yield target, W, Rescaled(W, change, layer.lora_magnitude_vector["default"].weight.detach())
        else:
            yield target, W, change


def _between(base: PreTrainedModel, tuned: PreTrainedModel, targets: Iterable[Target], where: str) -> _Changes:
    """Yields the difference of two whole models, weight by weight."""
    for target in targets:
        before = read_weight(base, target)
        try:
            after = read_weight(tuned, target)
        except AttributeError as error:
            raise _other_base(where, base, f"no module {target.name}") from error
        if after.shape != before.shape:
            raise _other_base(where, base, f"{target.name} of shape {tuple(after.shape)}, not {tuple(before.shape)}")
        yield target, before, after.double() - before.double()


def _merged(wrapped: PeftModel, folder: Path) -> PreTrainedModel:
    try:
        return wrapped.merge_and_unload()
    # AttributeError: prompt tuning and its like have nothing to merge; ValueError, NotImplementedError: a kind or a
    # base that PEFT does not merge.
    except (AttributeError, ValueError, NotImplementedError) as error:
        kind = wrapped.peft_config["default"].peft_type
        raise ModelError(
            f"adapter {folder}",
            got=f"an adapter of type {getattr(kind, 'value', kind)}, which PEFT does not merge into weights",
            wanted="an adapter that changes weights: LoRA, DoRA or another that can be merged",
            next_step="Measure another adapter, or merge it yourself and give the whole model.",
        ) from error


def _other_base(where: str, base: PreTrainedModel, got: str) -> ModelError:
    return ModelError(
        where, got=got, wanted=f"a model tuned from {base.name_or_path}", next_step="Name its own base with --base."
    )


def result_of(source: str) -> Path:
    """Returns the adapter or model that a source stands for: itself, or what a run exported.

    Args:
        source: An adapter, a run folder, or a model.

    Returns:
        The folder; for a hub id, one that does not exist.

    Raises:
        ModelError: The run exported nothing yet.
    """
    folder = Path(source).expanduser()
    is_run = (folder / "plan").is_dir() and not (folder / "config.json").is_file()
    return find_result(folder) if is_run else folder


def _named_by(folder: Path, source: str) -> str:
    """Returns the base of a whole model, from keeptune's own record."""
    named = read_json(folder / SIDECAR).get("base") if (folder / SIDECAR).is_file() else None
    if named is None:
        raise ModelError(
            source,
            got="a whole model that names no base" if folder.is_dir() else "no such folder, and no --base",
            wanted="the base that it was tuned from",
            next_step="Name it with --base, or give an adapter folder.",
        )
    return str(named)


def labels_of(sources: Sequence[str]) -> list[str]:
    """Names each source by its folder, or by the run's that it is in; by its whole path where two would be alike.

    Args:
        sources: Adapters, run folders, or models.

    Returns:
        A label for each.

    Raises:
        RecipeError: One is given twice.
    """
    named = [result_of(source).absolute() for source in sources]
    short = [path.parent.name if path.name in ("adapter", "merged") else path.name for path in named]
    twice = next((source for source in sources if named.count(result_of(source).absolute()) > 1), None)
    if twice is not None:
        raise RecipeError(
            "command line", got=f"{twice} twice", wanted="each adapter or model once", next_step="Leave one out."
        )
    return [label if short.count(label) == 1 else str(source) for label, source in zip(short, sources, strict=True)]
