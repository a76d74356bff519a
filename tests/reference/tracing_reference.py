"""Causal tracing as defined: one text at a time, one whole run per restored state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def layers_of(model: Any) -> Sequence[nn.Module]:
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


class Run:
    """One run: probabilities at every position, and what each module gave out."""

    def __init__(
        self,
        model: Any,
        ids: Sequence[int],
        modules: Sequence[nn.Module],
        noise: Tensor | None = None,
        restore: Sequence[tuple[int, int, Tensor]] = (),
    ) -> None:
        self.outputs: dict[int, Tensor] = {}
        handles = []
        if noise is not None:
            embedding = model.get_input_embeddings()
            handles.append(embedding.register_forward_hook(lambda m, i, out: out + noise[None].to(out.dtype)))
        for number, module in enumerate(modules):

            def hook(_: Any, __: Any, out: Any, number: int = number) -> Any:
                hidden = (out[0] if isinstance(out, tuple) else out).clone()
                for layer, position, value in restore:
                    if layer == number:
                        hidden[0, position] = value
                self.outputs[number] = hidden[0]
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        self.probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)

    def answers(self, ids: Sequence[int], prompt: int) -> Tensor:
        """p(y_t): the output before each answer token."""
        return torch.stack([self.probabilities[place - 1, ids[place]] for place in range(prompt, len(ids))])


def heat(model: Any, ids: Sequence[int], prompt: int, noise: Tensor, reading: str) -> Tensor:
    """Every indirect effect: (L, T) for the diagonal reading, (L, S) for that of positions."""
    modules = layers_of(model)
    clean = Run(model, ids, modules)
    corrupted = Run(model, ids, modules, noise).answers(ids, prompt)
    diagonal = reading == "diagonal"
    places = range(prompt - 1, len(ids) - 1) if diagonal else range(prompt)
    found = torch.zeros(len(modules), len(places), dtype=corrupted.dtype)
    for layer in range(len(modules)):
        for index, place in enumerate(places):
            restore = [(layer, place, clean.outputs[layer][place])]
            answers = Run(model, ids, modules, noise, restore).answers(ids, prompt)
            found[layer, index] = (answers - corrupted)[index] if diagonal else (answers - corrupted).sum()
    return found


def rome(model: Any, ids: Sequence[int], answer: int, subject: range, sigma: float, draws: int) -> dict[str, Any]:
    """ROME's trace_important_states: row 0 clean, the others with noise on the subject, drawn anew from seed 1 for
    every run; a state of row 0 is put into all others; the answer's probability is averaged over them."""

    def low_or_restored(state: tuple[int, int] | None) -> float:
        stream = numpy.random.RandomState(1)
        shape = (draws, len(subject), model.config.hidden_size)
        noise = torch.from_numpy(stream.randn(*shape) * sigma)

        def embed(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[1:, subject.start : subject.stop] += noise.to(out.dtype)
            return out

        def restore(_: Any, __: Any, out: Any) -> Any:
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            assert state is not None
            hidden[1:, state[0]] = hidden[0, state[0]]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handles = [model.get_input_embeddings().register_forward_hook(embed)]
        if state is not None:
            handles.append(layers_of(model)[state[1]].register_forward_hook(restore))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids)] * (1 + draws)), use_cache=False).logits
        for handle in handles:
            handle.remove()
        return float(logits[1:, -1].softmax(dim=-1).mean(dim=0)[answer])

    stream = numpy.random.RandomState(1)
    drawn = stream.randn(draws, len(subject), model.config.hidden_size) * sigma
    layers = len(layers_of(model))
    scores = [[low_or_restored((token, layer)) for token in range(len(ids))] for layer in range(layers)]
    return {"low": low_or_restored(None), "scores": torch.tensor(scores), "noise": torch.from_numpy(drawn)}
