"""What the probes share: a run that is kept, blocks run on other hidden states or on some columns of texts alone.

Nothing here names an architecture. A block is given what it was given in the kept run (mask, positions, cache), cut to
the columns that run; what lies before them is in the kept run's keys and values.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from keeptune.core.errors import ModelError
from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.runner import PassEnd, arguments_of

# What a block is called with: positions and names.
BlockCall = tuple[tuple[Tensor], dict[str, Any]]


class UnfitError(Exception):
    """A block cannot be run on some columns alone."""


@dataclass(frozen=True)
class KeptRun:
    """What a run gave the blocks.

    Args:
        inputs: ``(B, C, hidden)`` of each block, and the output of the last.
        calls: What else each block was given, by name.
        outputs: ``(B, C, D)`` of each watched module.
        cache: Keys and values of the whole texts.
    """

    inputs: list[Tensor]
    calls: list[dict[str, Any]]
    outputs: list[Tensor]
    cache: DynamicCache


@dataclass(frozen=True)
class Blocks:
    """The blocks of a frozen model; no architecture is named."""

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]

    def keep(
        self,
        batch: Batch,
        modules: Sequence[nn.Module],
        cut: Callable[[Tensor], Tensor] = lambda values: values,
        noise: Tensor | None = None,
    ) -> KeptRun:
        """Runs texts through the blocks and keeps what they were given, and what modules returned.

        Args:
            batch: Texts.
            modules: Which are watched, in the order in which they run.
            cut: Takes the columns that are kept.
            noise: ``(B, W, hidden)``, added to the token embeddings.

        Raises:
            ModelError: A module's output is no vector of each token.
        """
        mask = batch.attention_mask.to(device_of(self.model))
        run = KeptRun([], [], [], DynamicCache())

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _call(block, args, kwargs)
            run.inputs.append(cut(call.pop(next(iter(call)))))
            run.calls.append(call)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            values = hidden_of(output)
            if values.shape[:-1] not in (mask.shape, (mask.numel(),)):
                raise ModelError(
                    type(self.model).__name__,
                    got="a module whose output has another form than the hidden states",
                    wanted="one vector per token",
                    next_step="Trace block outputs.",
                )
            run.outputs.append(cut(values.reshape(*mask.shape, -1)))

        with torch.no_grad(), ExitStack() as stack:
            if noise is not None:
                embedding: Any = self.model.get_input_embeddings()
                stack.callback(embedding.register_forward_hook(lambda *seen: seen[2] + noise.to(seen[2])).remove)
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            for module in modules:
                stack.callback(module.register_forward_hook(after).remove)
            more = {"use_cache": True, "past_key_values": run.cache}
            run.inputs.append(cut(self._to_the_end(stack, arguments_of(batch, mask) | more)))
        return run

    def run(
        self,
        enter: Callable[[int, Tensor], BlockCall | None],
        hooks: Sequence[tuple[nn.Module, Callable[..., Any]]] = (),
    ) -> Tensor:
        """Runs the blocks on other hidden states; until those enter, one token runs, which is dropped.

        ``enter`` takes a block's number and the hidden states before it, and returns the block's arguments, or None.

        Returns:
            The last block's output.
        """

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, number: int) -> Any:
            return enter(number, next(iter(_call(block, args, kwargs).values())))

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                hook = partial(before, number=number)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for module, after in hooks:
                stack.callback(module.register_forward_hook(after).remove)
            return self._to_the_end(stack, self._one_token)

    def tail(self, hidden: Tensor) -> Tensor:
        """Runs what comes after the last block on ``(n, Q, hidden)``; the blocks run on one token, which is dropped."""
        handle = self.blocks[-1].register_forward_hook(lambda *seen: with_hidden(seen[2], hidden))
        try:
            logits = cast(Tensor, self.model(**self._one_token).logits)
            return logits.reshape(*hidden.shape[:-1], -1)
        finally:
            handle.remove()

    def check(self, streams: Callable[[], Tensor], kept: Tensor, what: str) -> None:
        """Checks that blocks run on some columns alone give a kept run's numbers where nothing is changed.

        Raises:
            ModelError: They give others, or cannot be run so.
        """
        # In half precision the order of a sum shows.
        tolerance = 1e-4 if torch.finfo(self.model.dtype).eps < 1e-4 else 0.1
        try:
            gap = float((streams() - kept).abs().mean() / kept.abs().mean().clamp_min(1))
            wrong = "" if gap <= tolerance or not bool(torch.isfinite(kept).all()) else f"numbers differ by {gap:.1e}"
        except torch.OutOfMemoryError:
            raise
        # What a block of an unforeseen form may raise.
        except (UnfitError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if wrong:
            raise ModelError(
                type(self.model).__name__,
                got=f"blocks that cannot be run on some tokens alone ({wrong})",
                wanted="attention over keys and values that are kept, and nothing else between tokens",
                next_step=f"There is no {what} of this architecture; take a method that does without.",
            )

    def _to_the_end(self, stack: ExitStack, arguments: dict[str, Any]) -> Tensor:
        """Runs the model up to its last block, and returns its output."""
        final: list[Tensor] = []

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            final.append(hidden_of(output))
            raise PassEnd

        stack.callback(self.blocks[-1].register_forward_hook(leave).remove)
        with suppress(PassEnd):
            self.model(**arguments)
        return final[0]

    @property
    def _one_token(self) -> dict[str, Any]:
        token = torch.zeros(1, 1, dtype=torch.long, device=device_of(self.model))
        return {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": False}


def _call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns a block's arguments by name, the hidden states first."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    call = dict(bound.arguments)
    extra = next((n for n, p in bound.signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    return call | call.pop(extra, {}) if extra else call


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states in what a module returned: the tensor, or a tuple that starts with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Returns a module's output with other hidden states in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def take(values: Tensor, columns: Tensor) -> Tensor:
    """Returns columns ``(B, Q)`` of ``(B, W, ...)``, or of ``(1, W, ...)`` for all texts alike: ``(B, Q, ...)``."""
    rows = torch.arange(len(columns), device=columns.device)[:, None] if len(values) > 1 else columns * 0
    return values[rows, columns]


def probabilities(logits: Tensor, wanted: Tensor) -> Tensor:
    """Computes the probability of tokens ``(...)`` at logits ``(..., vocabulary)``, in float32 or better: ``(...)``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, wanted[..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(dim=-1)).exp()


