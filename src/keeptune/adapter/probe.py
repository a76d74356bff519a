"""Random tokens to compare two models on, and their logits."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.eval_mode import in_evaluation

__all__ = ["logits_of", "random_probe"]


def random_probe(model: PreTrainedModel | PeftModel, seed: int = 0) -> Tensor:
    """Returns random token ids ``(4, 32)`` on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (4, 32), generator=generator)
    return ids.to(model.device)


def logits_of(model: Any, probe: Tensor) -> Tensor:
    """Returns the logits in evaluation mode, float32, on the CPU."""
    with in_evaluation(model), torch.no_grad():
        logits: Tensor = model(input_ids=probe.to(model.device)).logits.float().cpu()
    return logits
