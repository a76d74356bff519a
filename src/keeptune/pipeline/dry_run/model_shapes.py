"""The shape of a model without its weights and without the network: its config, or what is known of its hub id."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from keeptune.core.errors import ModelError, nearest
from keeptune.core.target import Target
from keeptune.model.blocks import depth, down_projections, find_targets, head_of, is_nested, positions
from keeptune.model.gguf import check_gguf, gguf_error, place_of
from keeptune.model.quantization import stored_quantization

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # where configs say how many there are
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class ModelShape:
    """Shape of a model, as estimates need it; the letters are the symbols of ``estimate.py``."""

    name: str  # the folder or hub id
    source: str  # of the shape: ``config.json``, ``a GGUF file``, ``the hub's cache`` or ``known shapes``
    dtype: str  # of the weights as they would be loaded
    stored: int  # bytes of the weights' files, in the dtype of the config
    parameters: int  # P, a classifier's head among them
    head_parameters: int  # of a classifier's head, which is trained in full
    vocabulary: int  # V; 0 for a classifier
    hidden: int  # h
    blocks: int  # L
    attention: int  # a, numbers of all query heads together
    cached: int  # k, numbers of all key heads together; values are as many
    positions: int | None  # how many tokens fit; None where there is no limit
    linear: tuple[Target, ...]  # all linear maps but the head
    routed: float  # of the experts of a mixture, how many each token reaches
    quantization: Mapping[str, Any] | None  # how its checkpoint is packed: the config's fields
    model: PreTrainedModel  # on the meta device, which holds shapes only

    @property
    def size(self) -> int:
        """Bytes of one number of the weights."""
        return _BYTES[self.dtype]

    def targets(self, roles: Iterable[str] | None, layers: Iterable[int] | None) -> list[Target]:
        """Returns what :func:`keeptune.model.blocks.find_targets` does, without its forward pass.

        Raises:
            PlanError: A role or a block does not exist in this model.
        """
        known_roles, known_layers = {t.role for t in self.linear}, {t.layer for t in self.linear}
        wanted = known_roles if roles is None else set(roles)
        blocks = known_layers if layers is None else set(layers)
        if not blocks or not (wanted <= known_roles and blocks <= known_layers):
            return find_targets(self.model, roles, layers)  # which raises the error
        return [target for target in self.linear if target.role in wanted and target.layer in blocks]

    @cached_property
    def downs(self) -> frozenset[str]:
        """Names of the MLPs' down-projections."""
        return frozenset(target.name for target in down_projections(self.model))

    def share(self, target: Target) -> float:
        """Returns the share of the tokens that reach a target: all, but of an expert among others."""
        return self.routed if target.expert is not None or is_nested(target.name) else 1.0

    @cached_property
    def active(self) -> float:
        """Numbers of the linear maps that a token passes through, without the head."""
        return sum(self.share(target) * target.out_features * target.in_features for target in self.linear)

    @cached_property
    def wide(self) -> int:
        """Numbers that an MLP of one block keeps of each token besides its input: f for GELU, 3 f for a gated one.

        Of a mixture, those of all experts that a token reaches.
        """
        block = [target for target in self.linear if target.layer == self.blocks // 2]
        experts = [target for target in block if self.share(target) < 1]
        block = experts or block
        downs = [target.in_features for target in block if target.out_features == self.hidden]
        inner = max(downs, default=1)
        # Gate and up are two maps, or one of twice the width.
        gated = sum(target.out_features // inner for target in block if target.out_features in (inner, 2 * inner)) > 1
        reached = max(1.0, self.routed * len(downs)) if experts else 1.0
        return int((3 if gated else 1) * inner * reached)


def model_shape(
    name: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    labels: int | None = None,
    trust_remote_code: bool = False,
) -> ModelShape:
    """Returns a model's shape without fetching anything.

    Args:
        name: A folder, a GGUF file, or a hub id: its config in the hub's cache, else what is known of it.
        dtype: ``"auto"`` takes that of the config.
        revision: Branch, tag or commit on the hub.
        labels: Outputs of a classifier's head; None for a causal language model.
        trust_remote_code: Whether Python code of the model's repository may run.

    Raises:
        ModelError: There is no config on this machine and the shape is not known.
    """
    config, source = _config(name, revision, trust_remote_code)
    kind: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    if labels is not None:
        config.num_labels = labels
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code)
    own = model.config.get_text_config()
    heads = own.num_attention_heads
    width = getattr(own, "head_dim", None) or own.hidden_size // heads
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    parameters = sum(p.numel() for p in model.parameters())
    experts = next((n for key in _EXPERTS if (n := getattr(own, key, None))), None)
    return ModelShape(
        name=name,
        source=source,
        dtype=stored if dtype == "auto" else dtype,
        stored=_BYTES[stored] * parameters,
        parameters=parameters,
        head_parameters=sum(p.numel() for part in head_of(model) for p in model.get_submodule(part).parameters()),
        vocabulary=own.vocab_size if labels is None else 0,
        hidden=own.hidden_size,
        blocks=depth(model),
        attention=heads * width,
        cached=(getattr(own, "num_key_value_heads", None) or heads) * width,
        positions=positions(model),
        linear=tuple(find_targets(model)),
        routed=own.num_experts_per_tok / experts if experts else 1.0,
        quantization=stored_quantization(config),
        model=model,
    )


def known_models() -> dict[str, dict[str, Any]]:
    """Returns configs of models that people tune, by hub id, so that their shapes need neither a file nor the network.

    The values are those of each one's config.json, of Gemma 3 without the part that reads images. Where a paper or a
    model card counts parameters, its count and that of the shape agree (``tests/pipeline/dry_run/test_shapes.py``).
    """
    models: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("known_models.json").read_text("utf-8"))
    return models


def _config(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, str]:
    folder = Path(name).expanduser()
    place, file = place_of(str(folder) if folder.is_dir() else name)
    if file:
        check_gguf(name)
    try:
        config = AutoConfig.from_pretrained(
            place,
            **file,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
        return config, "a GGUF file" if file else "config.json" if folder.is_dir() else "the hub's cache"
    except (OSError, ValueError, ImportError, struct.error) as error:
        if file and not isinstance(error, OSError):
            raise gguf_error(name, error) from error
        models = known_models()
        if name in models and not folder.is_dir():
            values = models[name]
            return AutoConfig.for_model(values.pop("model_type"), **values), "known shapes"
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"model {name}",
            got=f"no config at hand ({type(error).__name__}: {first})",
            wanted="a model folder, a hub id in the hub's cache, or one whose shape keeptune knows",
            next_step=f"{nearest(name, models)} `hf download {name} config.json` puts a config into the cache.",
        ) from error
