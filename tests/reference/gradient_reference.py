"""Statistics of inputs and gradients, one text at a time, by autograd on the weights and outputs themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from keeptune.data.calibration import Calibration


@dataclass
class Rows:
    """All rows that one module saw: ``h (N, n)``, ``δ (N, m)``, and the gradient of the loss in W."""

    h: Tensor
    delta: Tensor
    gradient: Tensor


def rows_of(model: PreTrainedModel, name: str, task: Calibration) -> Rows:
    module = model.get_submodule(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append((inputs[0], output))

    handle = module.register_forward_hook(keep)
    model.zero_grad()
    for index, ids in enumerate(task.sequences):
        text = torch.tensor([ids])
        logits = model(input_ids=text).logits
        if task.labels is not None:
            functional.cross_entropy(logits[0], torch.tensor(task.labels[index])).backward()
            continue
        assert task.prompts is not None
        losses = functional.cross_entropy(logits[0, :-1], text[0, 1:], reduction="none")
        losses[max(task.prompts[index] - 1, 0) :].sum().backward()
    handle.remove()
    gradient = module.weight.grad.clone()
    model.zero_grad()
    h = torch.cat([x.detach().reshape(-1, x.shape[-1]) for x, _ in seen])
    delta = torch.cat([y.grad.reshape(-1, y.shape[-1]) for _, y in seen])
    return Rows(h, delta, gradient)
