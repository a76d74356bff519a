from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.processes import numbers_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.models import MODELS, Saved, handmade_plan, save, tokens, train_steps

from keeptune.adapter.export import Base, ExportOptions, export
from keeptune.adapter.install import install
from keeptune.adapter.load import load_adapter
from keeptune.adapter.merging import is_streamed, merge
from keeptune.adapter.probe import logits_of
from keeptune.core.artefact import file_fingerprint
from keeptune.core.offload import edit_values, is_offloaded, save_model
from keeptune.core.plan import Plan
from keeptune.model.pretrained import LoadOptions, load_floats, load_model, load_offloaded

LANGUAGE = ["llama", "qwen2", "gpt2"]
Trained = tuple[PeftModel, Plan, Saved]


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trained]:
    def make(architecture: str, dtype: torch.dtype = torch.float32, **plan: Any) -> Trained:
        saved = save(MODELS[architecture](dtype=dtype), tmp_path / "base")
        base = saved.load()
        made = handmade_plan(base, **plan)
        model = install(base, made, anchor="twin")
        train_steps(model, steps=3)
        assert isinstance(model, PeftModel)
        return model.eval(), made, saved

    return make


def streamed(saved: Saved) -> Base:
    return Base(str(saved.folder), saved.load, partial(load_floats, options=LoadOptions(head=saved.head)))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_streamed_merge_is_that_in_memory_bit_by_bit_and_leaves_the_base_alone(
    architecture: str, dtype: torch.dtype, trained: Callable[..., Trained], tmp_path: Path
) -> None:
    model, plan, saved = trained(architecture, dtype)
    before = file_fingerprint(sorted(saved.folder.iterdir()))
    wanted = ExportOptions("merged")
    whole = export(model, plan, tmp_path / "whole", wanted, base=Base(str(saved.folder), saved.load))
    parts = export(model, plan, tmp_path / "parts", wanted, base=streamed(saved))
    assert same(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"))
    assert parts.relative_gap == pytest.approx(whole.relative_gap, rel=1e-3, abs=1e-6)
    assert not same(weights_of(tmp_path / "parts"), weights_of(saved.folder))
    assert file_fingerprint(sorted(saved.folder.iterdir())) == before


def test_weights_are_saved_in_shards_and_tied_ones_once(tmp_path: Path) -> None:
    saved = save(MODELS["qwen2"](), tmp_path / "base")
    model = load_offloaded(str(saved.folder), LoadOptions())
    save_model(model, tmp_path / "parts", shard="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert same(weights_of(tmp_path / "parts"), weights_of(saved.folder))
    assert "lm_head.weight" not in weights_of(tmp_path / "parts")
    again = load_model(str(tmp_path / "parts"))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(again, tokens(3)), logits_of(saved.load(), tokens(3)), rtol=0, atol=0)


def test_what_is_read_is_changed_and_what_is_stored_is_not(tmp_path: Path) -> None:
    saved = save(MODELS["llama"](), tmp_path / "base")
    model, name = load_offloaded(str(saved.folder), LoadOptions()), "model.layers.1.mlp.up_proj.weight"
    edit_values(model, {name: [lambda value: value.mul_(2)]})
    edit_values(model, {name: [lambda value: value.add_(1)]})
    changed = saved.load()
    with torch.no_grad():
        changed.get_parameter(name).mul_(2).add_(1)
    for _ in range(2):  # each time that it is read
        torch.testing.assert_close(logits_of(model, tokens(1)), logits_of(changed, tokens(1)), rtol=0, atol=0)
    assert is_offloaded(model)


@pytest.mark.parametrize("architecture", LANGUAGE)
def test_peft_merges_weight_by_weight_what_it_merges_as_a_whole(architecture: str, tmp_path: Path) -> None:
    saved = save(MODELS[architecture](dtype=torch.bfloat16), tmp_path / "base")
    names = ["c_attn", "c_proj"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=architecture == "gpt2")
    torch.manual_seed(0)  # of PEFT's draw: bfloat16 rounds some adapters by more than merging allows
    wrapped = get_peft_model(saved.load(), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert is_streamed(tmp_path / "adapter")
    load = partial(load_floats, options=LoadOptions())
    gap = merge(tmp_path / "adapter", tmp_path / "merged", base=str(saved.folder), load=load).gap
    whole = load_adapter(saved.load(), tmp_path / "adapter").merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    assert same(weights_of(tmp_path / "merged"), weights_of(tmp_path / "whole"))
    assert 0 < gap < 1


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}, {"use_dora": True}],
    ids=["start", "whole module", "bias", "lengths"],
)
def test_an_adapter_that_does_more_than_change_linear_maps_is_merged_in_memory(
    options: dict[str, Any], tmp_path: Path
) -> None:
    LoraConfig(target_modules=["q_proj"], **options).save_pretrained(tmp_path)
    assert not is_streamed(tmp_path)


