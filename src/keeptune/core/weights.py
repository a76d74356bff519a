"""Weights: the one place that reads W of a linear map, stored plainly, quantised, or offloaded to the CPU or disk.

A quantised module is packed: its tensor has another shape, sometimes under a float dtype (PEFT #3742). Shapes are read
from what the module declares. Values come from PEFT's helper or, where it knows no way back, from the module itself,
which maps the unit vectors to the columns of W; what the helper gives is held against what the module computes.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.utils import resolve_quantization_backend
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keeptune.core.errors import ModelError, PlanError
from keeptune.core.target import Target

_log = logging.getLogger(__name__)
_CHUNK = 1024  # unit vectors at a time
# Largest relative error of what a module computes of one vector: LLM.int8 rounds inputs to about 1e-2. Weights read in
# the wrong order are off by 1.4.
_TOLERANCE = 0.1


def is_linear_map(module: nn.Module) -> bool:
    """Returns whether a module is one linear map: torch's, Transformers' Conv1D, or a quantised one that PEFT knows."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    declared = isinstance(getattr(module, "in_features", None), int) and not any(True for _ in module.children())
    return declared and resolve_quantization_backend(module) is not None


def is_quantised(model: nn.Module) -> bool:
    """Returns whether some weight of a model, which may carry adapters, is stored otherwise than in floats."""
    if any(is_linear_map(module) and not _is_plain(model, module) for module in model.modules()):
        return True
    # Experts that are packed in one parameter are no linear maps.
    stored = (*model.parameters(), *model.buffers())
    packed = any(tensor.itemsize == 1 and tensor.dtype != torch.bool for tensor in stored)
    return packed and getattr(model, "hf_quantizer", None) is not None


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Returns ``(out_features, in_features)`` as a linear map declares them, whatever shape its tensor is packed in.

    Raises:
        AttributeError: The module is no linear map.
    """
    plain: Any = module
    if hasattr(plain, "nf"):  # Conv1D
        return int(plain.nf), int(plain.nx)
    return int(plain.out_features), int(plain.in_features)


def read_weight(model: nn.Module, target: Target) -> Tensor:
    """Returns a copy of ``W``, ``(out_features, in_features)``, float32, on the weight's device.

    The model may carry adapters: it is their base layer's W.

    Raises:
        ModelError: The module is quantised in a way that does not give its weights back.
    """
    module: Any = model.get_submodule(target.module)
    if hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    with torch.no_grad(), align_module_device(module):
        if target.expert is not None:
            W = target.view(getattr(module, target.parameter.rpartition(".")[2]).detach())
            return W.to(torch.float32, copy=True).contiguous()
        plain, dtype = _is_plain(model, module), getattr(model, "dtype", torch.float32)
        weight = module.weight if plain else _dequantised(module, target, dtype)
        matrix = weight.detach().T if target.transposed else weight.detach()
        return matrix.to(torch.float32, copy=True).contiguous()


def keep_layout(model: nn.Module) -> None:
    """Keeps bitsandbytes from rewriting 4-bit weights at the first forward pass in evaluation mode.

    On processors with AVX512-BF16 it reorders them for good, with scales rounded to bfloat16: they then dequantise to
    other numbers, and pass no gradient on. Weights that were reordered before are put back, with those scales.
    """
    reordered = 0
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            state: Any = getattr(module.weight, "quant_state", None)
            if hasattr(state, "original_nested"):  # it was reordered, and maybe put back by somebody's `state_dict`
                if state.packing_format_for_cpu:
                    module.state_dict()  # bitsandbytes puts the order back to save it, but not that of plain scales
                if state.absmax.ndim == 2:
                    state.absmax = state.absmax.T.reshape(-1).float()
                reordered += 1
    if reordered:
        _log.warning(
            "%d 4-bit weights were rewritten by bitsandbytes' forward pass on this processor: their scales are rounded "
            "to bfloat16 now. Load the model again for the weights as they were stored.",
            reordered,
        )


def refuse_misread(model: nn.Module) -> None:
    """Refuses weights in four bits that bitsandbytes misreads on the CPU: rows that do not end with a block of scales.

    Raises:
        ModelError: The same bytes give other weights when they are read as rows of one block each.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None or weight.is_meta or state.shape[-1] % state.blocksize == 0 or state.shape[-1] in seen:
            continue
        seen.add(state.shape[-1])
        rows, rest = divmod(state.shape.numel(), state.blocksize)
        by_blocks = copy.copy(state)
        by_blocks.shape = torch.Size((rows, state.blocksize))
        found, wanted = (_four_bits(weight, one).flatten() for one in (state, by_blocks))
        if rest or not torch.equal(found, wanted):
            raise ModelError(
                name,
                got=f"{state.shape[-1]} inputs in four bits, which bitsandbytes misreads on the {weight.device.type}",
                wanted=f"a multiple of {state.blocksize}, the block of one scale",
                next_step=f"Leave it in floats: llm_int8_skip_modules: [lm_head, {name.rpartition('.')[2]}].",
            )


