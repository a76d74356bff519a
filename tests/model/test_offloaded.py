"""Models whose weights stay on disk: the same model, without its weights in memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from benchmarks.processes import peak
from tests.models import MODELS, llama, logits, save, tokens
from transformers import MixtralConfig, MixtralForCausalLM

from keeptune.core.artefact import model_fingerprint
from keeptune.core.errors import ModelError
from keeptune.core.offload import aligned, device_of, is_offloaded
from keeptune.core.weights import read_weight
from keeptune.model.blocks import find_targets
from keeptune.model.head import body_fingerprint, head_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model, load_offloaded, refuse_not_finite

CPU = torch.device("cpu")


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_computes_what_the_loaded_model_computes(name: str, tmp_path: Path) -> None:
    saved = save(MODELS[name](), tmp_path)
    options = LoadOptions(head=saved.head)
    model, held = load_offloaded(str(tmp_path), options), saved.load()
    assert is_offloaded(model) and not is_offloaded(held)
    assert (device_of(model), model.device.type) == (CPU, "meta")
    assert (body_fingerprint(model), head_fingerprint(model)) == (body_fingerprint(held), head_fingerprint(held))
    assert torch.equal(logits(model, tokens()), logits(held, tokens()))
    targets = find_targets(held)
    assert find_targets(model) == targets
    assert all(torch.equal(read_weight(model, target), read_weight(held, target)) for target in targets)
    refuse_not_finite(model)


def test_a_module_is_there_while_it_is_aligned(tmp_path: Path) -> None:
    model, held = load_offloaded(str(save(llama(), tmp_path).folder), LoadOptions()), llama()
    block, same = model.get_submodule("model.layers.1"), held.get_submodule("model.layers.1")
    with aligned(block.modules(), CPU):
        assert all(map(torch.equal, block.parameters(), same.parameters()))
        assert {p.device.type for p in model.get_submodule("model.layers.0").parameters()} == {"meta"}
        assert torch.equal(logits(model, tokens()), logits(held, tokens()))
        assert {p.device.type for p in block.parameters()} == {"cpu"}
    assert {p.device.type for p in block.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_and_converted_weights_are_read_in_the_dtype_asked_for(dtype: str, tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    options = LoadOptions(dtype=dtype)  # type: ignore[arg-type]
    model, held = load_offloaded(str(tmp_path), options), load_model(str(tmp_path), options)
    assert model_fingerprint(model) == model_fingerprint(held)
    assert torch.equal(logits(model, tokens()), logits(held, tokens()))


def test_the_temporary_folder_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mixtral().save_pretrained(tmp_path / "base")
    model = load_offloaded(str(tmp_path / "base"), LoadOptions())
    assert list((tmp_path / "temporary").glob("*/*experts*"))
    del model
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(ModelError, match="no such folder"):
        load_offloaded(str(tmp_path / "absent"), LoadOptions())
    assert not list((tmp_path / "temporary").iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = llama()
    with torch.no_grad():
        broken.get_submodule("model.layers.1.mlp.up_proj").weight[3, 4] = torch.nan
    model = load_offloaded(str(save(broken, tmp_path).folder), LoadOptions())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        refuse_not_finite(model)


def test_memory_does_not_hold_the_weights(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    size = _saved_wide(tmp_path, wide)
    added = []
    for load in (load_offloaded, load_model):
        before = _peak(reset=True)
        logits(load(str(tmp_path), LoadOptions()), tokens())
        added.append((_peak(reset=False) - before) / size)
    assert added[0] < 0.2
    assert added[1] > 0.8


def _saved_wide(folder: Path, fields: dict[str, int]) -> int:
    config = type(llama().config)(**llama().config.to_dict() | fields | {"num_key_value_heads": 4, "head_dim": 64})
    with torch.device("meta"):
        shapes = type(llama())(config).bfloat16()
    model = shapes.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def _peak(*, reset: bool) -> float:
    """Return the peak of this process's memory in bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 2**20 * peak()
