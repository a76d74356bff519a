"""GGUF files of every architecture: read again by Transformers, and answered from by llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.gguf_files import write_base
from tests.models import logits
from transformers import AutoConfig, AutoModelForCausalLM

from keeptune.adapter.gguf_files import (
    Layout,
    check_base,
    field_of,
    layout_of,
    open_gguf,
    values_of,
    write_file,
    write_lora_file,
)
from keeptune.core.errors import ExportError
from keeptune.model.pretrained import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
OF_TYPE = {
    "gemma3_text": {"sliding_window": 32, "head_dim": 256, "query_pre_attn_scalar": 256},
    "qwen3": {"head_dim": 128},  # Transformers reads no other from a file
}
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma3_text": "gemma3",
}
READ = {"phi3": {"vocab_size": 32064}}  # Transformers takes its padding token's number by default
PROMPTS = [[3, 40, 77, 100, 9], [5, 6, 7, 8, 9, 10, 11, 12], [120, 60]]
needs_server = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp")


def model_of(kind: str, tied: bool = False, **more: Any) -> Any:
    config = AutoConfig.for_model(kind, **(SIZES | OF_TYPE.get(kind, {}) | more), tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for value in model.state_dict().values():  # norms and biases that are all alike would hide an error
            if value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
        return model


def write_adapter(model: Any, folder: Path, **options: Any) -> Any:
    """A PEFT adapter with its own ranks and scales on every linear map of the blocks; returns the tuned model."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": "all-linear"} | options
        tuned = get_peft_model(model, LoraConfig(**config)).eval()
    tuned.save_pretrained(folder)
    return tuned


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_transformers_reads_the_model_that_was_written(kind: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(kind, tied, **READ.get(kind, {}))
    again = load_model(str(write_base(model, tmp_path / "base.gguf", ARCHITECTURES[kind], SIZES["vocab_size"])))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=2e-7, msg=name)  # 1 + w of gemma
    ids = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)


@needs_server
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_computes_what_peft_does(kind: str, tmp_path: Path) -> None:
    from studies.served import apart, served, server

    model = model_of(kind)
    base, file = write_base(model, tmp_path / "base.gguf", ARCHITECTURES[kind]), tmp_path / "adapter.gguf"
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True}
    tuned = write_adapter(model, tmp_path / "adapter", **patterns)
    layout = layout_of(model.config, "test")
    assert write_lora_file(file, tmp_path / "adapter", layout, "f32") == 0
    with server("-m", str(base), "--lora", str(file)) as address:
        on, off = (served(address, PROMPTS, 6, scale) for scale in (1.0, 0.0))
    assert apart(tuned, PROMPTS, on)[0] == len(PROMPTS)
    assert apart(tuned, PROMPTS, on)[1] < 1e-3
    with tuned.disable_adapter():
        assert apart(tuned, PROMPTS, off)[0] == len(PROMPTS)
        assert apart(tuned, PROMPTS, off)[1] < 1e-3
        assert apart(tuned, PROMPTS, on)[1] > 0.1  # the adapter does something

    if layout.heads:  # rows of q and k as Transformers has them are another adapter
        plain = Layout(layout.architecture, layout.names, {}, layout.shift, layout.tied)
        write_lora_file(file, tmp_path / "adapter", plain, "f32")
        with server("-m", str(base), "--lora", str(file)) as address:
            wrong = served(address, PROMPTS, 6, 1.0)
        assert apart(tuned, PROMPTS, wrong)[1] > 0.05


@pytest.mark.parametrize(("quantise", "least", "most"), [("f32", 0, 0), ("f16", 1e-5, 5e-4), ("q8_0", 1e-3, 1e-2)])
def test_numbers_are_rounded_as_told_and_no_further(quantise: Any, least: float, most: float, tmp_path: Path) -> None:
    value = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    entries = [("a", value.shape, value.clone), ("odd", (4, 6), value[:4, :6].clone), ("v", (96,), value[0].clone)]
    error = write_file(tmp_path / "file.gguf", "llama", {}, entries, quantise)
    assert least <= error <= most
    found = {one.name: one for one in open_gguf(tmp_path / "file.gguf").tensors}
    types = {name: one.tensor_type.name for name, one in found.items()}
    assert types == {"a": quantise.upper(), "odd": {"q8_0": "F16"}.get(quantise, quantise.upper()), "v": "F32"}
    torch.testing.assert_close(values_of(found["a"]), value, rtol=0, atol=0.03)


