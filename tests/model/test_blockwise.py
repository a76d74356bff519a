"""One block at a time: the numbers of the resident runner, forth and back, for every kind of stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, calibration, deep, gpt2, llama, mask_forgotten, save, task
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from keeptune.core.errors import ModelError, StatisticsError
from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch, Calibration
from keeptune.model import blockwise
from keeptune.model.blocks import find_targets
from keeptune.model.blockwise import BlockwiseRunner
from keeptune.model.head import Loss
from keeptune.model.pretrained import LoadOptions, load_offloaded
from keeptune.model.runner import Runner, Taps

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def mixtral() -> Any:
    config = MixtralConfig(**SIZES, intermediate_size=24, num_hidden_layers=3, num_local_experts=4)
    return seeded(lambda: MixtralForCausalLM(config))


def gemma3() -> Any:
    """Sliding and whole attention by turns: blocks get different masks and positions."""
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = SIZES | {"intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}
    return seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds)))


STACKS: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: deep(make) for name, make in MODELS.items()},
    "gemma3": gemma3,
    "mixtral": mixtral,
}


def data_of(model: PreTrainedModel) -> Calibration:
    data = task()
    if model.config.num_labels == 3:
        labels = tuple(ids[0] % 3 for ids in data.sequences)
        return Calibration(data.sequences, data.pad_id, labels=labels)
    return data


class Rows:
    """What sinks got, by kind and module, in order."""

    def __init__(self) -> None:
        self.taken: dict[tuple[str, str], list[Tensor]] = {}

    def sink(self, kind: str, name: str) -> Callable[..., None]:
        def add(*parts: Any) -> None:
            parts = (*parts[:2], *(torch.tensor(count()) for count in parts[2:] if kind == "texts"))
            tensors = [part.clone() for part in parts]
            self.taken.setdefault((kind, name), []).extend(tensors)

        return add

    def taps(self, names: Sequence[str], kinds: Sequence[str]) -> Taps:
        taps = Taps()
        for kind in kinds:
            for name in names:
                sinks = taps.inputs if kind == "inputs" else taps.gradients
                sinks.setdefault(name, []).append(self.sink(kind, name))
        return taps


def batches_of(model: PreTrainedModel, tokens: int = 64, side: str = "right") -> list[Batch]:
    padded = not isinstance(model, MixtralForCausalLM)
    return list(data_of(model).batches(tokens, padding_side=side, padded=padded))  # type: ignore[arg-type]


def forth(runner: Runner, names: Sequence[str], batches: Sequence[Batch]) -> Rows:
    rows = Rows()
    runner.run(batches, Taps({name: [rows.sink("inputs", name)] for name in names}), title="")
    return rows


def back(runner: Runner, names: Sequence[str], batches: Sequence[Batch], loss: Loss, kinds: Sequence[str]) -> Rows:
    rows = Rows()
    runner.run(batches, rows.taps(names, kinds), loss, title="")
    return rows


def assert_same(found: Rows, wanted: Rows) -> None:
    assert found.taken.keys() == wanted.taken.keys()
    assert wanted.taken
    for key, rows in wanted.taken.items():
        assert len(found.taken[key]) == len(rows)
        assert all(map(torch.equal, found.taken[key], rows)), key


@pytest.mark.parametrize("name", sorted(STACKS))
def test_inputs_are_those_of_the_whole_model_to_the_last_bit(name: str) -> None:
    model = STACKS[name]()
    names = [target.name for target in find_targets(model)]
    batches = batches_of(model)
    assert_same(forth(BlockwiseRunner(model), names, batches), forth(Runner(model), names, batches))


@pytest.mark.parametrize("labels", ["true", "sampled", "probe"])
@pytest.mark.parametrize("name", sorted(STACKS))
def test_gradients_are_those_of_the_whole_model_to_the_last_bit(name: str, labels: Any) -> None:
    model = STACKS[name]()
    names = [target.name for target in find_targets(model)]
    kinds = ["inputs", "joint"] if name == "mixtral" else ["inputs", "joint", "texts"]
    batches, loss = batches_of(model), Loss(labels, seed=3, probes=2 if labels == "probe" else 1)
    found = back(BlockwiseRunner(model), names, batches, loss, kinds)
    assert_same(found, back(Runner(model), names, batches, loss, kinds))


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "roberta"])
def test_an_offloaded_model_gives_the_same(name: str, tmp_path: Path) -> None:
    saved = save(STACKS[name](), tmp_path)
    held, model = saved.load(), load_offloaded(str(tmp_path), LoadOptions(head=saved.head))
    names = [target.name for target in find_targets(held)]
    batches, loss = batches_of(held), Loss("probe")
    runner = BlockwiseRunner(model)
    assert runner.device == device_of(model) == torch.device("cpu")
    assert_same(forth(runner, names, batches), forth(Runner(held), names, batches))
    assert_same(back(runner, names, batches, loss, ["joint"]), back(Runner(held), names, batches, loss, ["joint"]))
    blocks = [p for name, p in model.named_parameters() if ".layers." in name or ".layer." in name]
    assert blocks and all(p.is_meta for p in blocks)


@pytest.mark.parametrize("side", ["left", "right"])
def test_some_modules_alone_and_padding_change_nothing(side: str) -> None:
    model = deep(llama)
    names = ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj"]
    batches, loss = batches_of(model, 200, side), Loss("true")
    wanted = back(Runner(model), names, batches, loss, ["texts"])
    assert_same(back(BlockwiseRunner(model), names, batches, loss, ["texts"]), wanted)
    forgotten = back(BlockwiseRunner(model), names, [mask_forgotten(batch) for batch in batches], loss, ["texts"])
    with pytest.raises(AssertionError):
        assert_same(forgotten, wanted)


def test_inputs_on_disk_give_the_same_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(blockwise, "_ON_CPU", 1 << 12)
    model = deep(gpt2)
    names = [target.name for target in find_targets(model)]
    batches, loss = batches_of(model), Loss("probe", probes=2)
    written: list[int] = []

    def done(_: set[str]) -> None:
        written.append(len(list(tmp_path.glob("keeptune-inputs-*/*.safetensors"))))

    rows = Rows()
    BlockwiseRunner(model).run(batches, rows.taps(names, ["joint"]), loss, title="", done=done)
    assert_same(rows, back(Runner(model), names, batches, loss, ["joint"]))
    assert max(written) > len(batches)
    assert not list(tmp_path.iterdir())


def test_modules_are_done_block_by_block() -> None:
    model = deep(llama)
    names = [target.name for target in find_targets(model, ["q_proj", "down_proj"])]
    batches = batches_of(model)
    layers: list[set[int]] = []

    def done(finished: set[str]) -> None:
        layers.append({int(name.split(".")[2]) for name in finished})

    BlockwiseRunner(model).run(batches, Taps({name: [] for name in names}), title="", done=done)
    assert [one for one in layers if one] == [{0}, {1}, {2}, {3}]
    layers.clear()
    BlockwiseRunner(model).run(batches, Rows().taps(names, ["joint"]), Loss("true"), title="", done=done)
    assert [one for one in layers if one] == [{3}, {2}, {1}, {0}]
    layers.clear()
    Runner(model).run(batches, Taps({name: [] for name in names}), title="", done=done)
    assert layers == [{0, 1, 2, 3}]


class Around(nn.Module):
    """A linear map between the embedding and the blocks."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.table, self.project = embedding, nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.table(ids))


