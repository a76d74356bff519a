"""What keeptune knows about architectures: which modules are linear maps, and which share an input.

Nothing here names an architecture. Linear maps are found by type, layers by the number in the module path,
roles by the shortest path suffix that is unique in its block, and shared inputs by watching which tensor
reaches which module in one tiny forward pass. Where an MLP writes into the hidden states, its down-projection, is found
by shape and order of calls.
"""

import inspect
import logging
import re
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keeptune.core.errors import ModelError, PlanError, need_known
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.offload import device_of
from keeptune.core.target import Target
from keeptune.core.weights import is_linear_map, keep_layout, weight_shape
from keeptune.model.fused_experts import fused_weights, one_expert_at_a_time, taken_for_experts, warn_of_unknown_stacks

_log = logging.getLogger(__name__)
_LAYER = re.compile(r"\.(\d+)\.")


def find_targets(
    model: PreTrainedModel, roles: Iterable[str] | None = None, layers: Iterable[int] | None = None
) -> list[Target]:
    """Returns the linear maps of a model that a method may change, in model order.

    Args:
        model: The base model, before anything was installed into it.
        roles: Roles to keep, such as ``["q_proj", "down_proj"]``; None keeps all but the head.
        layers: Indices of the blocks to keep, such as ``[4, 5, 6, 7]``; None keeps all, and what is outside blocks.

    Raises:
        PlanError: A role does not exist in this model; the message lists those that do. Or a block does not.
        ModelError: The model has no linear maps.
    """
    keep_layout(model)
    modules, fused = _linear_modules(model), _expert_targets(model)
    if not modules and not fused:
        raise ModelError(
            type(model).__name__,
            got="no linear map besides the head",
            wanted="a transformer with linear maps",
            next_step="Check that the model is not already wrapped by PEFT, and quantised in a way that PEFT knows.",
        )
    warn_of_unknown_stacks(model)
    taken = taken_for_experts(model, modules)
    modules = {name: module for name, module in modules.items() if name not in taken}
    role_of = roles_of(modules)
    wanted = None if roles is None else list(roles)
    known = sorted({*role_of.values(), *(target.role for target in fused)})
    output = model.get_output_embeddings()
    heads = {name.rpartition(".")[2] for name, module in model.named_modules() if module is output}
    for role in wanted or ():
        if role in heads - set(known):
            got, step = "the head over the vocabulary", f"Train it whole: `modules_to_save: [{role}]`, or leave it out."
            raise PlanError(f"targets: {role}", got=got, wanted="a linear map of the blocks", next_step=step)
        need_known(role, known, f"targets: {role}", f"a role of {type(model).__name__}", PlanError)
    kept = None if layers is None else _known_layers(layers, [*modules, *(target.name for target in fused)])
    groups = _input_groups(model, modules)
    maps = [
        Target(
            *(name, _block_of(name)[1], role_of[name], *weight_shape(module), groups[name]),
            transposed=isinstance(module, Conv1D),
            bias=getattr(module, "bias", None) is not None,
        )
        for name, module in modules.items()
    ]
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    maps = sorted([*maps, *fused], key=lambda target: place[target.module])
    return [t for t in maps if (wanted is None or t.role in wanted) and (kept is None or t.layer in kept)]


def _expert_targets(model: PreTrainedModel) -> list[Target]:
    """Returns the W of each expert in fused weights, named as if experts were modules."""
    found = []
    for path, module in model.named_modules():
        for leaf, weight in fused_weights(module).items():
            transposed, bias = bool(module.is_transposed), hasattr(module, f"{leaf}_bias")
            m, n = weight.shape[:0:-1] if transposed else weight.shape[1:]
            role = f"{path.rpartition('.')[2]}.{leaf}"  # not that of a dense map of the same name
            for index, name in enumerate(f"{path}.{index}.{leaf}" for index in range(len(weight))):
                found.append(Target(name, _block_of(name)[1], role, m, n, name, transposed, bias, index, len(weight)))
    return found


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Returns the role of each module path: the shortest suffix that is unique in its block.

    >>> roles_of(["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"])["h.0.attn.c_attn"]
    'c_attn'
    >>> roles_of(["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"])["h.0.mlp.c_proj"]
    'mlp.c_proj'
    >>> roles_of(["h.0.attn.out.dense", "h.0.out.dense"])["h.0.out.dense"]
    'out.dense'
    """
    names = list(names)
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block_of(name)[0], []).append(name)
    return {name: _shortest_unique_suffix(name, members) for members in blocks.values() for name in members}


def is_nested(name: str) -> bool:
    """Returns whether a module is numbered inside its block, as experts are: it may get a part of the tokens only.

    >>> is_nested("model.layers.0.mlp.experts.3.up_proj"), is_nested("model.layers.0.mlp.up_proj")
    (True, False)
    """
    return len(_LAYER.findall(name)) > 1


def depth(model: PreTrainedModel) -> int:
    """Returns the number of blocks of a base model."""
    return 1 + max((_block_of(name)[1] for name in _linear_modules(model)), default=-1)


def body(model: PreTrainedModel) -> nn.Module:
    """Returns the transformer without its output projection, or the model itself if it has no such part."""
    inner = getattr(model, model.base_model_prefix, None)
    return inner if isinstance(inner, nn.Module) else model


def blocks_of(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Returns the numbered modules that hold linear maps, from the input to the output; the model may carry adapters.

    Raises:
        ModelError: It has no numbered blocks, or more than one stack of them.
    """
    prefixes = dict.fromkeys(_block_of(name)[0].rstrip(".") for name in _linear_modules(model))
    names = [name for name in prefixes if name]
    stacks = {name.rpartition(".")[0] for name in names}
    if len(stacks) != 1:
        raise ModelError(
            type(model).__name__,
            got=f"{len(stacks)} stacks of blocks",
            wanted="one stack of numbered blocks, as causal language models have",
            next_step="Use a causal language model.",
        )
    return tuple(model.get_submodule(name) for name in sorted(names, key=lambda name: int(name.rpartition(".")[2])))