def test_a_weight_too_large_for_float16_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"blk.0.w: got weights up to 1.0e\+05.*--quantise f32"):
        write_file(tmp_path / "f.gguf", "llama", {}, [("blk.0.w", (2, 2), torch.full((2, 2), 1e5).clone)], "f16")


def _bigger(state: dict[str, Any]) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(97, 64)


def _without(state: dict[str, Any]) -> None:
    del state["model.layers.0.self_attn.q_proj.weight"]


def _more(state: dict[str, Any]) -> None:
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 64)


def _unknown(state: dict[str, Any]) -> None:
    state["model.layers.0.gate_of_mine.weight"] = torch.zeros(4)


def _other_values(state: dict[str, Any]) -> None:
    state["model.layers.0.self_attn.q_proj.weight"] = torch.randn(64, 64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_bigger, r"blk.1.ffn_up.weight of shape \[96, 64\], wanted \[97, 64\]"),
        (_without, r"tensors that the model has not: blk.0.attn_q.weight"),
        (_more, r"no blk.2.ffn_up.weight|no name for model.layers.2"),
        (_unknown, r"no name for model.layers.0.gate_of_mine.weight"),
        (_other_values, r"blk.0.attn_q.weight that differs from model.layers.0.self_attn.q_proj.weight by 1\d\d%"),
        (lambda _: None, None),
    ],
)
def test_a_base_of_other_weights_is_named(change: Any, says: str | None, tmp_path: Path) -> None:
    model = model_of("llama")
    file = write_base(model, tmp_path / "base.gguf", "llama")
    state = dict(model.state_dict())
    change(state)
    entries = [(name, value.shape, value.clone) for name, value in state.items()]
    values = [entry for entry in entries if entry[0] == "model.layers.0.self_attn.q_proj.weight"]
    arguments = str(file), open_gguf(file), layout_of(model.config, "test"), entries, values
    if says is None:
        check_base(*arguments)
        return
    with pytest.raises(ExportError, match=says):
        check_base(*arguments)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2")
    with pytest.raises(ExportError, match=r'the architecture "gpt2", wanted one of llama, .*gemma3_text'):
        layout_of(config, "base")
    file = write_base(model_of("qwen2"), tmp_path / "base.gguf", "qwen2")
    with pytest.raises(ExportError, match=r'the architecture "qwen2", wanted "llama"'):
        check_base(str(file), open_gguf(file), layout_of(model_of("llama").config, "test"), [])
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ExportError, match="wanted a whole GGUF file"):
        open_gguf(tmp_path / "no.gguf")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("options", "tied", "says"),
    [
        ({"target_modules": ["embed_tokens"]}, False, r"got model.embed_tokens.lora_embedding_A"),
        ({"target_modules": ["lm_head"]}, True, r"a LoRA of lm_head, which is tied"),
        ({"target_modules": ["lm_head"]}, False, None),
    ],
)
def test_modules_that_llama_cpp_does_not_take_are_named(
    options: Any, tied: bool, says: str | None, tmp_path: Path
) -> None:
    model = model_of("llama", tied)
    write_adapter(model, tmp_path / "adapter", **options)

    arguments = tmp_path / "adapter.gguf", tmp_path / "adapter", layout_of(model.config, "test"), "f32"
    if says is None:
        assert write_lora_file(*arguments) == 0
        assert field_of(open_gguf(tmp_path / "adapter.gguf"), "adapter.lora.alpha") == 4
        return
    with pytest.raises(ExportError, match=rf"{says}.*--merged"):
        write_lora_file(*arguments)
