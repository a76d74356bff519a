"""The sizes that a model's config names, checked before anything of these sizes is made."""

import re
from pathlib import Path
from typing import Any

from keeptune.core.errors import ModelError

_NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_HEADS = ("num_attention_heads", "num_key_value_heads")
_SMALL = 2**26  # weights that are not worth a check
_MOST = 2**43  # weights of a model on the hub, which are not at hand yet


def check_counts(config: Path) -> None:
    """Refuses a file with a million layers or labels or more, which Transformers would count up to."""
    count = re.search(rb'"num_\w*(layers|heads|experts|labels)\w*"\s*:\s*\d{7,}', config.read_bytes())
    if count is not None:
        raise ModelError(str(config), got=count[0].decode(), wanted="a count", next_step="Correct it.")


def check_sizes(name: str, config: Any) -> None:
    """Refuses sizes that no model has, or for which the model's folder has too few weights."""
    keys = (*_NEEDED, *_EXPERTS, *_HEADS, "intermediate_size", "head_dim", "max_position_embeddings")
    sizes = {key: value for key in keys if isinstance(value := getattr(config, key, None), int)}
    width, layers, vocabulary, inner, head = (sizes.get(key, 1) for key in (*_NEEDED, *keys[-3:-1]))
    experts, heads = (max(1, *(sizes.get(key, 1) for key in some)) for some in (_EXPERTS, _HEADS))
    inner = getattr(config, "moe_intermediate_size", None) or inner
    learned = 0 if getattr(config, "rope_parameters", None) else sizes.get("max_position_embeddings", 0)
    about = width * (vocabulary + learned + layers * (width + inner * experts + heads * head))
    weights = sum(file.stat().st_size for file in Path(name).glob("*") if file.suffix in (".safetensors", ".bin"))
    room = max(8 * weights, _SMALL) if weights else _MOST
    counts = {key: value for key, value in sizes.items() if key != keys[-1]}  # which is -1 where there is no most
    if any(value < (key in _NEEDED) for key, value in counts.items()) or about > room:
        got = ", ".join(f"{key}: {value}" for key, value in sizes.items())
        wanted = "sizes of a model, and no more of it than there are weights"
        raise ModelError(f"model {name}, config.json", got=got, wanted=wanted, next_step="Copy the whole model again.")
