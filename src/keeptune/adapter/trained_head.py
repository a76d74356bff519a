"""What is trained beside the factors, in PEFT's own wrappers: a classifier's head, whole modules, rows of tokens.

Modules are in ``modules_to_save``, rows of the embedding in ``trainable_token_indices``; both are part of the adapter.
Where the output projection is tied to the embedding they stay one: ``lm_head`` then means the embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from keeptune.core.errors import PlanError, need_known
from keeptune.core.plan import Plan

Edit = Callable[[Tensor], object]
TokenIndices = Sequence[int] | Mapping[str, Sequence[int]]
_SAVED = "token_adapter.trainable_tokens_delta"
_DELTA = f"{_SAVED}.default"


class _Tokens(TrainableTokensWrapper):
    """PEFT's wrapper beside a twin, which has no tokens, and under TRL's fused loss, which reads a head's bias."""

    @property
    def bias(self) -> Any:
        """The bias of the module inside."""
        return self.token_adapter.get_base_layer().bias

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the rows of an adapter; none of one without."""
        known = adapter_name in self.token_adapter.trainable_tokens_delta
        return super().adapter_state_dict(adapter_name, state_dict) if known else {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Returns where the rows of an adapter are loaded from; nothing for one without."""
        known = adapter_name in self.token_adapter.trainable_tokens_delta
        return super().adapter_state_dict_load_map(adapter_name) if known else {}


def trained_beside(
    model: PreTrainedModel, modules: Sequence[str] | None, tokens: TokenIndices | None, targets: Sequence[str]
) -> dict[str, Any]:
    """Returns the fields of PEFT's config that train modules and tokens beside the targets; modules by full names.

    Args:
        model: The base.
        modules: Names of modules to train in full, as of ``modules_to_save``: whole names or their last parts.
        tokens: Ids of tokens to train, in the embedding, or in each of several modules by name.
        targets: Names of the modules that have factors.

    Raises:
        PlanError: There is no such module or token, or one would be trained twice.
    """
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    embedding, head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    tied = is_tied(model)
    names = [name for wanted in modules or () for name in _resolved(model, wanted, "modules_to_save")]
    if tied and {embedding, head} & {*names}:
        names = [embedding if name == head else name for name in names]
        fields["ensure_weight_tying"] = True
    names = list(dict.fromkeys(names))
    for name in names:
        inside = [target for target in targets if target == name or target.startswith(f"{name}.")]
        packed = any(not p.is_floating_point() for p in model.get_submodule(name).parameters())
        if inside or packed:
            raise PlanError(
                f"modules_to_save, {name}",
                got=f"a module with the target {inside[0]}" if inside else "quantised weights",
                wanted="modules without targets, in float",
                next_step="Leave it out, or leave its targets out (`targets`).",
            )
    if names:
        fields["modules_to_save"] = names
    if tokens:
        by_name = tokens if isinstance(tokens, Mapping) else {embedding: tokens}
        rows = {
            embedding if tied and name == head else name: _checked_rows(model, name, ids)
            for wanted, ids in by_name.items()
            for name in _resolved(model, wanted, "trainable_token_indices")
        }
        both = sorted(rows.keys() & {*names})
        if both or (tied and len(rows) < len(by_name)):
            raise PlanError(
                "trainable_token_indices",
                got=f"rows of {both[0]}, which modules_to_save names too" if both else "rows of two tied modules",
                wanted="each weight once",
                next_step="Name the embedding once; a head that is tied to it follows.",
            )
        fields["trainable_token_indices"] = rows
    return fields


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output projection is the embedding; the model may carry adapters, or have its weights on disk."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return False
    one, other = (getattr(module, "base_layer", module).weight for module in (head, embedding))
    on_disk = one.is_meta and bool(model.config.get_text_config().tie_word_embeddings)
    return one is other or on_disk


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")


def _resolved(model: nn.Module, wanted: str, option: str) -> list[str]:
    """Returns the full names of the modules with weights that PEFT means by a name."""
    every = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    names = [name for name in every if name == wanted or name.endswith(f".{wanted}")]
    if not names:
        known = {last for name in every if not (last := name.rpartition(".")[2]).isdigit()}
        need_known(wanted, known, option, "the name of a module with weights, such as embed_tokens", PlanError)
    return names


def _checked_rows(model: nn.Module, name: str, ids: Sequence[int]) -> list[int]:
    weight: Any = model.get_submodule(name).weight
    wrong = sorted({i for i in ids if not 0 <= i < len(weight)} | {i for i in ids if list(ids).count(i) > 1})
    if wrong:
        raise PlanError(
            f"trainable_token_indices, {name}",
            got=f"the token {wrong[0]}",
            wanted=f"different ids from 0 to {len(weight) - 1}",
            next_step="For new tokens resize the base first: model.resize_token_embeddings(len(tokenizer)), save both.",
        )
    return list(ids)


def head_names(plan: Plan) -> tuple[str, ...]:
    """Returns the names of the modules that are trained in full; none for most language models."""
    return tuple(plan.peft.get("modules_to_save") or ())


def token_rows(plan: Plan) -> Mapping[str, list[int]]:
    """Returns the ids of the tokens whose rows are trained, by the name of the module."""
    return plan.peft.get("trainable_token_indices") or {}