def test_modules_before_and_after_the_blocks_are_watched_too() -> None:
    model: Any = deep(llama)
    model.model.norm = nn.Sequential(model.model.norm, nn.Linear(32, 32))
    model.model.embed_tokens = Around(model.model.embed_tokens)
    names = ["model.embed_tokens.project", "model.layers.3.mlp.up_proj", "model.norm.1"]
    batches = batches_of(model)
    assert_same(forth(BlockwiseRunner(model), names, batches), forth(Runner(model), names, batches))
    loss = Loss("true")
    model.set_input_embeddings(model.model.embed_tokens)
    found = back(BlockwiseRunner(model), names[1:], batches, loss, ["joint"])
    assert_same(found, back(Runner(model), names[1:], batches, loss, ["joint"]))
    with pytest.raises(StatisticsError, match=r"embed_tokens\.project.*before the first block"):
        back(BlockwiseRunner(model), names, batches, loss, ["joint"])


class Scaled(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(hidden, *args, **kwargs), hidden


def test_models_that_are_no_single_stack_are_refused() -> None:
    encoder = seeded(
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        )
    )
    with pytest.raises(ModelError, match="2 stacks of blocks"):
        forth(BlockwiseRunner(encoder), ["encoder.block.0.layer.0.SelfAttention.q"], calibration().batches())
    more: Any = deep(llama)
    more.model.layers[0] = Scaled(more.model.layers[0])
    with pytest.raises(ModelError, match=r"return more than hidden states.*memory: resident"):
        forth(BlockwiseRunner(more), ["model.layers.1.mlp.up_proj"], batches_of(more))
    between: Any = deep(llama)
    between.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(ModelError, match="something computed between its blocks"):
        forth(BlockwiseRunner(between), ["model.layers.2.mlp.up_proj"], batches_of(between))
    turned: Any = deep(llama)
    turned.model.layers = nn.ModuleList([*turned.model.layers[:3], turned.model.layers[0]])
    with pytest.raises(ModelError, match="out of order"):
        forth(BlockwiseRunner(turned), ["model.layers.2.mlp.up_proj"], batches_of(turned))


def test_the_model_is_left_as_it_was_when_a_block_raises() -> None:
    model = deep(llama).train()
    broken = model.get_submodule("model.layers.2.mlp")
    handle = broken.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forth(BlockwiseRunner(model), ["model.layers.3.mlp.up_proj"], batches_of(model))
    handle.remove()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert forth(Runner(model), ["model.layers.3.mlp.up_proj"], batches_of(model)).taken


def test_rows_that_are_not_finite_are_refused_with_the_first_module_that_has_them() -> None:
    model = deep(llama)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[0, 0] = torch.inf
    names = [target.name for target in find_targets(model)]
    with pytest.raises(StatisticsError, match=r"layers\.2\.self_attn.*NaN or infinite inputs in batch 1 of"):
        forth(BlockwiseRunner(model), names, batches_of(model))
