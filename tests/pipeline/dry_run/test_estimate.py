"""Each formula against a measurement: saved tensors, counted operations, the sizes of real sums and caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.processes import numbers_of
from tests.assets import STORIES
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig

from keeptune import atlas
from keeptune.adapter.install import install
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.methods.base import make_plan
from keeptune.methods.lora import Lora
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.pipeline.dry_run import estimate
from keeptune.pipeline.dry_run.estimate import ModelShape, model_shape

BATCH, LENGTH, RANK = 4, 96, 8


@pytest.fixture(params=["atlas", "stories260K"])
def folder(request: pytest.FixtureRequest) -> str:
    return str(atlas.model_path() if request.param == "atlas" else STORIES)


def tuned(folder: str, dtype: str, *, whole: bool, attention: str = "sdpa") -> tuple[ModelShape, torch.nn.Module]:
    model = load_model(folder, LoadOptions(dtype=dtype))  # type: ignore[arg-type]
    model.set_attn_implementation(attention)
    if whole:
        plan = Plan(method="full", options={}, targets=(), scope="all")
    else:
        plan = make_plan(Lora(rank=RANK), find_targets(model), lambda t: read_weight(model, t), lambda _: None)  # type: ignore[arg-type,return-value]
    return model_shape(folder, dtype=dtype), install(model, plan).train()


def tokens(shape: ModelShape) -> torch.Tensor:
    return torch.randint(3, shape.vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_activations_are_those_that_autograd_saves(folder: str, dtype: str, whole: bool) -> None:
    shape, model = tuned(folder, dtype, whole=whole)
    ids = tokens(shape)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model(input_ids=ids, labels=ids)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    targets = shape.linear
    ranks = 0 if whole else RANK * len(targets)
    found = estimate.activation_bytes(shape, targets, ranks=ranks, batch=BATCH, length=LENGTH, whole=whole)
    logits = BATCH * LENGTH * shape.vocabulary * 4  # their logarithm: this loss is taken of all of them
    assert found + logits == pytest.approx(kept, rel=0.25)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_work_is_what_a_step_does(folder: str, whole: bool) -> None:
    shape, model = tuned(folder, "float32", whole=whole, attention="eager")  # fused attention is not counted
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = tokens(shape)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    work = estimate.training_flops(shape, BATCH * LENGTH, LENGTH, trained=trained, whole=whole)
    assert work == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_forward_pass_is_counted_whole(folder: str) -> None:
    shape, model = model_shape(folder), load_model(folder)
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(shape), use_cache=False)
    work = estimate.forward_flops(shape, BATCH * LENGTH, LENGTH)
    assert work == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_cache_holds_keys_and_values(folder: str) -> None:
    shape, model = model_shape(folder), load_model(folder)
    with torch.no_grad():
        cache = model(input_ids=tokens(shape), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert estimate.cache_bytes(shape, batch=BATCH, length=LENGTH) == held


def test_a_step_of_training_takes_the_memory_that_is_estimated(tmp_path: Path) -> None:
    """A wide model, so that its weights and their states outweigh the libraries; measured in a process of its own."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8
    )
    config.save_pretrained(tmp_path)
    measured = dict(zip((False, True), (2**20 * most for most in numbers_of(_STEPS, str(tmp_path))), strict=True))
    shape = model_shape(str(tmp_path))
    for whole, most in measured.items():
        numbers = shape.parameters if whole else sum(RANK * (t.in_features + t.out_features) for t in shape.linear)
        ranks = 0 if whole else RANK * len(shape.linear)
        total = estimate.activation_bytes(shape, shape.linear, ranks=ranks, batch=4, length=128, whole=whole)
        total += 4 * 128 * shape.vocabulary * 12
        total += 4 * shape.parameters + (0 if whole else 4 * numbers) + 12 * numbers
        # The process's peak has what kernels take for a moment, too: the backward pass of an adapter half as much.
        assert 0.5 < total / most < 1.5, f"all weights: {whole}"


_STEPS = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from peft import LoraConfig, get_peft_model
from processes import peak
torch.set_num_threads(1)
def step(config, whole):
    model = AutoModelForCausalLM.from_config(config)
    if not whole:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    ids = torch.randint(3, 512, (4, 128))
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
step(AutoConfig.from_pretrained(sys.argv[1], num_hidden_layers=1, hidden_size=64, intermediate_size=64), False)
before = peak()  # what the libraries take for themselves
config = AutoConfig.from_pretrained(sys.argv[1])
step(config, False)
adapter = peak() - before
step(config, True)
print(adapter, peak() - before)
"""


@pytest.mark.parametrize("label_smoothing", [False, True])
def test_the_loss_takes_tiles_of_the_logits(label_smoothing: bool) -> None:
    """What the loss takes of a long vocabulary, as the peak of a process that takes TRL's."""
    tokens, hidden, words = 1000, 64, 100_000
    code = _TILES if not label_smoothing else _SMOOTHED
    (measured,) = numbers_of(code, *map(str, (tokens, hidden, words)))
    shape = replace(model_shape("HuggingFaceTB/SmolLM2-135M-Instruct"), vocabulary=words, hidden=hidden)
    said = estimate.head_bytes(shape, batch=1, length=tokens, device="cpu", smoothed=label_smoothing)
    assert said == pytest.approx(2**20 * measured, rel=0.25)
    # On a GPU with Triton a tile is all.
    assert estimate.head_bytes(shape, batch=1, length=tokens, device="cuda") == 2 * tokens * 32768


_PEAK = """
import sys, torch
from processes import peak
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
torch.set_num_threads(1)
tokens, hidden, words = map(int, sys.argv[1:])
x = torch.randn(tokens, hidden).bfloat16().requires_grad_(True)
W = torch.randn(words, hidden).bfloat16()
labels = torch.zeros(tokens, dtype=torch.long)
(x[:8] @ W[:8].T).float().log_softmax(-1).sum().backward()
before = peak()
"""
_TILES = (
    _PEAK
    + """
outputs = ("entropy", "is_top1")
(-ChunkedLogProbFunction.apply(x, W, None, labels, 1.0, 32768, None, 1.0, outputs)[0].sum()).backward()
print(peak() - before)
"""
)
_SMOOTHED = (
    _PEAK
    + """
loss = torch.nn.functional.cross_entropy((x @ W.T).float(), labels, label_smoothing=0.1)
loss.backward()
print(peak() - before)
"""
)


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [("adamw_torch_fused", 8), ("paged_adamw_8bit", 2), ("paged_adamw_32bit", 8), ("adafactor", 0), ("sgd", 0)],
)
def test_states_are_those_of_the_optimiser(optimizer: str, states: int) -> None:
    assert estimate.optimizer_states(optimizer) == states


@pytest.mark.parametrize(
    ("examples", "batch", "accumulation", "epochs", "most", "steps"),
    [
        (100_000, 16, 8, 1, -1, 782),
        (10, 3, 1, 1, -1, 4),
        (10, 3, 2, 2.5, -1, 5),
        (10, 3, 8, 3, -1, 3),
        (10, 3, 2, 1, 7, 7),
    ],
)
def test_steps_are_those_of_the_trainer(
    examples: int, batch: int, accumulation: int, epochs: float, most: int, steps: int
) -> None:
    counted = estimate.optimizer_steps(examples, batch=batch, accumulation=accumulation, epochs=epochs, max_steps=most)
    assert counted == steps
