"""A mixture with a module for each expert, in the place of one with fused weights: the same function, hooks and all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Expert(nn.Module):
    def __init__(self, fused: Any, index: int) -> None:
        super().__init__()
        for leaf in ("gate_up_proj", "down_proj"):
            weight = getattr(fused, leaf)[index].detach()
            weight = weight.T if fused.is_transposed else weight
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=fused.has_bias)
            with torch.no_grad():
                linear.weight.copy_(weight)
                if fused.has_bias:
                    linear.bias.copy_(getattr(fused, f"{leaf}_bias")[index])
            self.add_module(leaf, linear)


class Experts(nn.ModuleList):
    def __init__(self, fused: Any) -> None:
        super().__init__(Expert(fused, index) for index in range(len(fused.down_proj)))
        self.gate = [fused._apply_gate]  # in a list, so that the fused module is no part of this one

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            for slot in range(chosen.shape[1]):
                for token in (chosen[:, slot] == index).nonzero()[:, 0].tolist():
                    inner = self.gate[0](expert.gate_up_proj(hidden[token : token + 1]))
                    out[token] = out[token] + (weights[token, slot] * expert.down_proj(inner))[0]
        return out


def unfused(model: PreTrainedModel) -> PreTrainedModel:
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if name.endswith(".experts"):
            made.set_submodule(name, Experts(module))
    made.config.model_type = "unfused"  # of known ones PEFT takes modules for the experts of Transformers 4
    return made.eval()
