"""Small models as GGUF files, written by the gguf package as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from keeptune.adapter.gguf_files import layout_of, open_gguf, write_whole_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_llama(seed: int = 0, *, tied: bool = True) -> PreTrainedModel:
    """A Llama whose rows are blocks of Q8_0, with a vocabulary for :func:`write_gguf`."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def _name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.weight"
    _, _, block, inner = module.split(".", 3)
    return f"blk.{block}.{_NAMES[inner]}.weight"


def _rotated(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of query and key projections."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def _tokens(size: int) -> list[str]:
    """Printable ASCII and a space as GPT-2's byte-level BPE writes it, then made-up words."""
    letters = ["<unk>", "<s>", "</s>", "Ġ", "Ċ", "Ġa", *map(chr, range(33, 127))]
    return (letters + [f"word{index}" for index in range(size)])[:size]


def _describe(writer: gguf.GGUFWriter, config: Any, tokens: int | None = None) -> None:
    """Write what llama.cpp reads of a config, and a tokenizer of characters: of all tokens unless told."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(_tokens(tokens or config.vocab_size))
    writer.add_token_types([gguf.TokenType.NORMAL] * (tokens or config.vocab_size))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def write_base(model: PreTrainedModel, path: Path, architecture: str, tokens: int | None = None) -> Path:
    """Write a model of any architecture that keeptune exports, by its own layout, with a tokenizer of characters."""
    empty = path.with_suffix(".empty")
    writer = gguf.GGUFWriter(empty, architecture)
    _describe(writer, model.config, tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    entries = [(name, value.shape, value.clone) for name, value in state.items()]
    write_whole_file(path, layout_of(model.config, "test"), open_gguf(empty), entries, "f32", {})
    return path


def write_gguf(
    model: PreTrainedModel, path: Path, *, q8: bool = False, architecture: str = "llama"
) -> dict[str, Tensor]:
    """Write a Llama with a tokenizer of characters, and return its weights as they are in the file.

    Args:
        model: The model.
        path: The file.
        q8: Write matrices in blocks of 8 bits (Q8_0), else all as float32.
        architecture: What the file says it is.
    """
    config, kept = model.config, {}
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, config)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = (_rotated(weight, heads) if "q_proj" in name or "k_proj" in name else weight).numpy()
        kept[name] = weight
        if q8 and value.ndim == 2:
            blocks = gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            rows = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)  # blocks lie within rows
            kept[name] = Tensor(np.asarray(gguf.dequantize(rows, gguf.GGMLQuantizationType.Q8_0)))
        else:
            writer.add_tensor(_name(name), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
