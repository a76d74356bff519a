"""What repair works on: a trained model's changes, and the covariances of the inputs that they act on."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.load import load_adapter
from keeptune.core.errors import ModelError
from keeptune.core.low_rank import LowRank
from keeptune.linalg.rescaled import Rescaled
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import Head, body_fingerprint
from keeptune.model.pretrained import Dtype, LoadOptions, load_model, load_tokenizer
from keeptune.pipeline.merge import head_of_adapter, trained_in
from keeptune.pipeline.scoring import result_fingerprint
from keeptune.pipeline.trained_changes import not_finite, open_changes, result_of

__all__ = ["TrainedModel", "open_trained"]

_log = logging.getLogger(__name__)
_KEY = re.compile(r"^(.+?)\.(?:lora_A\.|lora_B\.(?!bias$)|lora_magnitude_vector\b|weight$)")


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """A trained model beside its base.

    Args:
        folder: The adapter, or the whole model.
        base: Path or hub id of the base.
        model: The base, loaded.
        tokenizer: Its tokenizer.
        fingerprint: Of the base's weights.
        weights: Fingerprint of the adapter's.
        dtype: The dtype that the base is loaded in.
        head: Of a classifier; None for a language model.
        device: Where models run.
        changes: Target name to ΔW, float32: factors, or factors of full size where it has no low-rank form.
        exact: Names of the targets whose change has a low-rank form of its own.
        dropped: Names of what was trained besides linear maps: no part of the result.
    """

    folder: Path
    base: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    weights: str
    dtype: Dtype
    head: Head | None
    device: str
    changes: Mapping[str, LowRank]
    exact: frozenset[str]
    dropped: tuple[str, ...]

    def load_base(self) -> PreTrainedModel:
        """Loads a fresh base.

        Returns:
            The model, in evaluation mode.
        """
        return load_model(self.base, LoadOptions(dtype=self.dtype, device=self.device, head=self.head))

    def load_tuned(self) -> PreTrainedModel:
        """Loads the trained model: the adapter on a fresh base, or the whole model.

        Returns:
            The model, in evaluation mode.
        """
        if not (self.folder / "adapter_config.json").is_file():
            return load_model(str(self.folder), LoadOptions(dtype=self.dtype, device=self.device, head=self.head))
        inner: PreTrainedModel = load_adapter(self.load_base(), self.folder).get_base_model()
        return inner.eval()

    def head_values(self) -> dict[str, Tensor]:
        """Reads a classifier's trained head.

        Returns:
            Parameter names in the base model to values; empty for a language model.
        """
        heads = tuple(f"{name}." for name in head_of(self.model))
        stored = _tensors_in(self.folder) if heads else ()
        named = ((key.removeprefix("base_model.model."), value) for key, value in stored)
        return {name: value.float() for name, value in named if name.startswith(heads)}


def open_trained(source: str, base: str | None, device: str) -> TrainedModel:
    """Loads a trained model's changes and its base.

    Args:
        source: A PEFT adapter folder, a run folder of keeptune, or a whole model.
        base: The base; None takes what the source names.
        device: Where models run.

    Returns:
        The changes, with what they act on.

    Raises:
        ModelError: It cannot be loaded, is of another base, changed none of the weights, or is not finite.
    """
    folder = result_of(source)
    head = head_of_adapter(folder)
    name, moved = open_changes(source, base=base, device=device)
    changes, exact = {}, set()
    for target, _, change in moved:
        if change is None:
            continue
        if isinstance(change, LowRank):
            factors = change.to(torch.float32, "cpu")
            exact.add(target.name)
        else:
            factors = _whole((change.dense() if isinstance(change, Rescaled) else change).to("cpu", torch.float32))
        if not (torch.isfinite(factors.B).all() and torch.isfinite(factors.A).all()):
            raise not_finite(source, target)
        if not factors.is_zero:
            changes[target.name] = factors
    if not changes:
        raise ModelError(
            source,
            got="a model that changed no linear map of its base",
            wanted="an adapter or a model that was trained",
            next_step="Check that it is the trained model, and that --base is the model it started from.",
        )
    dtype: Dtype = trained_in(folder) or "auto"
    model = load_model(name, LoadOptions(dtype=dtype, device=device, head=head))
    besides = _trained_besides if (folder / "adapter_config.json").is_file() else _moved_besides
    return TrainedModel(
        folder=folder,
        base=name,
        model=model,
        tokenizer=load_tokenizer(name),
        fingerprint=body_fingerprint(model),
        weights=result_fingerprint(folder),
        dtype=dtype,
        head=head,
        device=device,
        changes=changes,
        exact=frozenset(exact & changes.keys()),
        dropped=besides(folder, model),
    )


def _whole(change: Tensor) -> LowRank:
    """Returns a matrix as a product, with the identity on its longer side."""
    m, n = change.shape
    return LowRank(change, torch.eye(n)) if m >= n else LowRank(torch.eye(m), change)


def _tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                yield key, tensors.get_tensor(key)


def _trained_besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Names what an adapter's file holds besides changes of linear maps and a head: biases, embeddings, norms."""
    targets = {target.name for target in find_targets(base)}
    heads = tuple(f"{name}." for name in head_of(base))
    besides = set()
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        keys = [key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in tensors.keys()]  # noqa: SIM118 - not a mapping
    for name in keys:
        match = _KEY.match(name)
        if not (heads and name.startswith(heads)) and not (match and match[1] in targets):
            besides.add(match[1] if match else name)
    return tuple(sorted(besides))


def _moved_besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Names the parameters of a whole model that differ from the base's and are no weight of a linear map."""
    weights = {f"{target.name}.weight" for target in find_targets(base)}
    heads = tuple(f"{name}." for name in head_of(base))
    before = {name: value.cpu() for name, value in base.state_dict().items() if name not in weights}
    return tuple(
        sorted(
            name
            for name, after in _tensors_in(folder)
            if name in before
            and not (heads and name.startswith(heads))
            and not torch.equal(after.to(before[name].dtype), before[name])
        )
    )
