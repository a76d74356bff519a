"""The shape of a model, without its weights and the network, and memory and work of a run from it, by formulas.

Symbols: P parameters, T trained numbers, F frozen numbers that an adapter adds, L blocks, h hidden size, a numbers of
all query heads, k of all key heads, f of an MLP's inside, V vocabulary, S tokens of a sequence (``length``), B
sequences at once (``batch``), e bytes of a number of the base. ``whole``: every weight is trained, in float32, under
autocast where the base has 16 bits. Memory is in bytes, work in floating-point operations.
``tests/pipeline/dry_run/test_estimate.py`` holds each against a measurement.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from keeptune.core.errors import ModelError, nearest
from keeptune.core.target import Target
from keeptune.model.blocks import depth, down_projections, find_targets, head_of, is_nested, positions
from keeptune.model.quantization import check_gguf, gguf_error, place_of, stored_quantization

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # where configs say how many there are
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# The optimisers' states, bytes for each trained number: the first name that the optimiser's contains.
_STATES = {"lion_8bit": 1, "8bit": 2, "4bit": 1, "ademamix": 12, "adafactor": 0, "sgd": 0}
_STATES |= {"lion": 4, "adagrad": 4, "rmsprop": 4, "": 8}
_TILE = (4096, 32768)  # tokens and words of the tiles in which TRL takes the loss: the logits are never there at once
# Bytes of a logit by what is done with it, a e + b: nothing but the tiles above, losses of whole answers, KL to the
# base (both answers in float32, their terms, their gradients), statistics and writing (drawn in float64).
_LOGITS = {"log_probs": (0, 0), "answers": (1, 12), "base": (2, 28), "statistics": (1, 20), "writing": (0, 28)}


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
    return dict(json.loads(Path(__file__).with_name("known_models.json").read_text("utf-8")))


def _config(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, str]:
    folder = Path(name).expanduser()
    place, file = place_of(str(folder) if folder.is_dir() else name)
    if file:
        check_gguf(name)
    try:
        config = AutoConfig.from_pretrained(
            place, **file, revision=revision, trust_remote_code=trust_remote_code, local_files_only=True
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


def weight_bytes(shape: ModelShape, packed: Mapping[str, Any] | None = None) -> int:
    """Computes the base's weights: e each, but for those of linear maps that are ``packed``, with their scales.

    Args:
        shape: Of the base; embeddings, norms and the head are never packed.
        packed: The fields of Transformers' config of the quantisation; None packs nothing.
    """
    if packed is None or packed.get("dequantize"):
        return shape.size * shape.parameters
    kind = str(packed.get("quant_method") or "bitsandbytes")
    # bitsandbytes packs modules, not parameters that hold all experts of a block; mxfp4 packs these alone.
    fused = {"bitsandbytes": (False,), "mxfp4": (True,)}.get(kind, (True, False))
    numbers = sum(t.out_features * t.in_features for t in shape.linear if (t.expert is not None) in fused)
    bits = 16.0  # of a packed number, with its share of the scales; of a kind that is not known
    if "bitsandbytes" in kind:
        four = packed.get("load_in_4bit") or packed.get("_load_in_4bit")
        # A float32 for each 64 numbers; with double quantisation 8 bits and a float32 for each 256 of these.
        scales = 8 / 64 + 32 / (64 * 256) if packed.get("bnb_4bit_use_double_quant") else 32 / 64
        bits = 4 + scales if four else 8
    elif kind == "mxfp4":
        bits = 4 + 8 / 32
    elif "fp8" in kind:
        bits = 8
    elif kind in ("gptq", "awq", "hqq", "auto-round", "torchao"):  # a 16-bit scale and a zero for each group
        four = "int8" not in str(packed.get("quant_type", ""))
        bits = float(packed.get("bits") or packed.get("nbits") or (4 if four else 8))
        bits += (16 + bits) / float(packed.get("group_size") or 128)
    return int(bits / 8 * numbers) + shape.size * (shape.parameters - numbers)


def optimizer_states(optimizer: str) -> int:
    """Returns the bytes of an optimiser's states for each trained number: 8 of AdamW, 2 of it in 8 bits."""
    return next(size for word, size in _STATES.items() if word in optimizer)