def task_type(plan: Plan) -> str:
    """Returns PEFT's kind of task: ``"SEQ_CLS"`` with a classifier's head, else ``"CAUSAL_LM"``."""
    return plan.peft.get("task_type") or ("SEQ_CLS" if head_names(plan) else "CAUSAL_LM")


def labels_of(model: PreTrainedModel | PeftModel) -> list[str] | None:
    """Returns a classifier's labels in the order of the outputs; empty for a score, None for a language model."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not type(base).__name__.endswith("ForSequenceClassification"):
        return None
    names = base.config.id2label
    return [names[index] for index in sorted(names)] if len(names) > 1 else []


def keep_precise(model: PeftModel, plan: Plan) -> None:
    """Converts what is trained to float32, as the factors are: small updates to 16-bit weights round away.

    A language model's modules put out the base's dtype, which the blocks after them take.
    """

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs)

    def narrow_to(dtype: torch.dtype) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda _, __, output: output.to(dtype) if isinstance(output, Tensor) else output

    modules = [*_heads(model, plan).values(), *_tied(model, plan).values()]
    narrow = [next(module.parameters()).dtype for module in modules]
    for module, dtype in zip(modules, narrow, strict=True):
        if dtype != torch.float32 or any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            module.to(torch.float32).register_forward_pre_hook(widen)
            if task_type(plan) == "CAUSAL_LM":
                module.register_forward_hook(narrow_to(dtype))
    for parameter in _token_parameters(model, plan).values():
        parameter.data = parameter.data.float()
    for module in model.modules():
        if type(module) is TrainableTokensWrapper:
            module.__class__ = _Tokens


def trained_head(model: PeftModel, plan: Plan) -> dict[str, Tensor]:
    """Returns what is trained beside the factors as it is now, float32 on the CPU.

    By the names of parameters and buffers in the base, and of PEFT's ``trainable_tokens_delta`` for rows of tokens.
    """
    values = {
        f"{name}.{key}": value
        for name, module in _heads(model, plan).items()
        for key, value in module.state_dict().items()
    }
    values |= {f"{name}.{_SAVED}": p for name, p in _token_parameters(model, plan).items()}
    return {name: full(value.detach()).to("cpu", torch.float32, copy=True) for name, value in values.items()}


def tied_head(model: PeftModel, plan: Plan) -> dict[str, Tensor]:
    """Returns the weight of a head that is tied to a trained embedding, which PEFT's files hold too."""
    return {
        f"{name}.weight": module.weight.detach().to("cpu", torch.float32, copy=True)
        for name, module in _tied(model, plan).items()
    }


def put_head(model: PeftModel, plan: Plan, values: Mapping[str, Tensor]) -> None:
    """Puts what was trained into an installed model; other names are left aside."""
    for name, module in _heads(model, plan).items():
        prefix = f"{name}."
        module.load_state_dict({key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)})
    with torch.no_grad():
        for name, parameter in _token_parameters(model, plan).items():
            parameter.copy_(values[f"{name}.{_SAVED}"])


def full(value: Tensor) -> Tensor:
    """Returns a tensor of which each process may hold a shard (FSDP2); all call it then."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def head_edits(base: PreTrainedModel, plan: Plan, values: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Returns the edits of a base's parameters and buffers that put what was trained in the place of its own."""
    rows = {f"{name}.{_SAVED}": (name, ids) for name, ids in token_rows(plan).items()}
    edits: dict[str, Edit] = {key: methodcaller("copy_", value) for key, value in values.items() if key not in rows}
    edits |= {f"{name}.weight": partial(_replace_rows, ids, values[key]) for key, (name, ids) in rows.items()}
    embedding, head = (_name_of(base, m) for m in (base.get_input_embeddings(), base.get_output_embeddings()))
    if is_tied(base) and f"{embedding}.weight" in edits:
        edits[f"{head}.weight"] = edits[f"{embedding}.weight"]
    return edits


def _replace_rows(ids: list[int], rows: Tensor, stored: Tensor) -> None:
    stored[ids] = rows.to(stored)


def trained_head_names(model: PeftModel, plan: Plan) -> set[str]:
    """Returns the names of the parameters beside the factors that a plan trains, within the base."""
    heads = tuple(f"{name}.modules_to_save.default." for name in head_names(plan))
    inner = model.base_model.model
    return {name for name, _ in inner.named_parameters() if name.startswith(heads)} | {
        f"{name}.{_DELTA}" for name in token_rows(plan)
    }


def _heads(model: PeftModel, plan: Plan) -> dict[str, nn.Module]:
    return {name: model.base_model.model.get_submodule(f"{name}.modules_to_save.default") for name in head_names(plan)}


def _tied(model: PeftModel, plan: Plan) -> dict[str, Any]:
    """Returns the output projection's trained module where its weight is that of the trained embedding."""
    if not plan.peft.get("ensure_weight_tying"):
        return {}
    inner: Any = model.base_model.model
    head = inner.get_output_embeddings()
    return {_name_of(inner, head): head.modules_to_save["default"]}


def _token_parameters(model: PeftModel, plan: Plan) -> dict[str, nn.Parameter]:
    """Returns PEFT's parameter that holds rows of tokens, by the name of the module."""
    return {name: model.base_model.model.get_parameter(f"{name}.{_DELTA}") for name in token_rows(plan)}
