"""Whole passes for causal tracing: the states of a run, and runs in which hidden states of another are restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from keeptune.core.errors import ModelError, StatisticsError
from keeptune.data.calibration import Batch
from keeptune.model.blocks import blocks_of, parts_of
from keeptune.model.probes.block_calls import BlockCalls, hidden_of, probabilities, take, with_hidden
from keeptune.model.runner import arguments_of

OutputKind = Literal["block", "attention", "mlp"]


@dataclass(frozen=True)
class RestoredModules:
    """The modules whose outputs are restored: the blocks, or the attention or MLP of each.

    ``window`` neighbouring layers are restored together.
    """

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    outputs: tuple[nn.Module, ...]
    window: int

    @classmethod
    def of(cls, model: PreTrainedModel, kind: OutputKind, window: int) -> RestoredModules:
        """Returns the modules of a causal language model; block outputs are always restored alone.

        Raises:
            ModelError: The blocks have no such part of their own.
        """
        blocks = blocks_of(model)
        if kind == "block":
            return cls(model, blocks, blocks, 1)
        parts = [parts_of(block) for block in blocks]
        if not all(kind in named for named in parts):
            raise ModelError(
                type(model).__name__,
                got=f"blocks without one module that is their {kind}",
                wanted="one in each block",
                next_step="Trace block outputs.",
            )
        return cls(model, blocks, tuple(named[kind] for named in parts), window)

    def restored(self, layer: int) -> range:
        """Returns the layers restored together, as ROME counts them: the window's extra layer lies below."""
        return range(max(0, layer - self.window // 2), min(len(self.blocks), layer - (-self.window // 2)))


@dataclass(frozen=True)
class TracedBatch:
    """A batch of prompts with their answers, the padding on either side.

    Args:
        batch: The tokens.
        mask: The attention mask, on the model's device.
        start: ``(B,)``, the column of the first token.
        prompts: ``(B,)``, tokens of the prompt, S.
        places: ``(B, T)``, the columns whose outputs predict the answer tokens; a shorter answer repeats its last.
        wanted: ``(B, T)``, the answer tokens.
        answered: ``(B, T)``, False for the repeats.
    """

    batch: Batch
    mask: Tensor
    start: Tensor
    prompts: Tensor
    places: Tensor
    wanted: Tensor
    answered: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> TracedBatch:
        """Prepares a batch with a loss mask.

        Raises:
            StatisticsError: The answers are not known, or a text has no prompt or no answer.
        """
        if batch.loss_mask is None:
            raise unanswered("texts without an answer")
        mask = batch.attention_mask.to(device)
        start, lengths = mask.argmax(dim=1), mask.sum(dim=1)
        answers = batch.loss_mask.to(device).sum(dim=1)
        prompts = lengths - answers
        if not bool((prompts > 0).all() and (answers > 0).all()):
            raise unanswered("a text without a prompt" if bool((answers > 0).all()) else "a text without an answer")
        steps = torch.arange(int(answers.max()), device=device)[None]
        places = start[:, None] + prompts[:, None] - 1 + steps.minimum(answers[:, None] - 1)
        wanted = batch.input_ids.to(device).gather(1, places + 1)
        return cls(batch, mask, start, prompts, places, wanted, steps < answers[:, None])

    @property
    def width(self) -> int:
        """Columns, padding included."""
        return self.mask.shape[1]

    def __len__(self) -> int:
        return self.mask.shape[0]

    def arguments(self, rows: int = 1) -> dict[str, Any]:
        """Returns the arguments of the model, for the batch repeated ``rows`` times."""
        plain = Batch(self.batch.input_ids.repeat(rows, 1), self.batch.attention_mask)
        return arguments_of(plain, self.mask.repeat(rows, 1))


def unanswered(got: str) -> StatisticsError:
    """Returns the error for texts whose answers cannot be traced."""
    return StatisticsError(
        "causal tracing",
        got=got,
        wanted="prompts and completions of at least one token each: the probability of the answer is measured",
        next_step="Use `prompt` and `completion` templates in the data section; raise max_length if it cuts answers.",
    )


@dataclass
class RunStates:
    """The states of a run.

    Args:
        inputs: ``(B, W, hidden)`` of each block, and the output of the last.
        outputs: ``(B, W, hidden)`` of each restored module.
        calls: What else each block was given.
        cache: Keys and values of the whole text.
        answers: ``(B, T)``, probabilities of the answer tokens.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    calls: list[BoundArguments]
    cache: DynamicCache | None
    answers: Tensor


def full_pass(
    modules: RestoredModules, texts: TracedBatch, *, noise: Tensor | None = None, cached: bool = False
) -> RunStates:
    """Runs the model once and keeps what its blocks were given, and keys and values where ``cached``.

    Noise ``(B, W, hidden)`` is added to the token embeddings; None is the clean run.

    Raises:
        ModelError: A restored module's output is no hidden state of each token.
    """
    watched, outputs = BlockCalls(), list[Tensor]()
    cache = DynamicCache() if cached else None
    with ExitStack() as stack:
        _add_noise(modules, noise, stack)
        watched.watch(modules.blocks, stack)
        for module in modules.outputs:
            stack.callback(module.register_forward_hook(lambda *seen: outputs.append(hidden_of(seen[2]))).remove)
        last = modules.blocks[-1].register_forward_hook(lambda *seen: watched.inputs.append(hidden_of(seen[2])))
        stack.callback(last.remove)
        extra = {"use_cache": True, "past_key_values": cache} if cached else {}
        logits = modules.model(**(texts.arguments() | extra)).logits
    if any(hidden.shape != watched.inputs[0].shape for hidden in (*watched.inputs, *outputs)):
        raise ModelError(
            type(modules.model).__name__,
            got="a module whose output has another form than the hidden states",
            wanted="one vector per token, as wide as the model",
            next_step="Trace block outputs.",
        )
    answers = probabilities(take(logits, texts.places), texts.wanted)
    return RunStates(watched.inputs, outputs, watched.calls, cache, answers)


def plain_answers(
    modules: RestoredModules,
    texts: TracedBatch,
    clean: RunStates,
    noise: Tensor,
    states: Sequence[tuple[int, Tensor]],
    rows: int,
) -> Tensor:
    """Restores states one run each, by hooks on the modules: works on any model, and is the measure of the fast way.

    A state is a layer and ``(B, W)``, True at the columns where its output is restored; a pass holds ``rows`` runs.

    Returns:
        ``(states, B, T)``, the probabilities of the answer tokens.
    """
    parts = []
    for first in range(0, len(states), rows):
        some = states[first : first + rows]
        with ExitStack() as stack:
            _add_noise(modules, noise.repeat(len(some), 1, 1), stack)
            for number, module in enumerate(modules.outputs):
                chosen = torch.cat([at if number in modules.restored(layer) else at & False for layer, at in some])
                hook = _restoring(chosen, clean.outputs[number].repeat(len(some), 1, 1))
                stack.callback(module.register_forward_hook(hook).remove)
            logits = modules.model(**texts.arguments(len(some))).logits
        places, wanted = (part.repeat(len(some), 1) for part in (texts.places, texts.wanted))
        answers = probabilities(take(logits, places), wanted)
        parts.append(answers.reshape(len(some), len(texts), -1))
    return torch.cat(parts)


def _restoring(chosen: Tensor, values: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return with_hidden(output, torch.where(chosen[..., None], values, hidden_of(output)))

    return hook


def _add_noise(modules: RestoredModules, noise: Tensor | None, stack: ExitStack) -> None:
    if noise is None:
        return
    embedding: Any = modules.model.get_input_embeddings()

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + noise.to(output)

    stack.callback(embedding.register_forward_hook(hook).remove)
