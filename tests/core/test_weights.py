"""core/weights.py: one weight, read from plain, quantised, adapted and offloaded modules."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import cpu_offload
from bitsandbytes.functional import get_4bit_type, has_avx512bf16
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keeptune.core import weights
from keeptune.core.errors import ModelError
from keeptune.core.target import Target
from keeptune.core.weights import is_quantised, keep_layout, read_weight, weight_shape

M, N, BLOCK = 64, 128, 64
TARGET = Target("map", -1, "map", M, N, "map", bias=True)


class Holder(nn.Module):
    dtype = torch.float32

    def __init__(self, module: nn.Module, quantised: bool = True) -> None:
        super().__init__()
        self.map = module
        self.hf_quantizer = object() if quantised else None


def some_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(0)).to(dtype)


def nf4(storage: torch.dtype = torch.uint8, twice: bool = False) -> Any:
    module = bnb.nn.Linear4bit(N, M, quant_storage=storage)
    module.weight = bnb.nn.Params4bit(
        some_weight(), quant_type="nf4", compress_statistics=twice, quant_storage=storage, module=module
    )
    return module.to("cpu").eval()


def by_hand() -> Tensor:
    """QLoRA, eq. 5: of each block of 64, the nearest of 16 levels of its largest magnitude."""
    blocks = some_weight().reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = get_4bit_type("nf4", device="cpu")
    nearest = (blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(dim=-1)
    return (levels[nearest] * largest).reshape(M, N)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
def test_four_bits_are_read_as_written_by_hand_even_where_the_packed_tensor_claims_to_be_float(
    storage: torch.dtype,
) -> None:
    module = nf4(storage)
    assert module.weight.dtype == storage and module.weight.numel() < M * N
    assert weight_shape(module) == (M, N)
    torch.testing.assert_close(read_weight(Holder(module), TARGET), by_hand(), rtol=1e-6, atol=0)


def test_weights_stay_what_they_are_through_passes_in_evaluation_mode() -> None:
    model, x = Holder(nf4()), torch.randn(2, N)
    model.map.support_avx512bf16_for_cpu = True  # as on a processor that has it
    keep_layout(model)
    assert not model.map.support_avx512bf16_for_cpu
    packed = model.map.weight.clone()
    with torch.no_grad():
        model.map(x)
    assert torch.equal(model.map.weight, packed)
    torch.testing.assert_close(read_weight(model, TARGET), by_hand(), rtol=1e-6, atol=0)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes reorders weights on AVX512-BF16 only")
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_weights_that_were_reordered_are_put_back_with_a_warning(
    twice: bool, saved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Holder(nf4(twice=twice)), torch.randn(2, N)
    with torch.no_grad():
        model.map(x)
    # Negative control: what PEFT's helper makes of it has the right shape, and is another matrix.
    wrong: Any = dequantize_module_weight(model.map)
    assert wrong.shape == (M, N) and (wrong.float() - by_hand()).norm() > by_hand().norm()
    if saved:  # as a fingerprint does, which puts the weights back, but not their scales
        model.state_dict()
    with caplog.at_level(logging.WARNING):
        found = read_weight(model, TARGET)
    assert "rewritten by bitsandbytes" in caplog.text
    torch.testing.assert_close(found, by_hand(), rtol=2**-8 + 0.02 * twice, atol=0)


@pytest.mark.parametrize("passes", [0, 1])
def test_eight_bits_are_read_before_and_after_a_pass(passes: int) -> None:
    module = bnb.nn.Linear8bitLt(N, M, has_fp16_weights=False, threshold=6.0)
    module.weight = bnb.nn.Int8Params(some_weight(torch.float16), requires_grad=False, has_fp16_weights=False)
    module.to("cpu")
    with torch.no_grad():
        for _ in range(passes):
            module(torch.randn(2, N))
    error = (read_weight(Holder(module), TARGET) - some_weight()).abs().amax(dim=1)
    assert bool((error <= some_weight().abs().amax(dim=1) / 127).all())


class Packed(nn.Module):
    """A kernel that does not give its weights: eight bits, a scale a row, and a bias far larger than W."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = N, M
        self.register_buffer("scales", some_weight().abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("qweight", (some_weight() / self.scales).round().to(torch.int8))
        self.register_buffer("bias", torch.full((M,), 1e4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.qweight * self.scales).to(x.dtype).T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_that_does_not_give_its_weights_is_asked_for_their_columns(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 100)
    model = Holder(Packed())
    model.dtype = dtype
    found, wanted = read_weight(model, TARGET), model.map.qweight * model.map.scales
    torch.testing.assert_close(found, wanted.to(dtype).float(), rtol=0, atol=0)
    assert model.map.bias is not None


class Lying(nn.Linear):
    """Its weight has the right shape and type, and is not what it multiplies by."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.flip(0).T


def test_weights_that_are_not_what_a_module_computes_with_are_refused_by_module_and_back_end() -> None:
    with pytest.raises(ModelError, match=r"map \(.*Lying\).*not those it computes with"):
        read_weight(Holder(Lying(N, M)), TARGET)


def test_a_module_that_cannot_run_here_is_refused_by_module_and_back_end() -> None:
    class NoKernel(Packed):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel for cpu")

    with pytest.raises(ModelError, match=r"map \(.*NoKernel\).*no kernel for cpu"):
        read_weight(Holder(NoKernel()), TARGET)


@pytest.mark.parametrize("make", [lambda: nn.Linear(N, M), lambda: Conv1D(M, N)])
def test_offloaded_weights_are_read_and_offloaded_again(make: Callable[[], Any]) -> None:
    module = make()
    transposed = isinstance(module, Conv1D)
    target = Target("map", -1, "map", M, N, "map", transposed=transposed, bias=True)
    wanted = module.weight.detach().clone()
    model = Holder(module, quantised=False)
    cpu_offload(model)
    assert model.map.weight.is_meta and weight_shape(model.map) == (M, N)
    assert torch.equal(read_weight(model, target), wanted.T if transposed else wanted)
    assert model.map.weight.is_meta


def test_a_model_is_quantised_where_a_map_or_experts_beside_it_are_packed() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Parameter(torch.zeros(4, 8, 8, dtype=torch.uint8), requires_grad=False)

    plain = nn.Sequential(nn.Linear(N, M), nn.BatchNorm1d(M))
    plain.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    assert is_quantised(Holder(nf4())) and is_quantised(Holder(Experts()))
    assert not is_quantised(Holder(plain)) and not is_quantised(Holder(plain, quantised=False))
