"""Mixtures of experts whose weights are fused: one parameter ``(experts, ...)`` holds the W of all experts of a block.

Transformers marks such modules (``use_experts_implementation``), says whether W is stored as ``(m, n)`` or ``(n, m)``,
and can compute them in several ways; the eager one goes from expert to expert and multiplies by ``weight[expert]``.
Inside a pass every call of torch is seen, so that slices and the products with them are found in any architecture.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError, named
from keeptune.core.offload import device_of

_log = logging.getLogger(__name__)


def fused_weights(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's parameters that hold the W of all experts of a block, none if packed (fp8, mxfp4)."""
    if not hasattr(module, "is_transposed"):
        return {}
    parameters = module.named_parameters(recurse=False)
    return {leaf: p for leaf, p in parameters if p.ndim == 3 and p.is_floating_point() and p.itemsize > 1}


def warn_of_unknown_stacks(model: PreTrainedModel) -> None:
    """Names modules with 3-D weights that are not known to be experts."""
    unknown = [
        name
        for name, module in model.named_modules()
        if any(p.ndim == 3 for p in module.parameters(recurse=False))
        and not isinstance(module, nn.Conv1d)
        and not fused_weights(module)
    ]
    if unknown:
        _log.warning(
            "%s: 3-D weights that Transformers does not mark as experts in floats are left alone", named(unknown, 1)
        )


def taken_for_experts(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Returns the modules that PEFT takes for fused experts when it adds or loads an adapter, and warns of them.

    In models whose experts were modules in Transformers 4, PEFT renames every target that ends like an expert's map
    (``shared_experts.down_proj``, a dense block's ``mlp.down_proj``): an adapter there would be lost without a word.
    """
    taken = {name for name in names if _renamed(model, {name})} if _renamed(model, names) else set()
    if taken:
        told = named(sorted(taken), 1), version("peft"), model.config.model_type
        _log.warning("%s: left alone, since PEFT %s takes them for fused experts of %s", *told)
    return taken


def _renamed(model: PreTrainedModel, names: Collection[str]) -> bool:
    config = LoraConfig(target_modules=[*names])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one of two maps that became one
        return True
    return {*names} != {*(config.target_modules or ())}


@contextmanager
def one_expert_at_a_time(model: PreTrainedModel) -> Iterator[None]:
    """Computes experts one after the other, or where there are no values (meta) in a way that needs none."""
    if not any(fused_weights(module) for module in model.modules()):
        yield
        return
    before: Any = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm" if device_of(model).type == "meta" else "eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


Seen = Callable[[str, Tensor, Tensor], None]
_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
# What an eager loop may do to a slice before it multiplies by it.
_SAME = {Tensor.float, Tensor.to, Tensor.t, Tensor.transpose, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]


def expert_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Returns those of some names that are experts of a fused weight."""
    numbered = [name for name in names if name.split(".")[-2:-1] and name.split(".")[-2].isdigit()]
    parts = ((name, *name.rsplit(".", 2)) for name in numbered if name.count(".") > 1)
    return {name for name, path, _, leaf in parts if leaf in fused_weights(model.get_submodule(path))}


@contextmanager
def watched_experts(
    model: PreTrainedModel, names: set[str], seen: Seen, passed: Callable[[str], None]
) -> Iterator[None]:
    """Calls ``seen(name, rows, product)`` for what reaches an expert while the model runs.

    Args:
        model: The base model.
        names: Of experts, as :func:`expert_names` gives them.
        seen: Gets an expert's name, its rows ``(tokens, in_features)`` and their product, ``(tokens, out_features)``.
        passed: Gets the name of every expert of a module that has run, reached or not.

    Raises:
        StatisticsError: A module ran, and no product with one of its slices was seen.
    """
    if not names:
        yield
        return
    mode, modules = _Products(names, seen), dict[str, list[str]]()
    for name in sorted(names):
        modules.setdefault(name.rsplit(".", 2)[0], []).append(name)
    with ExitStack() as stack:
        stack.enter_context(one_expert_at_a_time(model))
        for path, own in modules.items():
            module = model.get_submodule(path)

            def start(module: nn.Module, _: Any, path: str = path) -> None:
                mode.enter(path, module)

            def end(*_: Any, own: list[str] = own) -> None:
                mode.leave()
                for name in own:
                    passed(name)

            stack.callback(module.register_forward_pre_hook(start).remove)
            stack.callback(module.register_forward_hook(end).remove)
        with mode:
            yield


class _Products(TorchFunctionMode):
    """Follows the slices of the module that runs now."""

    def __init__(self, names: set[str], seen: Seen) -> None:
        super().__init__()
        self._names, self._seen = names, seen
        self._path, self._module = "", nn.Module()
        self._slices: dict[int, tuple[Tensor, str]] = {}  # by identity; kept alive, so that it is theirs alone
        self._products = 0

    def enter(self, path: str, module: nn.Module) -> None:
        self._path, self._module, self._products = path, module, 0
        self._slices.clear()

    def leave(self) -> None:
        if not self._products:
            raise StatisticsError(
                self._path,
                got="no product of rows with the weight of a single expert",
                wanted="experts that are computed one after the other",
                next_step="Leave the roles of the experts out of the targets.",
            )
        self.enter("", nn.Module())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._path or not args:
            return result
        if func is Tensor.__getitem__:
            self._sliced(args[0], args[1], result)
        elif func in _SAME and id(args[0]) in self._slices:
            self._slices[id(result)] = (result, self._slices[id(args[0])][1])
        elif func in _PRODUCTS and len(args) > 1 and id(args[1]) in self._slices:
            self._products += 1
            name = self._slices[id(args[1])][1]
            if name in self._names:
                self._seen(name, args[0], result)
        return result

    def _sliced(self, whole: Any, index: Any, result: Tensor) -> None:
        # Looked up at each call: an offloaded module gets its weights when it runs.
        for leaf, parameter in self._module.named_parameters(recurse=False):
            if parameter is whole and whole.ndim == 3 and result.ndim == 2:
                self._slices[id(result)] = (result, f"{self._path}.{int(index)}.{leaf}")
