"""What repair works on: a trained model's changes as factors, and what else was trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import ModelError
from keeptune.core.low_rank import LowRank
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import load_tokenizer
from keeptune.pipeline.scoring import result_fingerprint
from keeptune.pipeline.trained_changes import Change, TrainedModel

_KEY = re.compile(r"^(.+?)\.(?:lora_A\.|lora_B\.(?!bias$)|lora_magnitude_vector\b|weight$)")


@dataclass(frozen=True, slots=True, eq=False)
class FactoredModel:
    """A trained model whose changes are all factors, with its base.

    Args:
        trained: The trained model on disk.
        model: The base, loaded.
        tokenizer: Its tokenizer.
        fingerprint: Of the base's weights.
        weights: Fingerprint of the adapter's, or the whole model's.
        changes: Target name to ΔW, float32: factors, or factors of full size where it has no low-rank form.
        exact: Names of the targets whose change has a low-rank form of its own.
        dropped: Names of what was trained besides linear maps: no part of the result.
    """

    trained: TrainedModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    weights: str
    changes: Mapping[str, LowRank]
    exact: frozenset[str]
    dropped: tuple[str, ...]

    @classmethod
    def of(cls, trained: TrainedModel) -> FactoredModel:
        """Loads a trained model's changes and its base.

        Raises:
            ModelError: It cannot be loaded, is of another base, changed none of the weights, or is not finite.
        """
        changes, exact = {}, set()
        for target, _, change in trained.changes():
            if change is None:
                continue
            factors = _factors(change)
            if not factors.is_zero:
                changes[target.name] = factors
                exact |= {target.name} if isinstance(change, LowRank) else set()
        if not changes:
            raise ModelError(
                trained.source,
                got="a model that changed no linear map of its base",
                wanted="an adapter or a model that was trained",
                next_step="Check that it is the trained model, and that --base is the model it started from.",
            )
        model = trained.load_base()
        return cls(
            trained=trained,
            model=model,
            tokenizer=load_tokenizer(trained.base),
            fingerprint=body_fingerprint(model),
            weights=result_fingerprint(trained.folder),
            changes=changes,
            exact=frozenset(exact),
            dropped=(_trained_besides if trained.is_adapter else _moved_besides)(trained.folder, model),
        )

    def head_values(self) -> dict[str, Tensor]:
        """Returns a classifier's trained head, parameter names in the base to values; empty for a language model."""
        heads = tuple(f"{name}." for name in head_of(self.model))
        stored = _tensors_in(self.trained.folder) if heads else ()
        named = ((key.removeprefix("base_model.model."), value) for key, value in stored)
        return {name: value.float() for name, value in named if name.startswith(heads)}


def _factors(change: Change) -> LowRank:
    """Returns a change as a product, float32 on the CPU; one without factors has the identity on its longer side."""
    if isinstance(change, LowRank):
        return change.to(torch.float32, "cpu")
    whole = change.to("cpu", torch.float32)
    m, n = whole.shape
    return LowRank(whole, torch.eye(n)) if m >= n else LowRank(torch.eye(m), whole)


def _tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                yield key, tensors.get_tensor(key)


def _trained_besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Names what an adapter's file holds besides changes of linear maps and a head: biases, embeddings, norms."""
    targets = {name for target in find_targets(base) for name in (target.name, target.module)}
    heads = tuple(f"{name}." for name in head_of(base))
    besides = set()
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        keys = [key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in tensors.keys()]  # noqa: SIM118 - not a mapping
    for name in keys:
        match = _KEY.match(name)
        if not name.startswith(heads) and not (match and match[1] in targets):
            besides.add(match[1] if match else name)
    return tuple(sorted(besides))


def _moved_besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Names the parameters of a whole model that differ from the base's and are no weight of a linear map."""
    weights = {target.parameter for target in find_targets(base)}
    heads = tuple(f"{name}." for name in head_of(base))
    before = {name: value.cpu() for name, value in base.state_dict().items() if name not in weights}
    kept = ((name, after) for name, after in _tensors_in(folder) if name in before and not name.startswith(heads))
    return tuple(sorted(name for name, after in kept if not torch.equal(after.to(before[name].dtype), before[name])))
