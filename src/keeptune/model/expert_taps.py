"""What reaches each expert of a fused weight: the rows that are multiplied with its slice, and their product.

The eager implementation goes from expert to expert and multiplies by ``weight[expert]``. Inside a pass every call of
torch is seen, so that slices and the products with them are found in any architecture, whichever way W is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError
from keeptune.model.fused_experts import fused_weights, one_expert_at_a_time

Seen = Callable[[str, Tensor, Tensor], None]
_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
# What an eager loop may do to a slice before it multiplies by it.
_SAME = {Tensor.float, Tensor.to, Tensor.t, Tensor.transpose, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]


def expert_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Returns those of some names that are experts of a fused weight."""
    numbered = {name for name in names if name.split(".")[-2:-1] and name.split(".")[-2].isdigit()}
    if not numbered:
        return numbered
    modules = {name.rsplit(".", 2)[0] for name in numbered}
    weights = [weight for weight in fused_weights(model) if weight.module in modules]
    known = {weight.name(index) for weight in weights for index in range(weight.experts)}
    return numbered & known


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
