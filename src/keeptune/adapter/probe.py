"""Random tokens to compare two models on, and their logits."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["logits_of", "random_probe"]


def random_probe(model: PreTrainedModel | PeftModel, seed: int = 0) -> Tensor:
    """Draw token ids to compare logits on.

    Args:
        model: The model.
        seed: The seed.

    Returns:
        ``(4, 32)`` token ids on the model's device.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (4, 32), generator=generator)
    return ids.to(model.device)


def logits_of(model: Any, probe: Tensor) -> Tensor:
    """Compute logits in evaluation mode, leaving the model in the mode it was in.

    Args:
        model: The model.
        probe: Token ids ``(batch, length)``.

    Returns:
        The logits, float32, on the CPU.
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=probe.to(model.device)).logits.float().cpu()
    model.train(training)
    return logits