def _four_bits(weight: Any, state: Any) -> Tensor:
    other = copy.copy(weight)
    other.quant_state = state
    read: Tensor = dequantize_bnb_weight(other)
    return read


def refuse_quantised(scope: str, method: str) -> None:
    """Raises PlanError where a method that changes whole weights would have to change quantised ones."""
    if scope != "adapter":
        raise PlanError(
            f"method {method}",
            got="a quantised base",
            wanted="a base in 16 or 32 bits: it changes whole weights, and quantised ones cannot be changed by steps",
            next_step="Load the base in 16 bits, or take a method that trains adapters, such as keep or lora-null.",
        )


def _is_plain(model: nn.Module, module: Any) -> bool:
    """Whether a module's weight is its W in floats; under a quantiser, only torch's own modules are known to be."""
    weight: Any = getattr(module, "weight", None)
    floats = type(weight).__module__.split(".")[0] == "torch" and weight.is_floating_point() and weight.itemsize > 1
    own = type(module).__module__.startswith(("torch.nn.", "transformers.pytorch_utils"))
    return floats and (own or getattr(model, "hf_quantizer", None) is None)


def _dequantised(module: Any, target: Target, dtype: torch.dtype) -> Tensor:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    keep_layout(module)
    shape = weight_shape(module)
    try:
        weight = _by_peft(module, shape[::-1] if target.transposed else shape)
        with _without_bias(module):
            if weight is None:
                units = torch.eye(target.in_features, dtype=dtype, device=device)
                rows = torch.cat([module.forward(part) for part in torch.split(units, _CHUNK)])
                return rows if target.transposed else rows.T
            x = torch.randn(1, target.in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            wanted = module.forward(x).float()  # without hooks: a pass may be listening
    # What back-ends raise without a kernel for this device or this state.
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise _unreadable(module, target, f"{type(error).__name__}: {error}") from error
    gap = x.float() @ (weight if target.transposed else weight.T).float() - wanted
    apart = float(gap.norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not apart <= _TOLERANCE:
        raise _unreadable(module, target, f"weights that are not those it computes with (relative error {apart:.1e})")
    return weight


def _by_peft(module: Any, shape: tuple[int, int]) -> Tensor | None:
    if not hasattr(module, "weight") and not hasattr(module, "W_q"):
        return None
    weight: Any
    if get_bnb_param_type(getattr(module, "weight", None)):
        # Not by the module: on the CPU PEFT then drops the scales of eight bits.
        weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
    else:
        weight = dequantize_module_weight(module)
    fits = tuple(weight.shape) == shape and weight.is_floating_point() and weight.dtype.itemsize > 1
    return weight if fits else None


@contextmanager
def _without_bias(module: Any) -> Iterator[None]:
    """Takes the bias away, beside which a sum in 16 bits would round W's elements."""
    bias = getattr(module, "bias", None)
    module.bias = None
    try:
        yield
    finally:
        module.bias = bias


def _unreadable(module: Any, target: Target, got: str) -> ModelError:
    kind = type(module)
    return ModelError(
        f"{target.name} ({kind.__module__}.{kind.__qualname__})",
        got=" ".join(got.split())[:300],
        wanted=f"a module that gives back its weight of shape {(target.out_features, target.in_features)}",
        next_step="Load the base in another quantisation, such as nf4 of bitsandbytes, or in 16 bits.",
    )
