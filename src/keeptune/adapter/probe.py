"""Random tokens to compare two models on, their logits, and how far these may be apart."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import ExportError
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.offload import device_of

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-4}


def random_probe(model: PreTrainedModel | PeftModel, seed: int = 0) -> Tensor:
    """Returns random token ids ``(4, 32)`` on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (4, 32), generator=generator)
    return ids.to(device_of(model))


def logits_of(model: Any, probe: Tensor) -> Tensor:
    """Returns the logits in evaluation mode, float32, on the CPU; without the mixed precision of a trainer."""
    within = dict(vars(model))
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    try:
        with in_evaluation(model), torch.no_grad():
            logits: Tensor = model(input_ids=probe.to(device_of(model))).logits.float().cpu()
    finally:
        vars(model).update(within)
    return logits


@dataclass(frozen=True, slots=True)
class Gap:
    """The largest difference between the logits of a product and of what was trained; ``relative`` to the largest."""

    gap: float
    relative: float

    @classmethod
    def between(cls, logits: Tensor, wanted: Tensor) -> Self:
        """Compares logits of a product on a freshly loaded base with those of what was trained."""
        gap = float((logits - wanted).abs().max())
        return cls(gap, gap / max(float(wanted.abs().max()), 1e-30))

    def refuse_above(self, bound: float, where: str, what: str, next_step: str) -> None:
        """Raises ExportError where the relative gap to ``what`` is larger, or not a number."""
        if not self.relative <= bound:
            raise ExportError(
                where,
                got=f"logits that differ from {what} by {self.relative:.2e} (relative)",
                wanted=f"at most {bound:.0e}",
                next_step=next_step,
            )


def gap_to(logits: Tensor, wanted: Tensor, dtype: torch.dtype, max_gap: float | None, where: str) -> Gap:
    """Returns the gap of a product; ExportError above ``max_gap``, or if it is None the bound of the base's dtype."""
    gap, advice = Gap.between(logits, wanted), "State a larger `export.max_gap`, or check the losses."
    gap.refuse_above(BOUNDS[dtype] if max_gap is None else max_gap, where, "the trained model's", advice)
    return gap
