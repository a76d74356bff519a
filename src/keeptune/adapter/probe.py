"""Random tokens to compare two models on, their logits, and how far these may be apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import ExportError
from keeptune.core.eval_mode import in_evaluation

__all__ = ["BOUNDS", "Gap", "gap_to", "logits_of", "random_probe"]

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-4}


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


@dataclass(frozen=True, slots=True)
class Gap:
    """The largest difference between the logits of a product and of what was trained; ``relative`` to the largest."""

    gap: float
    relative: float


def gap_to(logits: Tensor, wanted: Tensor, dtype: torch.dtype, max_gap: float | None, where: str) -> Gap:
    """Compares logits of a product with those of what was trained.

    Args:
        logits: Of the product on a freshly loaded base.
        wanted: Logits of the model that was trained.
        dtype: Of the base.
        max_gap: The largest relative gap allowed; None takes that of exports for the dtype.
        where: For the error.

    Raises:
        ExportError: The gap is too large, or not a number.
    """
    gap = float((logits - wanted).abs().max())
    relative = gap / max(float(wanted.abs().max()), 1e-30)
    bound = BOUNDS[dtype] if max_gap is None else max_gap
    if not relative <= bound:
        raise ExportError(
            where,
            got=f"logits that differ from the trained model's by {relative:.2e} (relative)",
            wanted=f"at most {bound:.0e}",
            next_step="State a larger `export.max_gap`, or check the losses: the change may be too large.",
        )
    return Gap(gap, relative)
