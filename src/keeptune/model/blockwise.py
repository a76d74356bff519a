"""A runner that has one block of a model on the device at a time: its peak of memory does not grow with depth.

The model itself runs what lies before and after its blocks. Meanwhile the blocks are replaced by functions that note
what the model passes to each of them, and hand on the hidden states they get: a model whose blocks need more of each
other than hidden states, or that computes something between them, is refused.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.utils import recursively_apply
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.artefact import explain_full_disk
from keeptune.core.errors import ModelError, StatisticsError
from keeptune.core.offload import aligned
from keeptune.data.calibration import Batch
from keeptune.model.blocks import blocks_of, body
from keeptune.model.fused_experts import expert_names, one_expert_at_a_time
from keeptune.model.head import Loss, summed_loss
from keeptune.model.probes.block_calls import hidden_of
from keeptune.model.runner import Done, PassEnd, RealRows, Runner, Taps, arguments_of, still, watched

_log = logging.getLogger(__name__)
# A model that runs on the CPU shares its memory with what is kept: hardly anything is kept there.
_ON_CPU = 64 << 20
_Watch = Callable[[RealRows], AbstractContextManager[None]]


@dataclass(frozen=True)
class BlockwiseRunner(Runner):
    """Passes all batches through a block, then through the next, and back in the same way, with the Runner's numbers.

    Weights come from where the model has them: its files (``load_offloaded``), or the CPU. Inputs of blocks are kept on
    the CPU or on disk (:class:`Shelf`). A forward pass reads the weights once, a backward pass twice. Without a place
    blocks run where the model runs.
    """

    place: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self.place or super().device

    def run(
        self, batches: Sequence[Batch], taps: Taps, loss: Loss | None = None, *, title: str, done: Done = lambda _: None
    ) -> None:
        """Passes all batches forth, and with a loss back from it to the first watched block, as :meth:`Runner.run`.

        Raises:
            ModelError: The model is no single stack of blocks that hand on hidden states alone.
            StatisticsError: A row is NaN or infinite, the rows of texts are not known, or gradients are wanted of a
                module before the first block.
        """

        def watch(names: set[str], *, end: bool = False) -> _Watch:
            return lambda real: watched(self.model, taps, names, real, end=end)

        whole = body(self.model) if loss is None else self.model
        with torch.no_grad(), self._walk(batches, taps.names, whole, title) as walk:
            forth = Taps({name: taps.inputs.get(name, []) for name in walk.outside})
            walk.start(lambda real: watched(self.model, forth, walk.outside, real))
            if early := walk.before & set(taps.gradients):
                raise StatisticsError(
                    min(early),
                    got="gradients of a module before the first block, one block at a time",
                    wanted="modules inside the blocks or after them",
                    next_step="Leave it out of the targets, or set memory: resident.",
                )
            done(walk.before)
            after = walk.outside - walk.before
            sites, count = [index for index, names in enumerate(walk.sites) if names], len(walk.blocks)
            last = max(sites, default=-1)
            if loss is None:
                for index in range(count if after else last + 1):
                    walk.forth(index, watch(walk.sites[index], end=index == last and not after))
                    done(walk.sites[index])
                if after:
                    walk.end(watch(after), lambda number, hidden, run: run(hidden))
                    done(after)
                return

            def differentiate(number: int, hidden: Tensor, run: Callable[[Tensor], Any]) -> None:
                with torch.enable_grad():
                    logits = run(hidden.requires_grad_()).logits
                    losses = [summed_loss(logits, walk.batches[number], loss, draw) for draw in range(loss.probes)]
                    walk.back(number, hidden, losses, [None] * loss.probes)

            for index in range(count):
                walk.forth(index)
            walk.end(watch(after), differentiate)
            done(after)
            for index in reversed(range(min(sites, default=count), count)):
                walk.back_through(index, watch(walk.sites[index]), loss.probes)
                done(walk.sites[index])

    @contextmanager
    def _walk(self, batches: Sequence[Batch], names: set[str], run: nn.Module, title: str) -> Iterator[_Walk]:
        experts = one_expert_at_a_time(self.model) if expert_names(self.model, names) else nullcontext()
        walk = _Walk(self.model, self.device, [self._ready(batch) for batch in batches], names, run, title)
        try:
            with still(self.model), experts:
                yield walk
        finally:
            walk.bar.close()
            walk.shelf.close()


class _Walk:
    """One walk through the blocks of a model, all batches at each."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, batches: list[Batch], names: set[str], run: Any, title: str
    ) -> None:
        self.model, self.device, self.batches, self.run = model, device, batches, run
        self.shelf = Shelf.beside(device)
        self.bar = tqdm(desc=title, delay=2, disable=None if title else True, leave=False, unit="batch")
        self.blocks = blocks_of(model)
        paths = {module: f"{name}." for name, module in model.named_modules()}
        self.sites = [{name for name in names if name.startswith(paths[block])} for block in self.blocks]
        self.outside = names.difference(*self.sites)
        self.before: set[str] = set()
        inside = {module for block in self.blocks for module in block.modules()}
        self._around = [module for module in model.modules() if module not in inside]
        self._calls: list[list[Any]] = []  # by batch and block: arguments, tensors as _Kept
        self._output: Any = None  # what a block returns, but for the hidden states

    def start(self, watch: _Watch) -> None:
        """Runs what is before the first block; ``watch`` is asked for the modules reached there."""
        head = self.model.get_output_embeddings()
        around = [module for module in self._around if module is not head]
        with aligned(around, self.device), ExitStack() as stack:
            if head is not None:
                stack.callback(head.register_forward_pre_hook(_end_pass).remove)
            for number, batch in enumerate(self.batches):
                if number == 0:
                    self._output = self._output_of_a_block(batch)
                self._calls.append(self._noted(number, batch, watch))
                self.bar.update()

    def forth(self, index: int, watch: _Watch | None = None) -> None:
        """Runs a block on all batches; its inputs are kept where no rows are watched, for the backward pass."""
        with aligned(self.blocks[index].modules(), self.device):
            for number in range(len(self.batches)):
                hidden = self.shelf.get(f"{number}-{index}", self.device)
                with self._real(number) as real, suppress(PassEnd), watch(real) if watch else nullcontext():
                    self.shelf.put(f"{number}-{index + 1}", self._through(index, number, hidden))
                if watch:
                    self.shelf.drop(f"{number}-{index}")
                self.bar.update()

    def end(self, watch: _Watch, finish: Callable[[int, Tensor, Callable[[Tensor], Any]], None]) -> None:
        """Calls ``finish(batch, hidden, run)``; ``run(hidden)`` runs what is after the last block."""
        with aligned(self._around, self.device):
            for number, batch in enumerate(self.batches):
                with self._real(number) as real, ExitStack() as watched:

                    def run(hidden: Tensor, batch: Batch = batch, real: Any = real, watched: Any = watched) -> Any:
                        def leave(_: Tensor) -> Tensor:
                            watched.enter_context(watch(real))
                            return hidden

                        return self._run_around(batch, leave)

                    finish(number, self.shelf.get(f"{number}-{len(self.blocks)}", self.device), run)
                self.bar.update()

    def back_through(self, index: int, watch: _Watch, draws: int) -> None:
        """Runs a block on all batches again, with gradients, and back."""
        with aligned(self.blocks[index].modules(), self.device):
            for number in range(len(self.batches)):
                hidden = self.shelf.get(f"{number}-{index}", self.device).requires_grad_()
                with self._real(number) as real, torch.enable_grad(), watch(real):
                    output = self._through(index, number, hidden)
                    gradients = [self.shelf.get(f"{number}-gradient-{draw}", self.device) for draw in range(draws)]
                    self.back(number, hidden, [output] * draws, gradients)
                self.shelf.drop(f"{number}-{index}")
                self.bar.update()

    def back(self, number: int, hidden: Tensor, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Passes gradients of outputs back to hidden states, draw by draw, and keeps theirs."""
        for draw, (output, gradient) in enumerate(zip(outputs, gradients, strict=True)):
            hidden.grad = None
            torch.autograd.backward(output, gradient, retain_graph=draw + 1 < len(outputs))
            found = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
            self.shelf.put(f"{number}-gradient-{draw}", found)

    @contextmanager
    def _real(self, number: int) -> Iterator[RealRows]:
        """Checks the rows of a batch once they were seen."""
        real = RealRows(self.batches[number].attention_mask.to(self.device))
        yield real
        real.check(f"batch {number + 1} of {len(self.batches)}")

    def _through(self, index: int, number: int, hidden: Tensor) -> Tensor:
        """Calls a block as the model does."""
        args, kwargs = self._taken(self._calls[number][index], hidden)
        return hidden_of(self.blocks[index](*args, **kwargs))

    def _output_of_a_block(self, batch: Batch) -> Any:
        """Runs the first block once, for what it returns besides hidden states: nothing, or a tuple of None."""
        first: list[Any] = []

        def note(_: int, args: Any, kwargs: Any) -> None:
            first.append((args, kwargs))
            raise PassEnd

        with suppress(PassEnd):
            self._replaced(note, batch)
        args, kwargs = first[0]
        with aligned(self.blocks[0].modules(), self.device):
            output = self.blocks[0](*args, **kwargs)
        more = output[1:] if isinstance(output, tuple) else ()
        if not isinstance(hidden_of(output), Tensor) or any(part is not None for part in more):
            raise self._refusal("blocks that return more than hidden states")
        return more if isinstance(output, tuple) else None

    def _noted(self, number: int, batch: Batch, watch: _Watch) -> list[Any]:
        """Runs what is before the first block, keeps its output, and notes what each block is called with."""
        calls: list[Any] = []
        names: dict[int, tuple[str, Tensor]] = {}
        watched = ExitStack()

        def enter(hidden: Tensor, args: Any, kwargs: Any) -> None:
            if not calls:
                watched.close()
                self.shelf.put(f"{number}-0", hidden)
            keep = self._keeper(number, hidden, names)
            calls.append((keep(args), keep(kwargs)))

        with self._real(number) as real, watched:
            watched.enter_context(watch(real))
            with suppress(PassEnd):
                self._run_around(batch, lambda hidden: hidden, enter)
        self.before |= {name for name, _ in real.largest}
        return calls

    def _run_around(
        self,
        batch: Batch,
        leave: Callable[[Tensor], Tensor],
        enter: Callable[[Tensor, Any, Any], None] = lambda hidden, args, kwargs: None,
    ) -> Any:
        """Runs the model with blocks that hand on what they get; the last one returns ``leave(hidden)``."""
        handed: list[Tensor] = []

        def block(index: int, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if index != len(handed) or not isinstance(hidden, Tensor) or (handed and hidden is not handed[-1]):
                raise self._refusal("something computed between its blocks, or blocks that run out of order")
            enter(hidden, args, kwargs)
            handed.append(leave(hidden) if index + 1 == len(self.blocks) else hidden)
            return handed[-1] if self._output is None else (handed[-1], *self._output)

        return self._replaced(block, batch)

    def _replaced(self, block: Callable[[int, Any, Any], Any], batch: Batch) -> Any:
        with ExitStack() as stack:
            for index, module in enumerate(self.blocks):
                own = partial(lambda index, *args, **kwargs: block(index, args, kwargs), index)
                stack.enter_context(mock.patch.object(module, "forward", own))
            return self.run(**arguments_of(batch, batch.attention_mask.to(self.device)))

    def _keeper(self, number: int, hidden: Tensor, names: dict[int, tuple[str, Tensor]]) -> Callable[[Any], Any]:
        """Returns what puts the tensors of arguments on the shelf, once each."""

        def keep(value: Any) -> Any:
            if value is hidden:
                return _HIDDEN
            if isinstance(value, Tensor):
                if id(value) not in names:
                    names[id(value)] = (f"{number}-argument-{len(names)}", value)  # alive, so that its id is its own
                    self.shelf.put(names[id(value)][0], value)
                return _Kept(names[id(value)][0])
            if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
                return value
            raise self._refusal(f"blocks that take a {type(value).__name__}")

        return partial(recursively_apply, keep, test_type=lambda _: True)

    def _taken(self, value: Any, hidden: Tensor) -> Any:
        """Returns arguments as the model passed them, with other hidden states."""

        def take(kept: _Kept) -> Tensor:
            return hidden if kept is _HIDDEN else self.shelf.get(kept.name, self.device)

        return recursively_apply(take, value, test_type=lambda part: isinstance(part, _Kept))

    def _refusal(self, got: str) -> ModelError:
        return ModelError(
            type(self.model).__name__,
            got=got,
            wanted="one block after the other, each of the hidden states of the one before, to run one at a time",
            next_step="Set memory: resident, which runs the whole model.",
        )


@dataclass(frozen=True)
class _Kept:
    """Stands for a tensor on the shelf."""

    name: str


_HIDDEN = _Kept("hidden")


def _end_pass(*_: Any) -> None:
    raise PassEnd


class Shelf:
    """Tensors by name, on the CPU up to a limit in bytes, then in a folder (of ``TMPDIR``) until it is closed."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._held: dict[str, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def beside(cls, device: torch.device) -> Shelf:
        """Returns one for a model that runs on a device: it takes a quarter of the free memory, beside the CPU less."""
        quarter = psutil.virtual_memory().available // 4
        return cls(min(quarter, _ON_CPU) if device.type == "cpu" else quarter)

    def put(self, name: str, value: Tensor) -> None:
        """Keeps a tensor in the place of one of the same name.

        Raises:
            ArtefactError: The disk is full.
        """
        self.drop(name)
        value = value.detach().cpu()
        if self._bytes + value.nbytes <= self._limit:
            self._held[name] = value
            self._bytes += value.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="keeptune-inputs-")
            _log.info("blockwise: inputs of blocks beyond %d MB are kept in %s", self._limit >> 20, self._folder.name)
        path = self._path(name)
        with explain_full_disk(path):
            save_file({"value": value.contiguous()}, path)

    def get(self, name: str, device: torch.device) -> Tensor:
        """Returns a tensor on a device: a copy, which may be changed."""
        held = self._held.get(name)
        if held is not None:
            return held.to(device, copy=True)
        return load_file(self._path(name))["value"].to(device)

    def drop(self, name: str) -> None:
        """Forgets a tensor, if it is there."""
        held = self._held.pop(name, None)
        if held is not None:
            self._bytes -= held.nbytes
        elif self._folder is not None:
            self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Forgets all."""
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{name}.safetensors"