def head_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the modules of a sequence classifier's head: all beside the transformer, drawn at random.

    It is trained in full; empty for a language model, whose output projection is no such head.
    """
    inner = body(model)
    if inner is model or not type(model).__name__.endswith("ForSequenceClassification"):
        return ()
    beside = ((name, module) for name, module in model.named_children() if module is not inner)
    return tuple(name for name, module in beside if any(True for _ in module.parameters()))


def positions(model: PreTrainedModel) -> int | None:
    """Returns how many positions a model has for tokens, or None for a model that names no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in body(model).named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            # In RoBERTa and its kin those up to the padding id are taken.
            return limit if module.padding_idx is None else limit - module.padding_idx - 1
    return limit


def _linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    head, classifies = model.get_output_embeddings(), bool(head_of(model))
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear_map(module)
        and module is not head
        # Of a classifier, neither the head nor a pooler: they are trained in full, or not at all.
        and (not classifies or _LAYER.search(name))
    }


def _known_layers(layers: Iterable[int], names: Iterable[str]) -> frozenset[int]:
    wanted = frozenset(layers)
    known = sorted({layer for _, layer in map(_block_of, names) if layer >= 0})
    unknown = sorted(wanted - set(known))
    if unknown or not wanted:
        raise PlanError(
            "layers",
            got=", ".join(map(str, unknown)) or "none",
            wanted=f"some of {known[0]} to {known[-1]}: the model has {len(known)} blocks"
            if known
            else "no `layers`: this model has no numbered blocks",
            next_step="List the blocks to tune, such as layers: [0, 1]; leave the key out to tune all.",
        )
    return wanted


def _block_of(name: str) -> tuple[str, int]:
    match = _LAYER.search(name)
    return (name[: match.end()], int(match.group(1))) if match else ("", -1)


def _shortest_unique_suffix(name: str, members: Sequence[str]) -> str:
    # The whole path in the block is a role even where another path ends in it: BERT has output.dense and
    # attention.output.dense.
    parts = name.removeprefix(_block_of(name)[0]).split(".")
    for size in range(1, len(parts)):
        suffix = ".".join(parts[-size:])
        if sum(other == suffix or other.endswith("." + suffix) for other in members) == 1:
            return suffix
    return ".".join(parts)


def _input_groups(model: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Groups modules fed by the same tensor, named after the first of them; unreached ones stand alone."""
    seen: list[tuple[Tensor, str]] = []  # keeps the tensors alive, so that equal means the same tensor
    groups = {name: name for name in modules}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            leader = next((first for tensor, first in seen if tensor is inputs[0]), name)
            groups[name] = leader
            if leader == name:
                seen.append((inputs[0], name))

        return modules[name].register_forward_pre_hook(hook)

    run_two_tokens(model, [watch(name) for name in modules])
    return groups


def run_two_tokens(model: PreTrainedModel, handles: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    """Runs two tokens through a model, which may be on the meta device, for hooks that are removed then."""
    try:
        with in_evaluation(model), torch.no_grad(), one_expert_at_a_time(model):
            probe = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
            # A mask's values, and positions' without a cache, are looked at: on the meta device there are none.
            options = {} if probe.is_meta else {"attention_mask": torch.ones_like(probe), "use_cache": False}
            model(input_ids=probe, **options)
    finally:
        for handle in handles:
            handle.remove()


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
        mine = [t for t in targets if t.layer == number and t.name in order and not is_nested(t.name)]
        mine = [target for target in mine if not target.name.startswith(attention)]
        mine.sort(key=lambda target: order[target.name])
        downs = []
        inner: set[float] = set()  # outputs of earlier maps, and half of them where gate and up are one
        for target in mine:
            if target.out_features == model.config.get_text_config().hidden_size and target.in_features in inner:
                downs.append(target)
            inner |= {target.out_features, target.out_features / 2}
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


def _in_attention(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the names of modules in a block that take an attention mask."""
    names = {module: name for name, module in model.named_modules()}
    prefixes = []
    for block in blocks_of(model):
        for child in block.modules():
            takes = child is not block and "attention_mask" in inspect.signature(child.forward).parameters
            if takes and not is_linear_map(child):
                prefixes.append(f"{names[child]}.")
    return tuple(prefixes)


def _called(model: PreTrainedModel, targets: Sequence[Target]) -> dict[str, int]:
    """Runs two tokens and numbers the maps in the order of their last calls."""
    called: list[str] = []
    hooks = [partial(lambda name, *_: called.append(name), target.name) for target in targets]
    places = (model.get_submodule(target.name) for target in targets)
    run_two_tokens(model, [place.register_forward_hook(hook) for place, hook in zip(places, hooks, strict=True)])
    return {name: place for place, name in enumerate(called)}