def test_an_adapter_on_weights_on_disk_computes_what_it_does_on_weights_in_memory(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    model, plan, saved = trained("qwen2", torch.bfloat16)
    export(model, plan, tmp_path / "adapter", base=streamed(saved))
    found = load_adapter(load_offloaded(str(saved.folder), LoadOptions()), tmp_path / "adapter")
    wanted = load_adapter(saved.load(), tmp_path / "adapter")
    assert is_offloaded(found)
    torch.testing.assert_close(logits_of(found, tokens(5)), logits_of(wanted, tokens(5)), rtol=0, atol=0)
    plain = logits_of(saved.load(), tokens(5))
    assert not torch.equal(logits_of(found, tokens(5)), plain)


def test_the_memory_of_a_streamed_merge_does_not_grow_with_depth(tmp_path: Path) -> None:
    """In a process of its own; in memory the same merge grows by all of the weights."""
    code = """
        import sys, torch
        from pathlib import Path
        from processes import peak
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
        from keeptune.adapter import merging
        from keeptune.core.offload import save_model
        from keeptune.model.pretrained import load_floats
        from keeptune.model.pretrained import LoadOptions, load_model

        def make(depth):
            config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=depth,
                                 num_attention_heads=4, max_position_embeddings=64)
            with torch.device("meta"):
                shapes = LlamaForCausalLM(config)
            folder = Path(sys.argv[1]) / str(depth)
            from safetensors.torch import save_file
            folder.mkdir()
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(folder)
            for index, block in enumerate(shapes.model.layers):
                own = {f"model.layers.{index}.{k}": torch.rand(v.shape) for k, v in block.state_dict().items()}
                save_file(own, folder / f"model-{index}.safetensors", {"format": "pt"})
            rest = {k: torch.rand(v.shape) for k, v in shapes.state_dict().items() if ".layers." not in k}
            save_file(rest, folder / "model-rest.safetensors", {"format": "pt"})
            files = {k: "model-rest.safetensors" for k in rest}
            files |= {k: f"model-{k.split('.')[2]}.safetensors" for k in shapes.state_dict() if ".layers." in k}
            import json
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
            adapter = get_peft_model(shapes, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
            state = {k: torch.rand(v.shape) for k, v in adapter.state_dict().items() if "lora_" in k}
            adapter.peft_config["default"].save_pretrained(folder / "adapter")
            named = {k.replace(".default", ""): v for k, v in state.items()}
            save_file(named, folder / "adapter" / "adapter_model.safetensors")
            return str(folder)

        merging.save_model = lambda model, folder: save_model(model, folder, shard="16MB")
        shallow, deep, peaks = make(2), make(14), []
        for base, kind in ((shallow, load_floats), (deep, load_floats), (deep, load_model)):
            load = lambda name: kind(name, LoadOptions())
            merging.merge(Path(base) / "adapter", Path(f"{base}-{kind.__name__}"), base=base, load=load)
            peaks.append(peak())
        print(*peaks)
    """
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # the allocator gives back what is freed
    shallow, deep, whole = numbers_of(textwrap.dedent(code), str(tmp_path), env=freed)
    weights = 12 * 4 * (4 * 512 * 512 + 3 * 512 * 2048) / 2**20  # MB that the deeper model has more
    assert deep - shallow < 0.1 * weights
    assert whole - shallow > 0.8 * weights
