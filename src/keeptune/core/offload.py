"""Models whose weights stay on disk until a module needs them: where they run, their values, modules brought in.

Accelerate's hooks do it, on each module that holds weights of its own (``load_offloaded``).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def is_offloaded(model: nn.Module) -> bool:
    """Returns whether some of a model's weights are on disk."""
    return any(hook_of(module) for module in model.modules())


def hook_of(module: nn.Module) -> Any:
    """Returns the hook that reads a module's own weights from disk, None for a module that holds them."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def device_of(model: nn.Module) -> torch.device:
    """Returns the device that a model runs on; its weights may be elsewhere until they are needed."""
    first = next(model.parameters())
    hooks = (hook_of(module) for module in model.modules()) if first.is_meta else ()
    hook = next((hook for hook in hooks if hook), None)
    return first.device if hook is None else torch.device(hook.execution_device)


def stored_value(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Returns an entry of a model's ``state_dict()`` by its name, read from disk where it is; it is not kept."""
    module, _, own = name.rpartition(".")
    hook = hook_of(model.get_submodule(module)) if value.is_meta else None
    stored: Tensor = hook.weights_map[own] if hook else value
    return stored


def edit_values(model: nn.Module, edits: Mapping[str, Sequence[Callable[[Tensor], object]]]) -> None:
    """Changes parameters and buffers of a model in place: name to the functions that do it.

    Those on disk stay as they are there: what is read of them is changed, each time that a module needs it.
    """
    for name, own in edits.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        value: Tensor = getattr(module, leaf)
        hook = hook_of(module) if value.is_meta else None
        if hook:
            hook.weights_map = _Edited(hook.weights_map, leaf, own)
            continue
        with torch.no_grad():
            for edit in own:
                edit(value)


def save_model(model: PreTrainedModel, folder: Path, shard: str = "2GB") -> None:
    """Saves a model; one whose weights are on disk shard by shard, with the changes of ``edit_values``.

    Of such a model one ``shard`` is in memory at a time at most, but for a weight that is larger.
    """
    if not is_offloaded(model):
        model.save_pretrained(folder)
        return
    tied = model.all_tied_weights_keys  # Transformers finds them by their memory, and these have none
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, state_dict=state, max_shard_size=shard)


class _Edited(Mapping[str, Tensor]):
    def __init__(self, stored: Mapping[str, Tensor], name: str, edits: Sequence[Callable[[Tensor], object]]) -> None:
        self._stored, self._name, self._edits = stored, name, edits

    def __getitem__(self, key: str) -> Tensor:
        if key != self._name:
            return self._stored[key]
        value = self._stored[key].clone()
        with torch.no_grad():
            for edit in self._edits:
                edit(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@contextmanager
def aligned(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Holds the weights and buffers of modules, without those inside them, on a device inside a ``with`` block."""
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            hook = hook_of(module)
            if hook:
                stack.enter_context(align_module_device(module, device))
                # Otherwise each call of the module would read its weights again, and drop them.
                hook.offload = False
                stack.callback(setattr, hook, "offload", True)
            _move(module, device, stack)
        yield


def _move(module: nn.Module, device: torch.device, back: ExitStack) -> None:
    """Moves a module's own tensors; what is packed (4 bits) moves by the module's own ``to``, with its scales."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    away = [tensor for tensor in own if tensor.device != device]
    if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in away):
        back.callback(module.to, away[0].device)
        module.to(device)
        return
    for tensor in away:
        back.callback(setattr, tensor, "data", tensor.data)
        tensor.data = tensor.data.to(device)
