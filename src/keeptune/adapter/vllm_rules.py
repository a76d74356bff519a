"""What vLLM's loader takes of an adapter, by the source of vLLM 0.33.0, read and not run.

Of the config: ``PEFTHelper.validate_legal`` in ``vllm/lora/peft_helper.py``, and ``MaxLoRARanks`` in
``vllm/config/lora.py``. Of the tensors' names: ``parse_fine_tuned_lora_name`` in ``vllm/lora/utils.py`` and
``LoRAModel.from_local_checkpoint`` in ``vllm/lora/lora_model.py``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

VLLM = "vLLM 0.33.0"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
_REFUSED = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # others rewrite the base when PEFT loads them
_HEADS = ("classifier", "score")
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte")  # all that a class of a model names as `embedding_modules`


@dataclass(frozen=True, slots=True)
class VllmVerdict:
    """Whether vLLM's loader takes an adapter.

    Args:
        max_lora_rank: The smallest ``--max-lora-rank`` for it; 0 where there is none.
        refused: Why it does not take it; empty where it does.
        conditions: What the server or its model must be besides.
    """

    max_lora_rank: int
    refused: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()

    def line(self, merge: str) -> str:
        """Returns the verdict as a line; ``merge`` is the command that makes the merged form."""
        if self.refused:
            return f"{VLLM} does not serve this: {', '.join(self.refused)}; use the merged form: {merge}"
        return ", ".join([f"{VLLM} serves this with --max-lora-rank {self.max_lora_rank}", *self.conditions])


def vllm_verdict(config: Mapping[str, Any], names: Collection[str]) -> VllmVerdict:
    """Judges an adapter by the rules of vLLM 0.33.0 (``vllm/lora/peft_helper.py``, ``vllm/config/lora.py``).

    ``use_rslora`` is taken (alpha / sqrt(r)); ``rank_pattern`` and ``alpha_pattern`` are from 0.32.0 on, and earlier
    versions serve such an adapter with the scale of its header, without a word.

    Args:
        config: ``adapter_config.json``.
        names: Of the tensors in ``adapter_model.safetensors``.
    """
    missing = [f"no {key} in its config" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing or config.get("peft_type", "LORA") != "LORA":
        return VllmVerdict(0, (*missing[:1],) or (f"an adapter of type {config['peft_type']}",))
    ranks, start = [config["r"], *(config.get("rank_pattern") or {}).values()], config.get("init_lora_weights", True)
    served = next((rank for rank in SERVED_RANKS if rank >= max(ranks)), 0)
    saved = [name for name in config.get("modules_to_save") or () if name not in _HEADS]
    refused = {
        **{f"{key}: {config.get(key)}": bool(config.get(key)) for key in _REFUSED},
        f"bias: {config.get('bias')}": config.get("bias", "none") != "none",
        f"modules_to_save: {', '.join(saved)}": bool(saved),
        f"init_lora_weights: {start}, which rewrites the base as PEFT loads it": (
            isinstance(start, str) and start.lower() not in _PLAIN_STARTS
        ),
        "target_parameters: adapters of fused experts are read in forms that differ by architecture (vLLM #52194)": (
            bool(config.get("target_parameters"))
        ),
        "a rank that is not positive": min(ranks) < 1,
        f"rank {max(ranks)}, above {SERVED_RANKS[-1]}, the largest --max-lora-rank": not served,
        **{_wrong(name): True for name in names},
    }
    conditions = {
        "from 0.32.0 on (earlier ones ignore rank_pattern and alpha_pattern: other answers)": (
            bool(config.get("rank_pattern") or config.get("alpha_pattern"))
        ),
        "where the served model is a classifier with a head to replace": bool(config.get("modules_to_save")),
        "where its class of this model has LoRA for embed_tokens and lm_head (embedding_modules)": any(
            _module(name) in _EMBEDDINGS for name in names
        ),
    }
    why = tuple(words for words, holds in refused.items() if holds and words)
    return VllmVerdict(0 if why else served, why, tuple(words for words, holds in conditions.items() if holds))


def _wrong(name: str) -> str:
    """Returns what is wrong with a tensor, empty where nothing is."""
    *_, module, part = ["", *name.split(".")]
    if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
        return ""
    if part in ("lora_embedding_A", "lora_embedding_B"):
        return "" if module in _EMBEDDINGS else f"LoRA on the embedding {module}"
    fits = (part == "weight" and module in ("lora_A", "lora_B")) or (part in ("weight", "bias") and module in _HEADS)
    return "" if fits else f"a tensor that is none of a LoRA's: {module}.{part}"


def _module(name: str) -> str:
    """Returns the last name of the module that a tensor of an adapter belongs to."""
    return name.partition(".lora_")[0].rsplit(".", 1)[-1]