def head_bytes(shape: ModelShape, *, batch: int, length: int, device: str, smoothed: bool = False) -> int:
    """Computes what the loss takes beside the activations, at the end of the forward pass.

    TRL projects tiles of at most 4,096 tokens and 32,768 words: 2 for each of a tile's numbers where Triton folds them
    (CUDA), 31 where torch does, in float32. Label smoothing forms all logits.
    """
    if smoothed:
        return logit_bytes(shape, batch * length, "answers")
    tokens, words = min(batch * length, _TILE[0]), min(shape.vocabulary, _TILE[1])
    return tokens * words * (2 if device.startswith("cuda") else 31)


def logit_bytes(shape: ModelShape, tokens: int, use: str, most: float = math.inf) -> int:
    """Computes what all logits of some tokens take for a use, at most ``most`` of them at once: ``B S V (a e + b)``."""
    a, b = _LOGITS[use]
    return int(min(tokens * shape.vocabulary, most)) * (a * shape.size + b)


def inference_bytes(shape: ModelShape, tokens: int) -> int:
    """Computes what a forward pass without gradients holds at its widest block: ``e (wide + a + 2 k + 4 h)``."""
    return tokens * shape.size * (shape.wide + shape.attention + 2 * shape.cached + 4 * shape.hidden)


def activation_bytes(
    shape: ModelShape,
    tuned: Sequence[Target],
    *,
    ranks: int,
    batch: int,
    length: int,
    checkpointing: bool = False,
    whole: bool = False,
) -> int:
    """Computes what a forward pass keeps of the blocks for the backward pass, as Llama's with fused attention.

    Each token and block: ``e (n + 2 a + 2 k + wide + r) + 8 h``, where n sums the inputs of tuned maps (maps that share
    an input keep it once in float32; in 16 bits autocast makes a copy for each), wide is 3 f for a gated MLP and f
    for another, r sums ranks, and 8 h are the inputs of two norms, in float32. With checkpointing one block at a time,
    and ``e h`` for the others. Where all weights are trained, norms keep ``8 h`` more, and autocast ``e`` for each
    weight of the maps.
    """
    e = shape.size
    groups = {t.input_group if e == 4 else t.name: shape.share(t) * t.in_features for t in tuned}
    norms = (16 if whole else 8) * shape.hidden
    blocks = e * (int(sum(groups.values())) + ranks) + shape.blocks * (
        e * (2 * shape.attention + 2 * shape.cached + shape.wide) + norms
    )
    if checkpointing:
        blocks = blocks // shape.blocks + e * shape.hidden * shape.blocks
    copies = e * sum(t.out_features * t.in_features for t in tuned) if whole and e < 4 else 0
    return batch * length * blocks + copies


def cache_bytes(shape: ModelShape, *, batch: int, length: int) -> int:
    """Computes the memory of the keys and values of a generation: ``2 L k e B S``."""
    return 2 * shape.blocks * shape.cached * shape.size * batch * length


def forward_flops(shape: ModelShape, tokens: float, length: float) -> float:
    """Computes the work of a forward pass: ``2 (Σ m n + V h) + 4 L a S`` for each token, of the experts it reaches.

    Attention is counted over the whole length: half is masked in causal models, but not every kernel leaves it out.
    """
    return tokens * (2 * (shape.active + shape.vocabulary * shape.hidden) + 4 * shape.blocks * shape.attention * length)


def training_flops(
    shape: ModelShape, tokens: float, length: float, *, trained: int, whole: bool, checkpointing: bool = False
) -> float:
    """Computes the work of training on some tokens, all epochs together.

    A forward pass, a backward pass of as much for gradients in the inputs, as much again for gradients in all weights
    where all are trained, and ``6 T`` for each token of an adapter; with checkpointing one forward pass more.
    """
    passes = (3 if whole else 2) + checkpointing
    return passes * forward_flops(shape, tokens, length) + (0 if whole else 6 * trained * tokens)


def optimizer_steps(examples: int, *, batch: int, accumulation: int, epochs: float, max_steps: int = -1) -> int:
    """Computes optimiser steps of N examples as the trainer does: ``⌈epochs ⌈⌈N / B⌉ / accumulation⌉⌉``.

    ``max_steps`` counts in place of epochs where it is above 0.
    """
    if max_steps > 0:
        return max_steps
    batches = math.ceil(examples / batch)
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


def gemm_rate(device: str = "cpu", size: int = 1024, repeats: int = 4) -> float:
    """Measures this machine's matrix products, in operations a second, in the dtype that it trains in.

    Training reaches a part of the rate, so that times estimated with it are lower bounds of the work's own.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.ones(size, size, device=device, dtype=dtype)
    timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.timeit(repeats).median
