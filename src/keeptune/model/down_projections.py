"""Where an MLP writes into the hidden states: its down-projection, found by shape and order of calls, not by name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence

from transformers import PreTrainedModel

from keeptune.core.errors import ModelError
from keeptune.core.target import Target
from keeptune.core.weights import is_linear_map
from keeptune.model.blocks import blocks_of, find_targets, is_nested, run_two_tokens

_log = logging.getLogger(__name__)


def down_projections(model: PreTrainedModel) -> tuple[Target, ...]:
    """Returns the down-projection of each block's MLP, in order: the last map outside attention to hidden states.

    Blocks without one are named in a warning. The model carries no adapters.

    Raises:
        ModelError: No block has one, as where all MLPs are mixtures of experts.
    """
    targets = [target for target in find_targets(model) if target.expert is None]
    order = _called(model, targets)
    attention = _in_attention(model)
    chosen: list[Target] = []
    for number in range(len(blocks_of(model))):
        mine = [t for t in targets if t.layer == number and t.name in order and not _skipped(t, attention)]
        mine.sort(key=lambda target: order[target.name])
        downs = [target for index, target in enumerate(mine) if _closes(model, target, mine[:index])]
        chosen += downs[-1:]
    without = sorted(set(range(len(blocks_of(model)))) - {target.layer for target in chosen})
    if not chosen:
        raise ModelError(
            type(model).__name__,
            got=f"blocks of {', '.join(sorted({target.role for target in targets}))}",
            wanted="in each block an MLP whose last linear map leads from its inner features to the hidden states: "
            "down_proj of a gated MLP, or c_proj, fc2, dense_4h_to_h of a plain one",
            next_step="Use a model with such MLPs; mixtures of experts have none of their own.",
        )
    if without:
        _log.warning("%s: blocks %s have no MLP down-projection and are left out", type(model).__name__, without)
    return tuple(chosen)


def _skipped(target: Target, attention: Sequence[str]) -> bool:
    return is_nested(target.name) or target.name.startswith(tuple(attention))


def _closes(model: PreTrainedModel, target: Target, before: Sequence[Target]) -> bool:
    """Returns whether a map leads from an earlier one's outputs (half where gate and up are one) to hidden states."""
    inner = {size for other in before for size in (other.out_features, other.out_features / 2)}
    hidden: int = model.config.get_text_config().hidden_size
    return target.out_features == hidden and target.in_features in inner


def _in_attention(model: PreTrainedModel) -> list[str]:
    """Returns the names of modules in a block that take an attention mask."""
    names = {module: name for name, module in model.named_modules()}
    prefixes = []
    for block in blocks_of(model):
        for child in block.modules():
            takes = child is not block and "attention_mask" in inspect.signature(child.forward).parameters
            if takes and not is_linear_map(child):
                prefixes.append(f"{names[child]}.")
    return prefixes


def _called(model: PreTrainedModel, targets: Sequence[Target]) -> dict[str, int]:
    """Runs two tokens and numbers the maps in the order of their last calls."""
    order: dict[str, int] = {}
    count = iter(range(1 << 30))
    handles = [
        model.get_submodule(target.name).register_forward_hook(
            lambda *_, name=target.name: order.__setitem__(name, next(count))
        )
        for target in targets
    ]
    run_two_tokens(model, handles)
    return order