@dataclass
class Suffix:
    """Some columns of each text, as further rows for blocks to run on.

    Args:
        run: The kept run, of B texts.
        width: Its columns, W.
        columns: ``(B, Q)``, the columns that run.
        alone: True when each column sees none of the others, only itself and what lies before it in the kept run; a
            column may then be there several times. False when the columns are the end of a text and see each other.
        times: How often the B texts are repeated.
        cache: Other keys and values than the kept run's, already repeated.
    """

    run: KeptRun
    width: int
    columns: Tensor
    alone: bool
    times: int = 1
    cache: DynamicCache | None = None
    prefix: int = field(init=False)
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefix = int(self.columns.max()) if self.alone else int(self.columns[0, 0])

    def rows(self, values: Tensor) -> Tensor:
        """Repeats ``(B, ...)`` to ``(times B, ...)``, repeats outside, and ``(1, ...)`` to ``(times, ...)``.

        What is already repeated stays.
        """
        if len(values) == 1:
            return values.expand(self.times, *values.shape[1:])
        if len(values) == self.times * len(self.columns):
            return values
        return values.repeat(self.times, *[1] * (values.ndim - 1))

    def call(self, number: int, hidden: Tensor, into: DynamicCache | None = None) -> BlockCall:
        """Returns the arguments that a block is called with, for hidden states ``(times B, Q, hidden)``.

        The block writes its keys and values ``into`` a cache; None puts the kept ones before them.

        Raises:
            UnfitError: The kept run gave the block something of unforeseen form.
        """
        given = self.run.calls[number]
        kept = next((value for value in given.values() if isinstance(value, DynamicCache)), None)
        if kept is None or "attention_mask" not in given:
            raise UnfitError("a block takes no key-value cache or no attention mask")

        def cut(name: str, value: Any) -> Any:
            if name == "attention_mask":
                return self.rows(self._mask(value))
            if value is kept:
                return _Prefix(self) if into is None else into
            return recursively_apply(self._cut, value)

        return (hidden,), {name: cut(name, value) for name, value in given.items()}

    def _cut(self, value: Tensor) -> Tensor:
        """Takes the columns of whatever runs over the columns of a text, such as rotary angles."""
        if value.ndim < 2:
            return value
        if value.shape[0] in (1, len(self.columns)) and value.shape[1] == self.width:
            return self.rows(take(value, self.columns))
        raise UnfitError(f"a block takes a tensor of shape {tuple(value.shape)}")

    def _mask(self, given: Tensor | None) -> Tensor:
        """Builds the mask over prefix and own columns, from the block's mask over the whole text."""
        width, columns = self.width, self.columns
        if id(given) in self._masks:
            return self._masks[id(given)]
        full = given if given is not None else columns.new_ones(width, width, dtype=torch.bool).tril()[None, None]
        if full.ndim != 4 or full.shape[-2:] != (width, width):
            raise UnfitError(f"an attention mask of shape {tuple(full.shape)}")
        rows = full.expand(len(columns), -1, -1, -1).take_along_dim(columns[:, None, :, None], dim=2)
        before = torch.arange(self.prefix, device=columns.device) < columns[..., None]
        own = rows.take_along_dim(columns[:, None, None, :], dim=3)
        blocked = torch.zeros_like(rows[:1, :1, :1, :1])
        if blocked.dtype != torch.bool:
            blocked = torch.full_like(blocked, torch.finfo(blocked.dtype).min)
        if self.alone:
            own = torch.where(torch.eye(columns.shape[1], dtype=torch.bool, device=columns.device), own, blocked)
        seen = torch.where(before[:, None], rows[..., : self.prefix], blocked)
        self._masks[id(given)] = torch.cat([seen, own], dim=-1)
        return self._masks[id(given)]


class _Prefix(DynamicCache):
    """The kept run's keys and values before the columns' own."""

    def __init__(self, suffix: Suffix) -> None:
        super().__init__()
        self.suffix = suffix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns both, the kept ones first."""
        suffix = self.suffix
        kept: Any = (suffix.run.cache if suffix.cache is None else suffix.cache).layers[layer_idx]
        before = [suffix.rows(part[..., : suffix.prefix, :]) for part in (kept.keys, kept.values)]
        return torch.cat([before[0], key_states], dim=-2), torch.cat([before[1], value_states], dim=-2)


@contextmanager
def without_nodes(model: PreTrainedModel, rows: Mapping[str, Sequence[int]]) -> Iterator[PreTrainedModel]:
    """Runs a model as if some rows of linear maps, by name, and their entries of the bias, were zero.

    Laws: these outputs are exactly zero; no rows change nothing; no weight is touched, and afterwards the model
    computes what it did.
    """
    with ExitStack() as stack:
        for name, own in rows.items():
            if own:
                silenced = torch.tensor(list(own))
                # Not a product with a mask: zero times infinity is none.
                hook = partial(lambda rows, *seen: seen[2].index_fill(-1, rows.to(seen[2].device), 0), silenced)
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield model
